"""Conversations from JSON lines, shuffled anew each epoch, by step number."""

import array
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.paths import user_path
from d2sd_jax.training.blocks import Conversations
from d2sd_jax.training.manifest import corpus_files


class Tokenizer(Protocol):
  """What is needed of a tokenizer for records without ids."""

  stop_ids: tuple[int, ...]

  def encode_chat(self, messages: Sequence[Any]) -> list[int]:
    """Ids up to and including the opened assistant turn."""
    ...

  def encode(self, text: str) -> list[int]:
    """Ids of plain text."""
    ...


@dataclasses.dataclass(frozen=True)
class Records(Sequence[dict[str, np.ndarray]]):
  """Conversations end to end in one array; each is padded when it is asked for.

  Attributes:
    tokens: prompt and answer of one after another, uint16 if ids allow it.
    offsets: [n + 1]; conversation i is `tokens[offsets[i] : offsets[i + 1]]`.
    prompt_lengths: [n], int32.
    max_length: T, length to pad to.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  prompt_lengths: np.ndarray
  max_length: int

  def __len__(self) -> int:
    return len(self.prompt_lengths)

  def __getitem__(self, index: Any) -> Any:
    """One conversation as fields of `Conversations`; of a slice, `Records`."""
    if isinstance(index, slice):
      first, last, step = index.indices(len(self))
      require(step == 1, "step", step, "1")
      offsets = self.offsets[first : max(first, last) + 1]
      lengths = self.prompt_lengths[first:last]
      return dataclasses.replace(self, offsets=offsets, prompt_lengths=lengths)
    if not -len(self) <= index < len(self):
      raise IndexError(index)
    index = index % len(self)
    ids = self.tokens[self.offsets[index] : self.offsets[index + 1]]
    tokens = np.zeros((self.max_length,), np.int32)
    tokens[: len(ids)] = ids
    return {
      "tokens": tokens,
      "prompt_lengths": self.prompt_lengths[index],
      "lengths": np.int32(len(ids)),
    }


def read_conversations(
  path: str | Path,
  max_length: int,
  tokenizer: Tokenizer | None = None,
  vocab_size: int | None = None,
  field: str = "corpus",
) -> Records:
  """Reads a file of conversations.

  A line is an object with `prompt_tokens` and `tokens`, the ids as they were
  sampled (best), or with `messages` whose last turn is the assistant's answer.
  An answer that is too long is cut; a prompt that leaves no room for two
  answer tokens drops its line.

  Args:
    path: JSON lines, or the manifest of a corpus in several files.
    max_length: T.
    tokenizer: for lines without ids.
    vocab_size: ids must be below it, if given.
    field: what an error calls the file: the config's field it came from.

  Raises:
    UsageError: no such file, one that does not fit its manifest, a malformed
      line (with its number), or nothing left to train on.
  """
  path = user_path(path)
  tokens, lengths, prompt_lengths = (array.array("i") for _ in range(3))
  files = corpus_files(path, field)
  for prompt, answer in _read_lines(files, tokenizer, vocab_size):
    if len(prompt) + 2 <= max_length and len(answer) >= 2:
      ids = (prompt + answer)[:max_length]
      tokens.extend(ids)
      lengths.append(len(ids))
      prompt_lengths.append(len(prompt))
  require(bool(lengths), field, str(path), "at least one usable line")
  small = vocab_size is not None and vocab_size <= 2**16
  return Records(
    tokens=np.array(tokens, np.uint16 if small else np.int32),
    offsets=np.concatenate([[0], np.cumsum(lengths)]),
    prompt_lengths=np.array(prompt_lengths, np.int32),
    max_length=max_length,
  )


@dataclasses.dataclass(frozen=True)
class Batches:
  """Endless batches: `batches[step]` is a pure function.

  That is what makes resuming exact: the position in the data is the step. A
  batch holds the same records in the same rows however many processes there
  are; each reads the rows of its own devices, and leaves the others zero.

  Attributes:
    records: endless, shuffled anew each epoch.
    batch_size: B.
    rows: those of a batch that are read.
  """

  records: Any
  batch_size: int
  rows: tuple[int, ...]

  def __getitem__(self, step: int) -> Conversations:
    """The batch of the update from `step` to `step + 1`, in NumPy."""
    first = step * self.batch_size
    read = [self.records[first + row] for row in self.rows]
    fields: dict[str, Any] = {}
    for name, value in read[0].items():
      shape = (self.batch_size, *value.shape)
      fields[name] = np.zeros(shape, value.dtype)
      fields[name][list(self.rows)] = [record[name] for record in read]
    return Conversations(**fields)


def make_dataset(
  records: Records,
  batch_size: int,
  seed: int,
  rows: Sequence[int] | None = None,
) -> Batches:
  """Batches of shuffled records.

  Args:
    records: what an epoch holds, each exactly once.
    batch_size: B, of all processes together.
    seed: of the order.
    rows: rows of each batch to be read; `None` is all.

  Raises:
    UsageError: there is not one batch, or grain is not installed.
  """
  require(
    len(records) >= batch_size,
    "corpus",
    f"{len(records)} usable lines",
    f"at least batch_size = {batch_size}",
  )
  try:
    import grain
  except ModuleNotFoundError as error:
    raise UsageError(
      "grain: not installed, expected the extra: pip install 'd2sd-jax[train]'"
    ) from error
  source = grain.MapDataset.source(records)
  return Batches(
    source.shuffle(seed=seed).repeat(),
    batch_size,
    tuple(range(batch_size) if rows is None else rows),
  )


def eval_batches(records: Records, batch_size: int) -> Iterator[Conversations]:
  """All records once, in order; the last batch is filled with empty rows."""
  for start in range(0, len(records), batch_size):
    rows = list(records[start : start + batch_size])
    empty = {**rows[0], "lengths": rows[0]["prompt_lengths"]}
    rows += [empty] * (batch_size - len(rows))
    fields: dict[str, Any]
    fields = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
    yield Conversations(**fields)


def _read_lines(
  files: Sequence[Path], tokenizer: Tokenizer | None, vocab_size: int | None
) -> Iterator[tuple[list[int], list[int]]]:
  """Prompt and answer ids of every line, checked."""
  for path in files:
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
      for number, line in enumerate(lines, 1):
        if not line.strip():
          continue
        try:
          prompt, answer = _ids(json.loads(line), tokenizer)
          _check_ids(prompt + answer, vocab_size)
        except (
          *(ValueError, TypeError, KeyError),
          *(AttributeError, RecursionError),
        ) as error:
          raise UsageError(
            f"{path}, line {number}: expected a conversation ({error})"
          ) from error
        yield prompt, answer


def _ids(
  record: Any, tokenizer: Tokenizer | None
) -> tuple[list[int], list[int]]:
  """Prompt and answer ids of one line."""
  if not isinstance(record, dict):
    raise TypeError("the line is not an object")
  if "prompt_tokens" in record and "tokens" in record:
    return list(record["prompt_tokens"]), list(record["tokens"])
  if tokenizer is None or "messages" not in record:
    raise KeyError("prompt_tokens and tokens, or messages")
  *turns, last = record["messages"]
  if last["role"] != "assistant" or not turns:
    raise ValueError("the last of the messages is not the assistant's")
  answer = tokenizer.encode(last["content"])
  return tokenizer.encode_chat(turns), [*answer, tokenizer.stop_ids[0]]


def _check_ids(ids: list[int], vocab_size: int | None) -> None:
  """Token ids are whole numbers of the vocabulary."""
  if set(map(type, ids)) - {int} or min(ids, default=0) < 0:
    raise ValueError("a token id is not a whole number")
  limit = 2**31 if vocab_size is None else vocab_size
  if max(ids, default=0) >= limit:
    raise ValueError(f"a token id is not below {limit}")

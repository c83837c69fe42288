"""Conversations from JSON lines, shuffled anew each epoch, by step number."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.paths import user_path
from d2sd_jax.training.blocks import Conversations


class Tokenizer(Protocol):
  """What is needed of a tokenizer for records without ids."""

  stop_ids: tuple[int, ...]

  def encode_chat(self, messages: Sequence[Any]) -> list[int]:
    """Ids up to and including the opened assistant turn."""
    ...

  def encode(self, text: str) -> list[int]:
    """Ids of plain text."""
    ...


def read_conversations(
  path: str | Path,
  max_length: int,
  tokenizer: Tokenizer | None = None,
  vocab_size: int | None = None,
) -> list[dict[str, np.ndarray]]:
  """Reads a file of conversations, padded to `max_length`.

  A line is an object with `prompt_tokens` and `tokens`, the ids as they were
  sampled (best), or with `messages` whose last turn is the assistant's answer.
  An answer that is too long is cut; a prompt that leaves no room for two
  answer tokens drops its line.

  Args:
    path: JSON lines.
    max_length: T.
    tokenizer: for lines without ids.
    vocab_size: ids must be below it, if given.

  Raises:
    UsageError: no such file, a malformed line (with its number), or nothing
      left to train on.
  """
  path = user_path(path)
  require(path.is_file(), "corpus", str(path), "a file of JSON lines")
  records = []
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
      if len(prompt) + 2 <= max_length and len(answer) >= 2:
        records.append(_pad(prompt, answer, max_length))
  require(bool(records), "corpus", str(path), "at least one usable line")
  return records


def make_dataset(
  records: Sequence[dict[str, np.ndarray]], batch_size: int, seed: int
) -> Any:
  """An endless dataset of batches: `dataset[step]` is a pure function.

  That is what makes resuming exact: the position in the data is the step.
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
  batched = source.shuffle(seed=seed).repeat().batch(batch_size)
  return batched.map(lambda batch: Conversations(**batch))


def eval_batches(
  records: Sequence[dict[str, np.ndarray]], batch_size: int
) -> Iterator[Conversations]:
  """All records once, in order; the last batch is filled with empty rows."""
  for start in range(0, len(records), batch_size):
    rows = list(records[start : start + batch_size])
    empty = {**rows[0], "lengths": rows[0]["prompt_lengths"]}
    rows += [empty] * (batch_size - len(rows))
    fields = {k: jnp.stack([r[k] for r in rows]) for k in rows[0]}
    yield Conversations(**fields)


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
  if not all(type(i) is int and i >= 0 for i in ids):
    raise ValueError("a token id is not a whole number")
  if vocab_size is not None and max(ids, default=0) >= vocab_size:
    raise ValueError(f"a token id is not below {vocab_size}")


def _pad(prompt: list[int], answer: list[int], size: int):
  """One record as arrays of static shape."""
  ids = (prompt + answer)[:size]
  tokens = np.zeros((size,), np.int32)
  tokens[: len(ids)] = ids
  return {
    "tokens": tokens,
    "prompt_lengths": np.int32(len(prompt)),
    "lengths": np.int32(len(ids)),
  }

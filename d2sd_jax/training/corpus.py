"""The target writes its own conversations, for the drafters to learn from.

`python -m d2sd_jax.training.corpus --out=corpus.jsonl --heldout=heldout.jsonl`

Self-synthesis: behind the chat format up to `user`, the target writes a user's
turn; then it answers that turn. Both run on this library's decode loop without
drafters, a batch ahead of the host, which meanwhile filters and writes.

Every batch is a function of the seed and its number, so a run that was stopped
goes on, with the same command, to the very same file.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from d2sd_jax.config import DTYPES, TreeConfig
from d2sd_jax.decoding.loop import generate
from d2sd_jax.decoding.state import Models, prefill
from d2sd_jax.errors import UsageError, require
from d2sd_jax.evaluation import cut_periodic_tail
from d2sd_jax.io.models import load_target, target_path
from d2sd_jax.io.paths import atomic_write
from d2sd_jax.io.tokenizer import ChatTokenizer
from d2sd_jax.sampling import Sampling

TEMPERATURE = 0.8
TURN_TOP_P = 0.95
DUPLICATE_NGRAM = 8
EXCLUDED_NGRAM = 13
# Each part and step numbers its sequences from its own multiple of this.
_ID_RANGE = 2**29

OPENINGS = (
  *("Write a Python function", "Write a program that", "Fix this code:"),
  *("def", "How do I use", "What does this code do?", "Write a SQL query"),
  *("A store sells", "A train", "How many", "Calculate", "There are"),
  *("Sarah has", "A farmer", "Solve the equation"),
  *("Explain", "Explain how", "Why do", "What is the difference between"),
  *("Summarize the following text:", "Summarize this article:"),
  *("List", "Give me a list of", "What are the main", "Name five"),
  *("Rewrite the following", "Correct the grammar:", "Translate"),
  *("Can you give me advice on", "How can I", "I'm planning"),
  *("Write a short story about", "Write an email", "Write a poem about"),
  *("Imagine you are", "Pretend to be", "Describe"),
  *("Compare", "What are the pros and cons of"),
  *("Who was", "When did", "Where is", "What is the"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
  """One corpus; everything but the file names decides what is written.

  Attributes:
    out, heldout: JSON lines of conversations; the second is never trained on
      and is answered greedily throughout.
    exclude: JSON lines of prompts that may not be trained on.
    dtype: `None` is float32 on a CPU and bfloat16 elsewhere.
    max_turn_tokens, max_answer_tokens: longest turn and answer.
    max_prefix_tokens, max_prompt_tokens: static lengths of what they follow.
    min_answer_tokens: shorter answers are dropped.
  """

  out: str
  heldout: str
  num_conversations: int = 61440
  num_heldout: int = 512
  batch_size: int = 1024
  seed: int = 0
  target: str = "smollm2-135m"
  dtype: str | None = None
  exclude: str | None = None
  max_turn_tokens: int = 120
  max_answer_tokens: int = 256
  max_prefix_tokens: int = 64
  max_prompt_tokens: int = 192
  min_answer_tokens: int = 8

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int and field.name != "seed":
        require(value >= 1, field.name, value, "1 or more")
    require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32-1")
    known = self.dtype is None or self.dtype in DTYPES
    require(known, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
    stem = lambda path: Path(path).resolve().with_suffix("")
    same = stem(self.out) == stem(self.heldout)
    require(not same, "heldout", self.heldout, "another name than out's")


def words(text: str) -> list[str]:
  """Lower-case words of a text, punctuation left out."""
  return re.findall(r"\w+", text.lower())


def ngrams(tokens: Sequence[str], size: int) -> list[tuple[str, ...]]:
  """All n-grams in order; a shorter text is a single one."""
  starts = range(max(len(tokens) - size, 0) + 1)
  return [tuple(tokens[i : i + size]) for i in starts]


class TurnFilter:
  """Decides which turns are kept; remembers those that were.

  A turn is a near-duplicate if more than half of its word 8-grams were seen,
  and excluded if it shares a word 13-gram with an excluded prompt. Of a
  shorter text all words count as one n-gram.
  """

  def __init__(self, excluded: Iterable[str] = ()):
    self._seen: set[tuple[str, ...]] = set()
    self._excluded = {
      gram for text in excluded for gram in ngrams(words(text), EXCLUDED_NGRAM)
    }

  def reject(self, text: str) -> str:
    """Why a turn is dropped; empty if it is kept, and then remembered."""
    tokens = words(text)
    if not tokens:
      return "empty"
    if not self._excluded.isdisjoint(ngrams(tokens, EXCLUDED_NGRAM)):
      return "excluded"
    grams = ngrams(tokens, DUPLICATE_NGRAM)
    if 2 * sum(gram in self._seen for gram in grams) > len(grams):
      return "duplicate"
    self._seen.update(grams)
    return ""


def read_excluded(path: str | None) -> list[str]:
  """User texts of a prompts file (`prompt` or `messages` on every line).

  Raises:
    UsageError: the file is missing, or a line of it is malformed.
  """
  if path is None:
    return []
  require(Path(path).is_file(), "exclude", path, "a file of JSON lines")
  texts: list[str] = []
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file, 1):
      try:
        record = json.loads(line)
        texts += (
          [record["prompt"] + ""]
          if "prompt" in record
          else [
            m["content"] + "" for m in record["messages"] if m["role"] == "user"
          ]
        )
      except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
          f"{path}, line {number}: expected a JSON object with prompt or"
          " messages"
        ) from error
  return texts


class Ledger:
  """One corpus file, its turns beside it, and a manifest of what is done.

  Both files only grow, by whole batches; the manifest, replaced atomically
  after each batch, says up to which byte they count. What lies behind, a run
  that was stopped left, and it is cut off.
  """

  def __init__(self, path: str, identity: dict[str, Any]):
    """Opens the files of an earlier run, or starts new ones.

    Raises:
      UsageError: the files are no part of this corpus, or were cut off.
    """
    self.path = Path(path)
    self.turns_path = self.path.with_suffix(".turns.jsonl")
    self.manifest_path = self.path.with_suffix(".manifest.json")
    self.manifest: dict[str, Any] = {
      "identity": identity,
      "turns": {"batches": 0, "bytes": 0, "kept": 0, "dropped": {}},
      "answers": {
        **{"batches": 0, "bytes": 0, "records": 0, "tokens": 0},
        **{"sampled_tokens": 0, "prompt_tokens": 0, "dropped": {}},
      },
      "timed_tokens": 0,
      "timed_seconds": 0.0,
      "tokens_per_second": None,
      "sha256": None,
    }
    if self.manifest_path.exists():
      self._resume(identity)
    else:
      for file in (self.path, self.turns_path):
        fresh = not file.exists()
        expected = f"a new file (it has no {self.manifest_path.name})"
        require(fresh, "out", str(file), expected)

  @property
  def turns(self) -> dict[str, Any]:
    """Progress of the turns."""
    return self.manifest["turns"]

  @property
  def answers(self) -> dict[str, Any]:
    """Progress of the answers."""
    return self.manifest["answers"]

  def read_turns(self) -> list[str]:
    """Texts of all turns so far."""
    if not self.turns_path.exists():
      return []
    lines = self.turns_path.read_bytes()[: self.turns["bytes"]].splitlines()
    return [json.loads(line)["text"] for line in lines]

  def append(
    self, step: str, lines: Iterable[Any], dropped: Counter[str], **counts: int
  ) -> None:
    """Adds a batch's lines to the file of a step, then to the manifest."""
    progress = self.manifest[step]
    data = "".join(
      json.dumps(line, ensure_ascii=False) + "\n" for line in lines
    ).encode()
    path = self.path if step == "answers" else self.turns_path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "r+b" if path.exists() else "wb") as file:
      file.truncate(progress["bytes"])
      file.seek(progress["bytes"])
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    progress["bytes"] += len(data)
    progress["batches"] += 1
    progress["dropped"] = dict(
      sorted((Counter(progress["dropped"]) + dropped).items())
    )
    for name, count in counts.items():
      progress[name] += count
    self.save()

  def time(self, tokens: int, seconds: float) -> None:
    """Notes how long some answer tokens took."""
    manifest = self.manifest
    manifest["timed_tokens"] += tokens
    manifest["timed_seconds"] = round(manifest["timed_seconds"] + seconds, 3)
    rate = manifest["timed_tokens"] / max(manifest["timed_seconds"], 1e-3)
    manifest["tokens_per_second"] = round(rate, 1)

  def finish(self) -> None:
    """Notes the finished file's checksum."""
    self.manifest["sha256"] = _sha256(self.path)
    self.save()

  def save(self) -> None:
    """Writes the manifest."""
    with atomic_write(self.manifest_path) as path:
      path.write_text(json.dumps(self.manifest, indent=2) + "\n")

  def _resume(self, identity: dict[str, Any]) -> None:
    try:
      manifest = json.loads(self.manifest_path.read_text())
      found = manifest["identity"]
      sizes = {
        self.path: manifest["answers"]["bytes"],
        self.turns_path: manifest["turns"]["bytes"],
      }
    except (ValueError, KeyError, TypeError) as error:
      raise UsageError(
        f"{self.manifest_path}: expected the manifest of a corpus"
      ) from error
    for key in identity:
      if found.get(key) != identity[key]:
        raise UsageError(
          f"{self.manifest_path} is of another corpus: {key}="
          f"{found.get(key)!r}, expected {identity[key]!r}"
        )
    for path, size in sizes.items():
      if size > (path.stat().st_size if path.exists() else 0):
        raise UsageError(f"{path} was cut off: expected at least {size} bytes")
    if manifest["sha256"] not in (None, _sha256(self.path)):
      raise UsageError(
        f"{self.path}: expected sha256 {manifest['sha256']}, as in its manifest"
      )
    self.manifest = manifest


def _sha256(path: Path) -> str:
  if not path.exists():
    return ""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writer:
  """A target that continues batches of token ids, one shape per step."""

  models: Models
  batch_size: int
  stop_ids: tuple[int, ...]
  seed: int

  def start(
    self,
    rows: Sequence[Sequence[int]],
    first_id: int,
    *,
    max_prefix: int,
    max_new: int,
    temperature: float,
    top_p: float = 1.0,
  ) -> Callable[[], list[list[int]]]:
    """Sends a batch to the device; the result waits for its new tokens.

    Args:
      rows: ids of `batch_size` prompts.
      first_id: sequence id of the first row, for sampling noise.
      max_prefix: static length of the prompts.
      max_new: most tokens a row may get, the stop id included.
      temperature: 0 is greedy.
      top_p: as in `Sampling`.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((self.batch_size, max_prefix), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
      padded[: len(row)] = row
    sampling = Sampling.create(temperature, 0, top_p, self.seed)
    state = _prefill(
      self.models,
      jnp.asarray(tokens),
      jnp.asarray(lengths),
      jnp.full(self.batch_size, max_new, jnp.int32),
      jnp.arange(self.batch_size, dtype=jnp.int32) + first_id,
      jnp.array(self.stop_ids, jnp.int32),
      sampling,
      capacity=math.ceil((max_prefix + max_new + 1) / 16) * 16,
    )
    state = generate(
      self.models, state, sampling, max_new, mode="ar", config=TreeConfig()
    )
    # Nothing but these two may outlive this call: the caches are large.
    written, ends = state.tokens, state.lengths

    def finish() -> list[list[int]]:
      new, last = np.asarray(written), np.asarray(ends)
      spans = zip(new, lengths, last, strict=True)
      return [row[start : end + 1].tolist() for row, start, end in spans]

    return finish


_prefill = functools.partial(jax.jit, static_argnames="capacity")(prefill)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """One of the two files: held out (0), then the corpus (1)."""

  index: int
  num_records: int
  greedy_only: bool
  ledger: Ledger

  def first_id(self, step: int, batch: int, batch_size: int) -> int:
    """Sequence id of a batch's first row; no two batches share any."""
    return (2 * self.index + step) * _ID_RANGE + batch * batch_size


Show = Callable[[str, int, int], None]


def write_part(
  part: Part,
  writer: Writer,
  tokenizer: Any,
  config: CorpusConfig,
  turn_filter: TurnFilter,
  show: Show,
) -> None:
  """Writes one file to its end, from wherever an earlier run left it.

  Args:
    part: which file.
    writer: the target.
    tokenizer: the target's; see `ChatTokenizer`.
    config: lengths and seed.
    turn_filter: knows the turns of the parts before; learns this one's.
    show: called with a step's name, what is done, and what is wanted.
  """
  answers, turns = part.ledger.answers, part.ledger.read_turns()
  part.ledger.save()
  for text in turns:
    turn_filter.reject(text)
  while (missing := part.num_records - answers["records"]) > 0:
    # Whole batches, so that no record depends on where a run was stopped.
    batches = answers["batches"] + math.ceil(missing / config.batch_size)
    wanted = batches * config.batch_size
    write_turns(
      part, writer, tokenizer, config, turn_filter, turns, wanted, show
    )
    write_answers(part, writer, tokenizer, config, turns, batches, show)
  if part.ledger.manifest["sha256"] is None:
    part.ledger.finish()


def write_turns(
  part: Part,
  writer: Writer,
  tokenizer: Any,
  config: CorpusConfig,
  turn_filter: TurnFilter,
  turns: list[str],
  wanted: int,
  show: Show,
) -> None:
  """Step A: adds turns until there are at least `wanted`."""
  size = config.batch_size
  prefixes = {text: turn_prefix(tokenizer, text) for text in ("", *OPENINGS)}

  def start(batch: int):
    openings = draw_openings(size, (config.seed, part.index, batch))
    finish = writer.start(
      [prefixes[opening] for opening in openings],
      part.first_id(0, batch, size),
      max_prefix=config.max_prefix_tokens,
      max_new=config.max_turn_tokens,
      temperature=TEMPERATURE,
      top_p=TURN_TOP_P,
    )
    return openings, finish

  another = lambda running: len(turns) + running * size < wanted
  first = part.ledger.turns["batches"]
  for openings, finish in _one_ahead(start, first, another):
    records, dropped = [], Counter[str]()
    for opening, ids in zip(openings, finish(), strict=True):
      text, reason = read_turn(tokenizer, opening, ids, config)
      reason = reason or turn_filter.reject(text)
      if reason:
        dropped[reason] += 1
      else:
        records.append({"text": text, "opening": opening})
    turns += [record["text"] for record in records]
    part.ledger.append("turns", records, dropped, kept=len(records))
    show("turns", len(turns), wanted)


def write_answers(
  part: Part,
  writer: Writer,
  tokenizer: Any,
  config: CorpusConfig,
  turns: Sequence[str],
  batches: int,
  show: Show,
) -> None:
  """Step B: answers the turns in order, up to `batches` whole batches."""
  size, answers = config.batch_size, part.ledger.answers
  first = answers["batches"]

  def start(batch: int):
    texts = turns[batch * size : (batch + 1) * size]
    prompts = [tokenizer.encode_prompt(text) for text in texts]
    greedy = part.greedy_only or batch % 2 == 0
    temperature = 0.0 if greedy else TEMPERATURE
    finish = writer.start(
      prompts,
      part.first_id(1, batch, size),
      max_prefix=config.max_prompt_tokens,
      max_new=config.max_answer_tokens,
      temperature=temperature,
    )
    return batch, texts, prompts, temperature, finish

  def another(running: int) -> bool:
    enough = answers["records"] + running * size >= part.num_records
    return not enough and answers["batches"] + running < batches

  clock = None
  for _, texts, prompts, temperature, finish in _one_ahead(
    start, first, another
  ):
    written, dropped = finish(), Counter[str]()
    # The first batch of a run compiles: it is not timed.
    num_sampled, now = sum(map(len, written)), time.monotonic()
    if clock is not None:
      part.ledger.time(num_sampled, now - clock)
    clock = now
    records = []
    for text, prompt, ids in zip(texts, prompts, written, strict=True):
      kept = cut_periodic_tail(ids)
      if len(kept) < config.min_answer_tokens:
        dropped["short"] += 1
      else:
        records.append(make_record(tokenizer, text, prompt, kept, temperature))
    records = records[: part.num_records - answers["records"]]
    part.ledger.append(
      "answers",
      records,
      dropped,
      records=len(records),
      tokens=sum(len(record["tokens"]) for record in records),
      prompt_tokens=sum(len(record["prompt_tokens"]) for record in records),
      sampled_tokens=num_sampled,
    )
    show("answers", answers["records"], part.num_records)


def turn_prefix(tokenizer: Any, opening: str) -> list[int]:
  """Ids of the chat format up to a user's turn that begins with `opening`."""
  ids = tokenizer.encode_chat([{"role": "user", "content": opening}])
  turn_end = tokenizer.stop_ids[0]
  return ids[: len(ids) - 1 - ids[::-1].index(turn_end)]


def draw_openings(count: int, seed: Sequence[int]) -> list[str]:
  """How each turn of a batch begins; about half begin freely ("")."""
  rng = np.random.default_rng(list(seed))
  chosen = rng.integers(len(OPENINGS), size=count)
  free = rng.random(count) < 0.5
  pairs = zip(chosen, free, strict=True)
  return ["" if is_free else OPENINGS[i] for i, is_free in pairs]


def read_turn(
  tokenizer: Any, opening: str, ids: Sequence[int], config: CorpusConfig
) -> tuple[str, str]:
  """A turn's text, and why it cannot be used ("" if it can).

  Args:
    tokenizer: the target's.
    opening: what the text begins with.
    ids: what the target wrote behind it.
    config: the longest prompt.
  """
  *body, last = ids
  if last != tokenizer.stop_ids[0]:
    return "", "unfinished"
  text = (opening + tokenizer.decode(body)).strip()
  if not text or text == opening:
    return text, "empty"
  if "\ufffd" in text or set(body) & set(tokenizer.special_ids):
    return text, "garbled"
  if len(tokenizer.encode_prompt(text)) > config.max_prompt_tokens:
    return text, "long"
  return text, ""


def make_record(
  tokenizer: Any,
  turn: str,
  prompt: list[int],
  answer: list[int],
  temperature: float,
) -> dict[str, Any]:
  """One line of the corpus; ids are those that went in and came out."""
  shown = answer[:-1] if answer[-1] in tokenizer.stop_ids else answer
  return {
    "messages": [
      {"role": "user", "content": turn},
      {"role": "assistant", "content": tokenizer.decode(shown)},
    ],
    "prompt_tokens": prompt,
    "tokens": answer,
    "temperature": temperature,
  }


def _one_ahead(
  start: Callable[[int], Any], first: int, another: Callable[[int], bool]
) -> Iterator[Any]:
  """Starts batch after batch, and yields each with the next under way.

  Args:
    start: begins a batch, given its number.
    first: number of the first batch.
    another: whether one more is surely needed, given how many are under way.
  """
  running: list[Any] = []
  numbers = itertools.count(first)
  while True:
    while len(running) < 2 and another(len(running)):
      running.append(start(next(numbers)))
    if not running:
      return
    yield running.pop(0)


def open_parts(config: CorpusConfig, excluded: Sequence[str]) -> list[Part]:
  """Both files, checked against the manifests of an earlier run, if any."""
  names = ("out", "heldout", "exclude")
  flags = {k: v for k, v in vars(config).items() if k not in names}
  digest = lambda texts: hashlib.sha256(json.dumps(texts).encode()).hexdigest()
  identity = {
    **flags,
    "dtype": config.dtype or default_dtype(),
    "excluded_sha256": digest(excluded),
    "openings_sha256": digest(OPENINGS),
    "sources": ["self-synthesis"],
  }
  heldout = Ledger(config.heldout, {"part": "heldout", **identity})
  out = Ledger(config.out, {"part": "corpus", **identity})
  return [
    Part(
      index=0,
      num_records=config.num_heldout,
      greedy_only=True,
      ledger=heldout,
    ),
    Part(
      index=1,
      num_records=config.num_conversations,
      greedy_only=False,
      ledger=out,
    ),
  ]


def default_dtype() -> str:
  """Float32 on a CPU, bfloat16 elsewhere."""
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def write_corpus(
  target: Any,
  tokenizer: Any,
  config: CorpusConfig,
  show: Show = lambda step, done, wanted: None,
) -> None:
  """Writes both files; goes on where an earlier run stopped.

  Args:
    target: implements `Target`.
    tokenizer: the target's; see `ChatTokenizer`.
    config: what to write.
    show: called as the files grow.

  Raises:
    UsageError: files that are there do not belong to this corpus.
  """
  excluded = read_excluded(config.exclude)
  writer = Writer(
    models=Models(target=target),
    batch_size=config.batch_size,
    stop_ids=tokenizer.stop_ids,
    seed=config.seed,
  )
  turn_filter = TurnFilter(excluded)
  for part in open_parts(config, excluded):
    name = part.ledger.path.name
    named = lambda step, *counts, name=name: show(f"{name} {step}", *counts)
    write_part(part, writer, tokenizer, config, turn_filter, named)


@contextlib.contextmanager
def progress_bars() -> Iterator[Show]:
  """Yields a `show` that draws one bar per file and step on stderr."""
  from rich import console, progress

  tasks: dict[str, progress.TaskID] = {}
  with progress.Progress(
    progress.TextColumn("{task.description}"),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TimeElapsedColumn(),
    progress.TimeRemainingColumn(),
    console=console.Console(stderr=True),
  ) as bars:

    def show(step: str, done: int, wanted: int) -> None:
      if step not in tasks:
        tasks[step] = bars.add_task(step)
      bars.update(tasks[step], completed=min(done, wanted), total=wanted)

    yield show


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise UsageError(message)


def parse_flags(arguments: Sequence[str] | None) -> CorpusConfig:
  """One flag per field of `CorpusConfig`.

  Raises:
    UsageError: a flag is unknown, missing or of another type.
  """
  parser = _Parser(
    prog="python -m d2sd_jax.training.corpus",
    description="The target writes conversations to train drafters on.",
    allow_abbrev=False,
  )
  for field in dataclasses.fields(CorpusConfig):
    required = field.default is dataclasses.MISSING
    parser.add_argument(
      f"--{field.name}",
      type=int if field.type is int else str,
      required=required,
      default=None if required else field.default,
      help="required" if required else f"default {field.default}",
    )
  return CorpusConfig(**vars(parser.parse_args(arguments)))


def run(config: CorpusConfig) -> None:
  """Checks files first, then loads the target and writes the corpus."""
  open_parts(config, read_excluded(config.exclude))
  path = target_path(config.target)
  tokenizer = ChatTokenizer.from_gguf(path)
  dtype = config.dtype or default_dtype()
  target = load_target(config.target, dtype=jnp.dtype(dtype))
  print(f"writing with {config.target} in {dtype}", file=sys.stderr)
  with progress_bars() as show:
    write_corpus(target, tokenizer, config, show)
  for name in (config.heldout, config.out):
    manifest = json.loads(Path(name).with_suffix(".manifest.json").read_text())
    print(json.dumps({"file": name, **manifest}))


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs from the command line; returns the exit status."""
  try:
    run(parse_flags(arguments))
  except (UsageError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("stopped; the same command goes on from here", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())

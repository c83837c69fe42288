"""The target writes its own conversations, for the drafters to learn from.

`python -m d2sd_jax.training.corpus --out=corpus.jsonl --heldout=heldout.jsonl`

Self-synthesis: behind the chat format up to `user`, the target writes a user's
turn; then it answers that turn. Both run on this library's decode loop without
drafters, a batch ahead of the host, which meanwhile filters and writes.

Every batch is a function of the seed and its number, so a run that was stopped
goes on, with the same command, to the very same file.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sd_jax import cli
from d2sd_jax.config import DTYPES, TreeConfig
from d2sd_jax.decoding.loop import generate
from d2sd_jax.decoding.state import Models, prefill
from d2sd_jax.errors import require
from d2sd_jax.evaluation import cut_periodic_tail
from d2sd_jax.io.models import load_target, target_path
from d2sd_jax.io.tokenizer import ChatTokenizer
from d2sd_jax.sampling import Sampling
from d2sd_jax.training.ledger import Ledger
from d2sd_jax.training.turns import (
  OPENINGS,
  TurnFilter,
  draw_openings,
  read_excluded,
  read_turn,
  turn_prefix,
)

EXAMPLES = """\
  python -m d2sd_jax.training.corpus --out=runs/corpus.jsonl \\
      --heldout=runs/heldout.jsonl --num_conversations=40960
"""
TEMPERATURE = 0.8
TURN_TOP_P = 0.95
# Each part and step numbers its sequences from its own multiple of this.
_ID_RANGE = 2**29


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
      text, reason = read_turn(
        tokenizer, opening, ids, config.max_prompt_tokens
      )
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


def parse_flags(arguments: Sequence[str]) -> CorpusConfig:
  """One flag per field of `CorpusConfig`.

  Raises:
    UsageError: a flag is unknown, missing or of another type.
  """
  parser = cli.FlagParser(
    "-m d2sd_jax.training.corpus",
    "The target writes conversations to train drafters on.",
    EXAMPLES,
  )
  for field in dataclasses.fields(CorpusConfig):
    required = field.default is dataclasses.MISSING
    parser.add_argument(
      f"--{field.name}",
      type=cli.whole_number if field.type is int else str,
      required=required,
      default=None if required else field.default,
      help="required" if required else f"default {field.default}",
    )
  flags, _ = parser.parse(arguments)
  return CorpusConfig(**vars(flags))


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


def main(arguments: Sequence[str]) -> None:
  """Reads the flags, then writes the corpus."""
  cli.setup_jax_cache()
  run(parse_flags(arguments))


if __name__ == "__main__":
  cli.exit_with(cli.run(main))

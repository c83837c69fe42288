"""One file of a corpus: the target writes turns, then it answers them."""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from d2sd_jax.evaluation import cut_periodic_tails
from d2sd_jax.training.corpus_config import CorpusConfig
from d2sd_jax.training.ledger import Ledger
from d2sd_jax.training.ngrams import TurnFilter
from d2sd_jax.training.openings import draw_openings
from d2sd_jax.training.sources import TopUp
from d2sd_jax.training.turns import Turn, measure, read_turns, turn_prefixes
from d2sd_jax.training.writer import Writer, Written, one_ahead

TURN_TEMPERATURE = 0.8
TURN_TOP_P = 0.95
ANSWER_TEMPERATURES = (0.7, 1.0)
# Each part and step numbers its sequences from its own multiple of this.
_ID_RANGE = 2**29

Show = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """One of the two files: held out (0), then the corpus (1).

  Attributes:
    index: which; it numbers sequences and seeds draws.
    num_records: conversations wanted.
    greedy_only: no answer is sampled.
    ledger: the files.
  """

  index: int
  num_records: int
  greedy_only: bool
  ledger: Ledger

  def first_id(self, step: int, batch: int, batch_size: int) -> int:
    """Sequence id of a batch's first row; no two batches share any."""
    return (2 * self.index + step) * _ID_RANGE + batch * batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tools:
  """What both parts are written with.

  Attributes:
    writer: the target.
    tokenizer: the target's; see `ChatTokenizer`.
    config: lengths and seed.
    turn_filter: knows the turns so far.
    top_ups: further sources of turns.
    show: called with a step's name, what is done, and what is wanted.
  """

  writer: Writer
  tokenizer: Any
  config: CorpusConfig
  turn_filter: TurnFilter
  top_ups: Sequence[TopUp] = ()
  show: Show


def write_part(part: Part, tools: Tools) -> None:
  """Writes one file to its end, from wherever an earlier run left it."""
  answers, size = part.ledger.answers, tools.config.batch_size
  turns = [Turn(**record) for record in part.ledger.read_turns()]
  part.ledger.begin()
  for turn in turns:
    tools.turn_filter.reject(turn.text)
  while (missing := part.num_records - answers["records"]) > 0:
    # Whole batches, so that no record depends on where a run was stopped.
    batches = answers["batches"] + math.ceil(missing / size)
    write_turns(part, tools, turns, batches * size)
    write_answers(part, tools, turns, batches)
  if not part.ledger.manifest["finished"]:
    part.ledger.finish()


def write_turns(
  part: Part, tools: Tools, turns: list[Turn], wanted: int
) -> None:
  """Step A: adds turns until there are at least `wanted`."""
  config, tokenizer = tools.config, tools.tokenizer
  size, progress = config.batch_size, part.ledger.turns
  prefixes = turn_prefixes(tokenizer, config.max_prefix_tokens)

  def prepare(batch: int):
    openings = draw_openings(size, (config.seed, part.index, batch))
    write = tools.writer.prepare(
      [prefixes[opening.before + opening.start] for opening in openings],
      part.first_id(0, batch, size),
      max_prefix=config.max_prefix_tokens,
      max_new=config.max_turn_tokens,
      temperature=TURN_TEMPERATURE,
      top_p=TURN_TOP_P,
    )
    return (batch, openings), write

  another = lambda running: len(turns) + running * size < wanted
  clock = Clock(part.ledger, "turns")
  for (batch, openings), written in one_ahead(
    prepare, progress["batches"], another
  ):
    num_sampled = int(written.lengths.sum())
    clock.lap(num_sampled, config.max_prefix_tokens)
    read = read_turns(tokenizer, openings, written, config.max_prompt_tokens)
    dropped: Counter[str] = Counter()
    kept = sift(read, tools.turn_filter, dropped)
    looked_at: Counter[str] = Counter()
    # The shares are of all turns of the batch, those of the sources included.
    total = len(kept) / (1 - sum(top_up.share for top_up in tools.top_ups))
    for top_up in tools.top_ups:
      count = round(total * top_up.share)
      kept += top_up_turns(part, tools, top_up, count, dropped, looked_at)
    rng = np.random.default_rng([config.seed, part.index, batch, 2])
    kept = [kept[i] for i in rng.permutation(len(kept))]
    turns += kept
    part.ledger.append(
      "turns",
      [vars(turn) for turn in kept],
      kept=len(kept),
      sampled_tokens=num_sampled,
      dropped=dropped,
      kinds=Counter(turn.kind for turn in kept),
      looked_at=looked_at,
    )
    tools.show("turns", len(turns), wanted)


def sift(
  turns: Iterable[tuple[Turn, str]],
  turn_filter: TurnFilter,
  dropped: Counter[str],
) -> list[Turn]:
  """The turns that are kept; counts why others are not."""
  kept = []
  for turn, reason in turns:
    reason = reason or turn_filter.reject(turn.text)
    if reason:
      dropped[reason] += 1
    else:
      kept.append(turn)
  return kept


def top_up_turns(
  part: Part,
  tools: Tools,
  top_up: TopUp,
  wanted: int,
  dropped: Counter[str],
  looked_at: Counter[str],
) -> list[Turn]:
  """Turns of one source for a batch, each prompt of which is used once.

  Args:
    part: which file; it decides the order of the prompts.
    tools: the tokenizer, lengths and filter.
    top_up: the source.
    wanted: turns at most.
    dropped: counts why prompts are dropped; added to.
    looked_at: counts prompts by source; added to.
  """
  config, name = tools.config, top_up.name
  seed = [config.seed, part.index, *name.encode()]
  order = np.random.default_rng(seed).permutation(len(top_up.prompts))
  start = part.ledger.turns["looked_at"].get(name, 0)
  kept: list[Turn] = []
  while len(kept) < wanted and start < len(order):
    chosen = order[start : start + wanted - len(kept)].tolist()
    candidates = [
      (Turn(text=top_up.prompts[i].strip(), kind=name), "") for i in chosen
    ]
    kept += sift(
      measure(tools.tokenizer, candidates, config.max_prompt_tokens),
      tools.turn_filter,
      dropped,
    )
    start += len(chosen)
    looked_at[name] += len(chosen)
  return kept


def write_answers(
  part: Part, tools: Tools, turns: Sequence[Turn], batches: int
) -> None:
  """Step B: answers the turns, up to `batches` whole batches."""
  config, tokenizer = tools.config, tools.tokenizer
  size, answers = config.batch_size, part.ledger.answers
  planned = math.ceil(part.num_records / size)

  def prepare(batch: int):
    chosen = batch_of_window(turns, batch, planned, config)
    temperature = answer_temperature(part, batch, config)
    prompts = tokenizer.encode_prompts([turn.prompt for turn in chosen])
    max_prefix = static_length(prompts, config)
    write = tools.writer.prepare(
      prompts,
      part.first_id(1, batch, size),
      max_prefix=max_prefix,
      max_new=config.max_answer_tokens,
      temperature=temperature,
    )
    return (chosen, prompts, temperature, max_prefix), write

  def another(running: int) -> bool:
    enough = answers["records"] + running * size >= part.num_records
    return not enough and answers["batches"] + running < batches

  clock = Clock(part.ledger, "answers")
  for (chosen, prompts, temperature, max_prefix), written in one_ahead(
    prepare, answers["batches"], another
  ):
    num_sampled = int(written.lengths.sum())
    clock.lap(num_sampled, max_prefix)
    records, dropped = make_records(
      tokenizer, chosen, prompts, written, temperature, config.min_answer_tokens
    )
    records = records[: part.num_records - answers["records"]]
    part.ledger.append(
      "answers",
      records,
      records=len(records),
      tokens=sum(len(record["tokens"]) for record in records),
      prompt_tokens=sum(len(record["prompt_tokens"]) for record in records),
      sampled_tokens=num_sampled,
      dropped=dropped,
      temperatures=Counter({f"{temperature:.1f}": len(records)}),
      prompt_lengths=histogram(len(r["prompt_tokens"]) for r in records),
      answer_lengths=histogram(len(r["tokens"]) for r in records),
    )
    tools.show("answers", answers["records"], part.num_records)


def histogram(lengths: Iterable[int]) -> Counter[str]:
  """How many lengths lie in each range of 16."""
  starts = (length // 16 * 16 for length in lengths)
  return Counter(f"{start:03}-{start + 15:03}" for start in starts)


def batch_of_window(
  turns: Sequence[Turn], batch: int, planned: int, config: CorpusConfig
) -> list[Turn]:
  """The turns that a batch answers: neighbours in length, of its window.

  A window is `sort_window` batches of turns in the order they were written.
  The batches beyond those planned make up for dropped answers, and are
  windows of their own.

  Args:
    turns: all so far, the whole window among them.
    batch: the batch's number.
    planned: batches that are enough if no answer is dropped.
    config: sizes.

  Returns:
    `batch_size` turns in the order they were written.
  """
  size, window = config.batch_size, config.sort_window
  first, last = batch, batch + 1
  if batch < planned:
    first = batch // window * window
    last = min(first + window, planned)
  lengths = [turn.prompt_length for turn in turns[first * size : last * size]]
  rank = (batch - first) * size
  chosen = np.argsort(lengths, kind="stable")[rank : rank + size]
  return [turns[first * size + i] for i in sorted(chosen.tolist())]


def static_length(
  prompts: Sequence[Sequence[int]], config: CorpusConfig
) -> int:
  """The smallest of a few lengths that holds all prompts."""
  needed, longest = max(map(len, prompts)), config.max_prompt_tokens
  shorter = (n for n in config.prompt_lengths if needed <= n)
  return min((longest, *shorter))


def answer_temperature(part: Part, batch: int, config: CorpusConfig) -> float:
  """0 for every other batch; else drawn from `ANSWER_TEMPERATURES`."""
  # Windows begin in turn with a greedy batch, lest length decide it.
  window, rank = divmod(batch, config.sort_window)
  if part.greedy_only or (window + rank) % 2 == 0:
    return 0.0
  rng = np.random.default_rng([config.seed, part.index, batch, 1])
  return round(float(rng.uniform(*ANSWER_TEMPERATURES)), 3)


def make_records(
  tokenizer: Any,
  turns: Sequence[Turn],
  prompts: Sequence[list[int]],
  written: Written,
  temperature: float,
  min_tokens: int,
) -> tuple[list[dict[str, Any]], Counter[str]]:
  """Lines of the corpus, without those too short; ids as they were sampled."""
  kept = cut_periodic_tails(written.tokens, written.lengths)
  rows = Written(written.tokens, kept).rows()
  records = []
  for turn, prompt, answer in zip(turns, prompts, rows, strict=True):
    if len(answer) < min_tokens:
      continue
    shown = answer[:-1] if answer[-1] in tokenizer.stop_ids else answer
    record = {
      "messages": [
        {"role": "user", "content": turn.prompt},
        {"role": "assistant", "content": tokenizer.decode(shown)},
      ],
      "prompt_tokens": prompt,
      "tokens": answer,
      "temperature": temperature,
      "kind": turn.kind,
    }
    records.append(record)
  return records, Counter(short=len(rows) - len(records))


class Clock:
  """Times a step's batches, but none that waited for a compilation."""

  def __init__(self, ledger: Ledger, step: str):
    self._ledger, self._step = ledger, step
    self._shapes: set[int] = set()
    self._last = time.monotonic()

  def lap(self, num_tokens: int, shape: int) -> None:
    """Notes that a batch of a static shape is done."""
    now = time.monotonic()
    if shape in self._shapes:
      self._ledger.time(self._step, num_tokens, now - self._last)
    self._shapes.add(shape)
    self._last = now

"""What is told about answers: records, trace, closing line, comparison."""

import contextlib
import json
import math
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
from rich.console import Console
from rich.table import Table
from rich.text import Text

from d2sd_jax import __version__
from d2sd_jax.decoding.answers import Answer, Request
from d2sd_jax.decoding.plan import Plan
from d2sd_jax.decoding.policies import POLICIES
from d2sd_jax.decoding.session import Session
from d2sd_jax.errors import UsageError
from d2sd_jax.evaluation import (
  TIE_MARGIN,
  acceptance_length,
  first_difference,
)
from d2sd_jax.io.paths import atomic_write
from d2sd_jax.io.tokenizer import ChatTokenizer
from d2sd_jax.progress import progress_bar
from d2sd_jax.tree import (
  ANCHOR,
  FIRST_DRAFT,
  LOOKUP,
  RE_DRAFT,
  SAMPLE,
  THIRD_DRAFT,
)

# Of a token's origin: what it is called, and how it looks on a terminal.
_ORIGINS: Mapping[int, tuple[str, str]] = {
  ANCHOR: ("target", "bold"),
  FIRST_DRAFT: ("first draft", "green"),
  RE_DRAFT: ("re-draft", "magenta"),
  LOOKUP: ("lookup", "green"),
  SAMPLE: ("sample", "magenta"),
  THIRD_DRAFT: ("third draft", "yellow"),
}


class _Output(Console):
  """Standard output, whose reader may go away."""

  def on_broken_pipe(self) -> None:
    """Lets `cli.run` hear of it, where rich would end the process."""
    raise BrokenPipeError


def console() -> Console:
  """Standard output: colour on a terminal, no markup, lines left whole."""
  return _Output(highlight=False, markup=False, soft_wrap=True)


def answer_text(tokenizer: ChatTokenizer, tokens: Sequence[int]) -> str:
  """Text of an answer, without the stop id that ended it."""
  return tokenizer.decode(without_stop(tokenizer, tokens))


def without_stop(
  tokenizer: ChatTokenizer, tokens: Sequence[int]
) -> Sequence[int]:
  """The ids less a stop id at the end; all others stay."""
  stopped = len(tokens) > 0 and tokens[-1] in tokenizer.stop_ids
  return tokens[:-1] if stopped else tokens


def make_record(
  answer: Answer, plan: Plan, tokenizer: ChatTokenizer
) -> dict[str, Any]:
  """The object of the JSON file; sizes are those the mode really used.

  `acceptance_length` is null where one token was all there was.
  """
  mode, config = answer.mode, plan.config
  tree = plan.trees[mode]
  policy = POLICIES[mode]
  tokens, accepted = answer.tokens, answer.accepted_per_cycle
  seconds = answer.decode_seconds
  return {
    "mode": mode,
    "requested_mode": config.mode,
    "prompt_tokens": list(answer.request.tokens),
    "tokens": tokens,
    "text": answer_text(tokenizer, tokens),
    "cycles": len(accepted),
    "acceptance_length": sum(accepted) / len(accepted) if accepted else None,
    "accepted_per_cycle": accepted,
    "prefill_seconds": answer.prefill_seconds,
    "decode_seconds": seconds,
    "tokens_per_second": (len(tokens) - 1) / seconds if seconds else 0.0,
    "block_size": min(tree.block_size, policy.max_path(tree)),
    "num_branches": tree.num_branches,
    "node_budget": policy.num_nodes(tree),
    "temperature": config.temperature,
    "seed": config.seed,
    "dtype": config.dtype,
    "drafter_weights": config.drafter_weights,
    "implementation": answer.implementation,
    "target": config.target,
    "device": jax.devices()[0].device_kind,
    "mesh": config.mesh,
    "shard_drafters": config.shard_drafters,
    "versions": versions(),
  }


def versions() -> dict[str, str]:
  """Versions of what the numbers depend on."""
  return {
    "python": platform.python_version(),
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "flax": flax.__version__,
    "d2sd_jax": __version__,
  }


def write_json(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
  """Writes the list as a whole or, when interrupted, not at all."""
  try:
    with atomic_write(path) as temporary:
      text = json.dumps(records, ensure_ascii=False, indent=1)
      # Of a path that is no UTF-8: JSON reads the escape back.
      raw = (text + "\n").encode("utf-8", "backslashreplace")
      temporary.write_bytes(raw)
  except OSError as error:
    raise UsageError(
      f"json={str(path)!r}: expected a file to write ({error.strerror})"
    ) from error


class Printer:
  """Runs sessions, and shows their answers as they come.

  Answers go to standard output. On a terminal a progress bar goes to standard
  error, where it would not get between the answers.
  """

  def __init__(
    self, tokenizer: ChatTokenizer, num_prompts: int, stream: bool, trace: bool
  ):
    """A printer; `stream` is for sessions of one row only.

    Args:
      tokenizer: the target's.
      num_prompts: answers to expect of a session.
      stream: print tokens as they are accepted.
      trace: print a line per cycle.
    """
    self._tokenizer, self._num_prompts = tokenizer, num_prompts
    self._stream, self._trace = stream, trace

  def decode_quietly(self, session: Session) -> list[Answer]:
    """All answers of a session, and nothing but a progress bar."""
    answers = []
    with self._progress(session.mode) as advance:
      for batch in session.batches():
        answers += session.decode(batch)
        advance(len(batch))
    return answers

  def decode_aloud(self, session: Session) -> list[Answer]:
    """All answers of a session, each printed as soon as it is there."""
    answers = []
    with self._progress(session.mode, sys.stdout.isatty()) as advance:
      for batch in session.batches():
        if self._stream:
          answers += [self._decode_streaming(session, batch[0])]
        else:
          done = session.decode(batch)
          for answer in done:
            self._print_answer(answer)
          answers += done
        advance(len(batch))
    return answers

  def _decode_streaming(self, session: Session, request: Request) -> Answer:
    self._print_heading(request)
    trace, text = Trace(self._tokenizer), self._tokenizer.stream()

    def step(tokens: list[int], origins: list[int]) -> None:
      if self._trace:
        trace.step(tokens, origins)
      else:
        emit(text.push(without_stop(self._tokenizer, tokens)))

    (answer,) = session.decode([request], step)
    if self._trace:
      emit("\n" + answer_text(self._tokenizer, answer.tokens) + "\n\n")
    else:
      emit(text.flush() + "\n\n")
    return answer

  def _print_answer(self, answer: Answer) -> None:
    self._print_heading(answer.request)
    if self._trace:
      self._replay(answer)
    emit(answer_text(self._tokenizer, answer.tokens) + "\n\n")

  def print_traces(self, answers: Iterable[Answer]) -> None:
    """Traces of answers that were decoded quietly, if traces are wanted."""
    for answer in answers if self._trace else ():
      number = answer.request.sequence_id + 1
      emit(f"\n{answer.mode}, prompt {number} of {self._num_prompts}\n")
      self._replay(answer)

  def _replay(self, answer: Answer) -> None:
    trace = Trace(self._tokenizer)
    for part in answer.steps:
      trace.step(answer.tokens[part], answer.origins[part])
    emit("\n")

  def _print_heading(self, request: Request) -> None:
    if self._num_prompts > 1:
      number = f"[{request.sequence_id + 1}/{self._num_prompts}]"
      console().print(Text(number, "dim"))

  @contextlib.contextmanager
  def _progress(
    self, mode: str, in_the_way: bool = False
  ) -> Iterator[Callable[[int], None]]:
    """Yields `advance(answers)`; draws on a terminal, for several prompts."""
    hidden = in_the_way or self._num_prompts == 1
    with progress_bar(
      hidden=hidden, transient=True, redirect_stdout=False
    ) as bar:
      task = bar.add_task(mode, total=self._num_prompts)
      yield lambda answers: bar.advance(task, answers)


class Trace:
  """Prints a line per cycle: which pass each of its tokens came from."""

  def __init__(self, tokenizer: ChatTokenizer):
    """A trace of one answer, before its first token."""
    self._tokenizer = tokenizer
    self._cycle = 0

  def step(self, tokens: Sequence[int], origins: Sequence[int]) -> None:
    """Takes the token of prefill at first, then those of every cycle."""
    name = f"cycle {self._cycle}" if self._cycle else "prefill"
    line = Text(f"{name:>9} +{len(tokens):<2}")
    for origin, run in _runs(tokens, origins):
      label, style = _ORIGINS[origin]
      text = json.dumps(self._tokenizer.decode(run), ensure_ascii=False)
      line.append(f" {label} ", "dim").append(text, style)
    console().print(line)
    sys.stdout.flush()
    self._cycle += 1


def emit(text: str) -> None:
  """Writes text to standard output at once."""
  sys.stdout.write(text)
  sys.stdout.flush()


def print_closing_line(answers: Sequence[Answer], plan: Plan) -> None:
  """Tokens, cycles, α and tokens/s of all the answers of one mode."""
  tokens = sum(len(a.tokens) for a in answers)
  cycles = sum(len(a.accepted_per_cycle) for a in answers)
  prefill = sum(a.prefill_seconds / a.batch_rows for a in answers)
  line = (
    f"{tokens} tokens, {cycles} cycles, acceptance length α"
    f" {_alpha(answers)}, {_speed(answers):.1f} tokens/s"
    f" ({plan.chosen or answers[0].mode}, prefill {prefill:.2f} s,"
    f" {plan.config.dtype} on {plan.devices})"
  )
  console().print(Text(line, "dim"))


def print_comparison(
  by_mode: Mapping[str, Sequence[Answer]],
  margins: Mapping[tuple[str, int], float],
  plan: Plan,
) -> None:
  """One table of all modes, and every first difference from `ar`.

  Args:
    by_mode: answers of each mode, in input order; `ar` is among them.
    margins: of `ar`'s choice where a mode differs first, by mode and index.
    plan: what was run.
  """
  table = Table()
  table.add_column("mode")
  for title in ("α", "α, tails cut", "tokens/s", "speed-up", "identical to ar"):
    table.add_column(title, justify="right")
  slowest = _speed(by_mode["ar"])
  for mode, answers in by_mode.items():
    differing = sum(m == mode for m, _ in margins)
    same, total = len(answers) - differing, len(answers)
    speed = _speed(answers)
    table.add_row(
      mode,
      _alpha(answers),
      _alpha(answers, cut_tails=True),
      f"{speed:.1f}",
      f"{speed / slowest:.2f}x" if slowest else "-",
      f"{'no' if differing else 'yes'} ({same} of {total})",
    )
  _Output(highlight=False).print(table)
  filtered = plan.config.top_k > 0 or plan.config.top_p < 1
  for (mode, index), margin in margins.items():
    where = first_difference(
      by_mode["ar"][index].tokens, by_mode[mode][index].tokens
    )
    note = "a tie" if margin < TIE_MARGIN else "not a tie"
    if filtered and margin >= TIE_MARGIN:
      note += " by scores; a token at the edge of top-k or top-p may be one"
    console().print(
      f"{mode}, prompt {index + 1}: token {where} differs from ar, whose two"
      f" best scores lie {margin:.2g} apart: {note}"
    )


def _rows(answers: Iterable[Answer]) -> list[dict[str, Any]]:
  return [
    {"tokens": a.tokens, "accepted_per_cycle": a.accepted_per_cycle}
    for a in answers
  ]


def _alpha(answers: Iterable[Answer], cut_tails: bool = False) -> str:
  """The acceptance length as it is shown: `-` where no cycle ran."""
  alpha = acceptance_length(_rows(answers), cut_tails)
  return "-" if math.isnan(alpha) else f"{alpha:.2f}"


def _speed(answers: Iterable[Answer]) -> float:
  """Tokens after the first per second of decoding; batches count once."""
  pairs = [
    (len(a.tokens) - 1, a.decode_seconds / a.batch_rows) for a in answers
  ]
  seconds = sum(s for _, s in pairs)
  return sum(n for n, _ in pairs) / seconds if seconds else 0.0


def _runs(
  tokens: Sequence[int], origins: Sequence[int]
) -> list[tuple[int, list[int]]]:
  """Neighbouring tokens of one origin, together."""
  runs: list[tuple[int, list[int]]] = []
  for token, origin in zip(tokens, origins, strict=True):
    if runs and runs[-1][0] == origin:
      runs[-1][1].append(token)
    else:
      runs.append((origin, [token]))
  return runs

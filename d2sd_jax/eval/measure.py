"""One row of the ladder: a policy's answers to one set, measured."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from d2sd_jax.config import TreeConfig
from d2sd_jax.decoding.answers import Answer, Request
from d2sd_jax.decoding.session import Session
from d2sd_jax.eval.results_file import finite, interval
from d2sd_jax.eval.tasks import Task, sha256
from d2sd_jax.evaluation import (
  TIE_MARGIN,
  acceptance_length,
  committed_and_cycles,
  first_difference,
)

# Decodes at batch 1 that are not timed, on a new program.
_WARM_UPS = 2
_PROMPT_STEP = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """A policy on a task.

  Attributes:
    tree: its static sizes.
    answers: in the order of the task's requests.
    ms_per_token: at batch 1; `None` where nothing was timed.
    calibration: of the first drafts; see `calibration.summarise`.
  """

  tree: TreeConfig
  answers: list[Answer]
  ms_per_token: float | None = None
  calibration: dict[str, Any] | None = None


def decode_all(
  session: Session, requests: Sequence[Request], batch_size: int
) -> list[Answer]:
  """Answers in order, decoded a batch at a time."""
  return [
    answer
    for batch in batches(requests, batch_size)
    for answer in session.decode(batch)
  ]


def batches(
  requests: Sequence[Request], size: int
) -> Iterator[Sequence[Request]]:
  """The requests, `size` at a time."""
  for i in range(0, len(requests), size):
    yield requests[i : i + size]


def prompt_size(requests: Sequence[Request]) -> int:
  """One static length that every prompt fits."""
  longest = max(len(request.tokens) for request in requests)
  return -(-longest // _PROMPT_STEP) * _PROMPT_STEP


def warm_up(session: Session, request: Request) -> None:
  """Decodes at batch 1 until the device has settled."""
  for _ in range(_WARM_UPS):
    session.decode([request])


def time_per_token(session: Session, requests: Sequence[Request]) -> float:
  """Milliseconds per token after the first, one request at a time.

  NaN where no answer has a second token.
  """
  answers = [session.decode([request])[0] for request in requests]
  seconds = sum(a.decode_seconds for a in answers)
  tokens = sum(len(a.tokens) - 1 for a in answers)
  return 1000 * seconds / tokens if tokens else float("nan")


def alpha(answers: Sequence[Answer], cut_tails: bool = False) -> float:
  """α of the answers; see `acceptance_length`."""
  return acceptance_length(_records(answers), cut_tails)


def acceptance(
  prompts: Sequence[int], answers: Sequence[Answer]
) -> dict[str, Any]:
  """What a row says of α, with periodic tails and, as `.._cut`, without.

  Args:
    prompts: of each answer, the number of the prompt it belongs to.
    answers: decoded.

  Returns:
    `alpha`, its interval `ci95`, and the `counts` both come from: tokens
    committed and cycles of each prompt.
  """
  found: dict[str, Any] = {}
  for suffix, cut_tails in (("", False), ("_cut", True)):
    counts = _counts(prompts, answers, cut_tails)
    found[f"alpha{suffix}"] = finite(alpha(answers, cut_tails))
    found[f"ci95{suffix}"] = interval([counts])
    found[f"counts{suffix}"] = counts
  return found


def make_row(
  task: Task,
  policy: str,
  temperature: float,
  dtype: str,
  measured: Measured,
  reference: Measured,
  margin: Callable[[Request, Sequence[int]], float],
) -> dict[str, Any]:
  """A row of the results file.

  Args:
    task: the set.
    policy: a key of `POLICIES`.
    temperature: of sampling; 0 is greedy.
    dtype: of all models.
    measured: the policy.
    reference: `ar`, in the same process.
    margin: how far the target's two best scores lie apart behind a request
      and some tokens of its answer; see `choice_margin`.

  Returns:
    What `results.ROW_KEYS` names and more: `ties` and `differences` are the
    first differences from `ar` within `TIE_MARGIN` and beyond,
    `accepted_lengths` how many cycles committed 0, 1, 2, .. tokens.
  """
  answers = measured.answers
  differences = list(_differences(task, answers, reference.answers, margin))
  ties = [d for d in differences if d["margin"] < TIE_MARGIN]
  own, plain = measured.ms_per_token, reference.ms_per_token
  return {
    "set": task.name,
    "policy": policy,
    "temperature": temperature,
    "dtype": dtype,
    **acceptance(task.prompts, answers),
    "nodes": finite(_nodes_per_cycle(answers)),
    "ms_per_token": None if own is None else finite(own),
    "speedup": finite(plain / own) if own and plain else None,
    "ties": ties,
    "differences": [d for d in differences if d["margin"] >= TIE_MARGIN],
    "identical": not differences,
    "tokens": sum(len(a.tokens) for a in answers),
    "cycles": sum(len(a.accepted_per_cycle) for a in answers),
    "accepted_lengths": _length_counts(answers),
    "block_size": measured.tree.block_size,
    "inputs_sha256": sha256(str([r.tokens for r in task.requests])),
    **({"calibration": measured.calibration} if measured.calibration else {}),
  }


def _records(answers: Sequence[Answer]) -> list[dict[str, Any]]:
  return [
    {"tokens": a.tokens, "accepted_per_cycle": a.accepted_per_cycle}
    for a in answers
  ]


def _counts(
  prompts: Sequence[int], answers: Sequence[Answer], cut_tails: bool
) -> list[list[int]]:
  """Tokens committed and cycles of each prompt, its turns together."""
  counts = np.zeros((max(prompts) + 1, 2), int)
  for prompt, record in zip(prompts, _records(answers), strict=True):
    counts[prompt] += committed_and_cycles(record, cut_tails)
  return counts.tolist()


def _nodes_per_cycle(answers: Sequence[Answer]) -> float:
  cycles = sum(len(a.accepted_per_cycle) for a in answers)
  nodes = sum(a.num_verified for a in answers)
  return nodes / cycles if cycles else float("nan")


def _length_counts(answers: Sequence[Answer]) -> list[int]:
  """How many cycles committed 0, 1, 2, .. tokens."""
  lengths = [n for a in answers for n in a.accepted_per_cycle]
  return np.bincount(np.asarray(lengths, int)).tolist()


def _differences(
  task: Task,
  answers: Sequence[Answer],
  reference: Sequence[Answer],
  margin: Callable[[Request, Sequence[int]], float],
) -> Iterator[Mapping[str, Any]]:
  """Every first difference: which answer, which token, how sure `ar` was."""
  for name, mine, plain in zip(task.ids, answers, reference, strict=True):
    where = first_difference(plain.tokens, mine.tokens)
    if where is not None:
      # An infinite margin, where filters leave one token, is none in JSON.
      gap = min(margin(plain.request, plain.tokens[:where]), 1e9)
      yield {"id": name, "token": where, "margin": round(gap, 7)}

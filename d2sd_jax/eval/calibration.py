"""How well the first draft knows where it fails: Eq. 3-4 against the target.

Driven from outside the decode loop, cycle by cycle: the very cycles that a
mode runs, with what drafter 1 said at the beginning of each.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sd_jax.boundary import boundary_posterior
from d2sd_jax.config import TreeConfig
from d2sd_jax.decoding.answers import Request
from d2sd_jax.decoding.cycle import decode_cycle
from d2sd_jax.decoding.policies import POLICIES, draft_block
from d2sd_jax.decoding.session import Session
from d2sd_jax.decoding.state import DecodeState, Models
from d2sd_jax.sampling import Sampling

NUM_BINS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """One first draft and what became of it.

  Attributes:
    confidence: `c_1..c_{γ-1}` (Eq. 3).
    accepted: leading drafted tokens that the target chose as well.
    seen: leading tokens the target has chosen at all: where the answer ended
      early, nothing is known of the others.
  """

  confidence: np.ndarray
  accepted: int
  seen: int


def observe_drafts(
  session: Session, requests: Sequence[Request]
) -> list[Outcome]:
  """Decodes one batch, and looks at the first draft of every cycle.

  Args:
    session: of a mode with drafters.
    requests: as for `Session.decode`.

  Returns:
    An outcome for each cycle of each request.
  """
  state, _ = session.start(requests)
  cycles = []
  while not bool(state.finished.all()):
    state, seen = _observed_cycle(
      session.models,
      state,
      session.sampling,
      mode=session.mode,
      config=session.tree,
    )
    cycles.append(jax.device_get(seen))
  tokens, ends = jax.device_get((state.tokens, state.lengths))
  return [
    _outcome(
      draft[row, 1:], confidence[row], tokens[row, n + 1 : ends[row] + 1]
    )
    for draft, confidence, lengths, finished in cycles
    for row, n in enumerate(lengths[: len(requests)])
    if not finished[row]
  ]


@functools.partial(
  jax.jit, static_argnames=("mode", "config"), donate_argnames="state"
)
def _observed_cycle(
  models: Models,
  state: DecodeState,
  sampling: Sampling,
  *,
  mode: str,
  config: TreeConfig,
) -> tuple[DecodeState, tuple[jax.Array, ...]]:
  """A cycle, and its first draft, confidence, start and idle rows."""
  seen = (*draft_block(models, state, config), state.lengths, state.finished)
  policy = POLICIES[mode]
  after = decode_cycle(models, state, sampling, policy=policy, config=config)
  return after, seen


def _outcome(
  drafted: np.ndarray, confidence: np.ndarray, chosen: np.ndarray
) -> Outcome:
  """A draft beside all that the target went on to choose."""
  chosen = chosen[: len(drafted)]
  differs = np.flatnonzero(drafted[: len(chosen)] != chosen)
  return Outcome(
    confidence=confidence,
    accepted=int(differs[0]) if differs.size else len(chosen),
    seen=len(chosen),
  )


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
  """Counts that a picture or a sum over sets can be made from.

  Returns:
    `confidence`: `count`, `accepted` and `sum` of c_k, by bin of c_k, over
      slots whose earlier slots were all accepted.
    `boundary`, over drafts whose end is known: `expected`, the summed
      posterior r(i) (Eq. 4) and the mass of "all accepted"; `observed`, how
      often exactly i tokens were accepted; `rank`, how often the true place of
      failure was the posterior's first choice, its second, and so on.
  """
  return {
    "confidence": _by_confidence(outcomes),
    "boundary": _by_boundary(outcomes),
  }


def calibration_error(summaries: Iterable[dict[str, Any]]) -> float:
  """Expected calibration error of c_k over `NUM_BINS` bins, summed up first.

  The mean distance between a bin's mean confidence and its share of accepted
  tokens, weighted with its slots; NaN without any.
  """
  bins = [s["confidence"] for s in summaries]
  total = lambda key: np.sum([b[key] for b in bins], axis=0)
  slots = np.sum(total("count"))
  if not slots:
    return float("nan")
  return float(np.abs(total("sum") - total("accepted")).sum() / slots)


def _by_confidence(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
  # The slot that was rejected is the last one that counts.
  slots = [min(o.accepted + 1, o.seen) for o in outcomes]
  both = zip(outcomes, slots, strict=True)
  c = np.concatenate([np.zeros(0), *(o.confidence[:n] for o, n in both)])
  both = zip(outcomes, slots, strict=True)
  ok = np.array([i < o.accepted for o, n in both for i in range(n)], bool)
  bins = np.minimum((c * NUM_BINS).astype(int), NUM_BINS - 1)
  count = lambda weights: np.bincount(bins, weights, NUM_BINS)
  return {
    "count": count(None).tolist(),
    "sum": np.round(count(c), 4).tolist(),
    "accepted": count(ok).astype(int).tolist(),
  }


def _by_boundary(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
  ended = [
    o for o in outcomes if o.accepted < o.seen or o.seen == len(o.confidence)
  ]
  if not ended:
    return {"expected": [], "observed": [], "rank": []}
  confidence = np.stack([o.confidence for o in ended])
  accepted = np.array([o.accepted for o in ended])
  slots = confidence.shape[1]
  posterior = np.asarray(boundary_posterior(jnp.asarray(confidence)))
  everything = np.append(posterior.sum(0), confidence.prod(1).sum())
  failed = accepted < slots
  order = np.argsort(-posterior[failed], axis=1, kind="stable")
  rank = np.argmax(order == accepted[failed, None], axis=1)
  return {
    "expected": np.round(everything, 4).tolist(),
    "observed": np.bincount(accepted, minlength=slots + 1).tolist(),
    "rank": np.bincount(rank, minlength=slots).tolist(),
  }

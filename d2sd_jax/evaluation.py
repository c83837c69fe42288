"""What is measured on decoded answers: α, first differences, ties."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from d2sd_jax.decoding.placement import WHOLE, put, spread, weight_specs
from d2sd_jax.models.target import Target
from d2sd_jax.sampling import Sampling, sampling_scores
from d2sd_jax.tensor_parallel import two_best
from d2sd_jax.typing import Array, Float, Int

MIN_TAIL = 24
TIE_MARGIN = 1e-3


def cut_periodic_tail(tokens: Sequence[int]) -> list[int]:
  """The tokens without their longest repeating tail; see below."""
  row = np.asarray(tokens, np.int64).reshape(1, -1)
  (kept,) = cut_periodic_tails(row, np.array([len(tokens)]))
  return list(tokens[:kept])


def cut_periodic_tails(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """How many first tokens of each row do not belong to a repeating tail.

  If the last m tokens satisfy x[j] = x[j-p] for some period p, with m >= 2p
  and m >= 24, those m tokens are dropped; what they repeat is kept. Of all
  such tails the longest counts.

  Args:
    tokens: [B, T] integers, padded on the right with anything.
    lengths: [B], tokens of each row.

  Returns:
    [B], at most `lengths`.
  """
  tokens, size = tokens.astype(np.int64), tokens.shape[1]
  # Rows run backwards here, and -1, which equals no token, ends them.
  place = lengths[:, None] - 1 - np.arange(size + max(size // 3, MIN_TAIL))
  backwards = np.take_along_axis(tokens, place.clip(0), 1) if size else place
  backwards = np.where(place < 0, -1, backwards.astype(np.int64))
  longest = np.zeros_like(lengths)
  for period in range(1, size // 3 + 1):
    # Few rows pass this, so the exact count is made for those only.
    last = slice(period, period + MIN_TAIL)
    same = backwards[:, :MIN_TAIL] == backwards[:, last]
    rows = np.flatnonzero(same.all(1))
    shifted = backwards[rows, period : period + size]
    repeated = (backwards[rows, :size] == shifted).argmin(1)
    repeated[repeated < max(2 * period, MIN_TAIL)] = 0
    longest[rows] = np.maximum(longest[rows], repeated)
  return lengths - longest


def acceptance_length(
  rows: Iterable[Mapping[str, Any]], cut_tails: bool = False
) -> float:
  """α: tokens committed by cycles / cycles, summed over a set of answers.

  Args:
    rows: records of `decode.py`; `tokens` and `accepted_per_cycle` are read.
    cut_tails: leave out periodic tails, and the cycles that begin in them. A
      cycle begins at the first token it commits.

  Returns:
    The acceptance length; NaN where there was no cycle.
  """
  counts = [committed_and_cycles(row, cut_tails) for row in rows]
  cycles = sum(n for _, n in counts)
  return sum(m for m, _ in counts) / cycles if cycles else float("nan")


def committed_and_cycles(
  row: Mapping[str, Any], cut_tails: bool = False
) -> tuple[int, int]:
  """Tokens that cycles committed to one answer, and the cycles.

  Args:
    row: as in `acceptance_length`.
    cut_tails: as in `acceptance_length`.
  """
  accepted = np.asarray(row["accepted_per_cycle"], int)
  tokens = row["tokens"]
  kept = len(cut_periodic_tail(tokens) if cut_tails else tokens)
  # The first token is prefill's: cycle 0 begins at token 1.
  begins = 1 + np.cumsum(accepted) - accepted
  accepted = np.minimum(accepted, kept - begins)[begins < kept]
  return int(accepted.sum()), len(accepted)


def bootstrap_interval(
  sets: Sequence[Sequence[Sequence[int]]],
  num_samples: int = 10_000,
  seed: int = 0,
) -> tuple[float, float]:
  """95 % interval of mean α, the prompts of every set drawn with replacement.

  Args:
    sets: for each set, tokens committed and cycles of each of its prompts.
    num_samples: draws of as many prompts as there are.
    seed: of the draws.

  Returns:
    The 2.5 and 97.5 % quantiles of the unweighted mean over sets; NaN where a
    set has no cycle.
  """
  rng = np.random.default_rng(seed)
  total = np.zeros(num_samples)
  for counts in sets:
    total += _alphas(counts, _draw(rng, counts, num_samples))
  return _middle(total / len(sets))


def paired_interval(
  counts: Sequence[Sequence[int]],
  baseline: Sequence[Sequence[int]],
  num_samples: int = 10_000,
  seed: int = 0,
) -> tuple[float, float]:
  """95 % interval of a difference of α, the same prompts drawn for both.

  What makes one prompt easier than another is then no part of the doubt.

  Args:
    counts: tokens committed and cycles of each prompt.
    baseline: the same of what it is compared with, prompt by prompt.
    num_samples: draws of as many prompts as there are.
    seed: of the draws.

  Returns:
    The 2.5 and 97.5 % quantiles; NaN where one of them has no cycle.
  """
  drawn = _draw(np.random.default_rng(seed), counts, num_samples)
  return _middle(_alphas(counts, drawn) - _alphas(baseline, drawn))


def _draw(rng, counts, num_samples: int) -> np.ndarray:
  """Numbers of prompts, with replacement: [samples, prompts]."""
  return rng.integers(0, len(counts), (num_samples, len(counts)))


def _alphas(counts: Sequence[Sequence[int]], drawn: np.ndarray) -> np.ndarray:
  """α of every draw; NaN for one of nothing but prompts without a cycle."""
  committed, cycles = np.asarray(counts)[drawn].sum(axis=1).T
  alphas = np.full(len(drawn), np.nan)
  return np.divide(committed, cycles, out=alphas, where=cycles > 0)


def _middle(values: np.ndarray) -> tuple[float, float]:
  """The 2.5 and 97.5 % quantiles of what is not NaN."""
  known = values[~np.isnan(values)]
  if not known.size:
    return float("nan"), float("nan")
  low, high = np.quantile(known, [0.025, 0.975])
  return float(low), float(high)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
  """Index of the first token that differs, an end included; else `None`."""
  for i, (x, y) in enumerate(zip(a, b, strict=False)):
    if x != y:
      return i
  return None if len(a) == len(b) else min(len(a), len(b))


def choice_margin(
  target: Target,
  tokens: Sequence[int],
  sequence_id: int,
  sampling: Sampling,
  pad_to: int | None = None,
  mesh: Mesh | None = None,
) -> float:
  """How far the target's two best scores for the next token lie apart.

  The scores are what the choice is the argmax of: logits at temperature 0,
  else tempered and filtered logits with their noise. Where two ways of
  decoding differ first, a margin below `TIE_MARGIN` makes it a tie.

  Args:
    target: the target.
    tokens: the prompt and the answer up to the place in question.
    sequence_id: the prompt's index in the input.
    sampling: how tokens are chosen.
    pad_to: length to pad to, so that many places share a program.
    mesh: the devices that the target lies on; `None` is one.

  Returns:
    The margin; infinite where the filters leave one token only.
  """
  size = max(pad_to or 0, len(tokens))
  padded = np.zeros((1, size), np.int32)
  padded[0, : len(tokens)] = tokens
  lengths = np.array([len(tokens)], np.int32)
  ids = np.array([sequence_id], np.int32)
  arguments = (padded, lengths, ids, sampling)
  whole = jax.tree.map(lambda _: WHOLE, arguments)
  return float(_margin(target, *put(mesh, arguments, whole), mesh=mesh))


@functools.partial(jax.jit, static_argnames="mesh")
def _margin(
  target: Any,
  tokens: Int[Array, "1 T"],
  lengths: Int[Array, " 1"],
  sequence_ids: Int[Array, " 1"],
  sampling: Sampling,
  *,
  mesh: Mesh | None,
) -> Float[Array, ""]:
  axis = getattr(target, "axis", None)

  def margin(target, tokens, lengths, sequence_ids, sampling):
    logits = target.prefill(tokens, lengths, ()).logits[:, None]
    scores = jax.lax.cond(
      sampling.temperature > 0,
      lambda x: sampling_scores(
        x, lengths[:, None], sequence_ids, sampling, axis
      ),
      lambda x: x,
      logits.astype(jnp.float32),
    )
    best, second = two_best(scores[0, 0], axis)
    return best - second

  specs = (weight_specs(target), WHOLE, WHOLE, WHOLE, WHOLE)
  everywhere = spread(margin, mesh, specs, WHOLE)
  return everywhere(target, tokens, lengths, sequence_ids, sampling)

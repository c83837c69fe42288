"""What is measured on decoded answers: α, first differences, ties."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sd_jax.models.target import Target
from d2sd_jax.sampling import Sampling, sampling_scores
from d2sd_jax.typing import Array, Float, Int

MIN_TAIL = 24
TIE_MARGIN = 1e-3


def cut_periodic_tail(tokens: Sequence[int]) -> list[int]:
  """The tokens without their longest repeating tail.

  If the last m tokens satisfy x[j] = x[j-p] for some period p, with m >= 2p
  and m >= 24, those m tokens are dropped; what they repeat is kept.

  Args:
    tokens: an answer.

  Returns:
    As many of its first tokens as do not repeat.
  """
  x = np.asarray(tokens)
  longest = 0
  for period in range(1, len(x) // 3 + 1):
    differs = np.flatnonzero(x[period:] != x[:-period])
    repeated = len(x) - period - (differs[-1] + 1 if differs.size else 0)
    if repeated >= max(2 * period, MIN_TAIL):
      longest = max(longest, int(repeated))
  return list(tokens[: len(x) - longest])


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
  committed = cycles = 0
  for row in rows:
    accepted = np.asarray(row["accepted_per_cycle"], int)
    tokens = row["tokens"]
    kept = len(cut_periodic_tail(tokens) if cut_tails else tokens)
    # The first token is prefill's: cycle 0 begins at token 1.
    begins = 1 + np.cumsum(accepted) - accepted
    accepted = np.minimum(accepted, kept - begins)[begins < kept]
    committed += int(accepted.sum())
    cycles += len(accepted)
  return committed / cycles if cycles else float("nan")


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

  Returns:
    The margin; infinite where the filters leave one token only.
  """
  size = max(pad_to or 0, len(tokens))
  padded = np.zeros((1, size), np.int32)
  padded[0, : len(tokens)] = tokens
  margin = _margin(
    target,
    jnp.asarray(padded),
    jnp.asarray([len(tokens)], jnp.int32),
    jnp.asarray([sequence_id], jnp.int32),
    sampling,
  )
  return float(margin)


@jax.jit
def _margin(
  target: Any,
  tokens: Int[Array, "1 T"],
  lengths: Int[Array, " 1"],
  sequence_ids: Int[Array, " 1"],
  sampling: Sampling,
) -> Float[Array, ""]:
  logits = target.prefill(tokens, lengths, ()).logits[:, None]
  scores = jax.lax.cond(
    sampling.temperature > 0,
    lambda x: sampling_scores(x, lengths[:, None], sequence_ids, sampling),
    lambda x: x,
    logits.astype(jnp.float32),
  )
  best, second = jax.lax.top_k(scores[0, 0], 2)[0]
  return best - second

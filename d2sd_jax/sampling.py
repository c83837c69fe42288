"""Choosing tokens: temperature, top-k, top-p and position-keyed noise."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from d2sd_jax.tensor_parallel import (
  best_token,
  largest_score,
  sum_parts,
  token_ids,
)
from d2sd_jax.typing import Array, Bool, Float, Int

# Where the target folds in a sequence's index, which is below this.
_DRAFT_STREAM = 2**31


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How tokens are chosen; traced scalars, so no value compiles again.

  Attributes:
    temperature: float32; 0 is greedy.
    top_k: int32; keep the k likeliest tokens, 0 keeps all.
    top_p: float32; keep the likeliest tokens that together reach this mass,
      1 keeps all.
    seed: uint32.
  """

  temperature: Float[Array, ""]
  top_k: Int[Array, ""]
  top_p: Float[Array, ""]
  seed: Int[Array, ""]

  @classmethod
  def create(
    cls,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
  ) -> "Sampling":
    """Python numbers as the arrays of the pytree."""
    return cls(
      temperature=jnp.float32(temperature),
      top_k=jnp.int32(top_k),
      top_p=jnp.float32(top_p),
      seed=jnp.uint32(seed),
    )


def sample(
  logits: Float[Array, "B R V"],
  positions: Int[Array, "B R"],
  sequence_ids: Int[Array, " B"],
  sampling: Sampling,
  axis: str | None = None,
) -> Int[Array, "B R"]:
  """`argmax(logits / T + Gumbel(seed, sequence, position))`, or the argmax.

  The filters come in the order temperature, top-k, top-p. At temperature 0
  neither noise nor filters are computed.

  Args:
    logits: any float dtype; the choice is made in float32.
    positions: position of the token to be chosen, padding not counted.
    sequence_ids: index of each row's prompt in the input.
    sampling: how to choose.
    axis: of a mesh, over whose devices the vocabulary is split.

  Returns:
    int32 token ids.
  """
  logits = logits.astype(jnp.float32)

  def noisy(logits):
    scores = sampling_scores(logits, positions, sequence_ids, sampling, axis)
    return best_token(scores, axis)

  greedy = lambda logits: best_token(logits, axis)
  return jax.lax.cond(sampling.temperature > 0, noisy, greedy, logits)


def sampling_scores(
  logits: Float[Array, "B R V"],
  positions: Int[Array, "B R"],
  sequence_ids: Int[Array, " B"],
  sampling: Sampling,
  axis: str | None = None,
) -> Float[Array, "B R V"]:
  """What `sample` takes the argmax of at a temperature above 0; see there."""
  # Measured from the largest, so that no temperature overflows.
  logits = logits - largest_score(logits, axis)[..., None]
  logits = logits / sampling.temperature
  filtered = (sampling.top_k > 0) | (sampling.top_p < 1)
  logits = jax.lax.cond(
    filtered,
    lambda x: filter_logits(x, sampling.top_k, sampling.top_p, axis),
    lambda x: x,
    logits,
  )
  noise = position_noise(
    sampling.seed, sequence_ids, positions, logits.shape[-1], axis
  )
  return logits + noise


def position_noise(
  seed: Int[Array, ""],
  sequence_ids: Int[Array, " B"],
  positions: Int[Array, "B R"],
  width: int,
  axis: str | None = None,
) -> Float[Array, "B R V"]:
  """Gumbel noise that depends on (seed, sequence, position, token id) only.

  Args:
    seed: of the run.
    sequence_ids: index of each row's prompt in the input.
    positions: of the tokens to be chosen.
    width: V, ids of this device.
    axis: of a mesh, over whose devices the vocabulary is split.
  """

  def at(sequence_id, position):
    key = jax.random.fold_in(jax.random.key(seed), sequence_id)
    return _noise_of_tokens(jax.random.fold_in(key, position), width, axis)

  over_nodes = jax.vmap(at, in_axes=(None, 0))
  return jax.vmap(over_nodes)(sequence_ids, positions)


def _noise_of_tokens(key, width, axis):
  """Gumbel noise of this device's ids, one key's: `jax.random.gumbel`'s.

  The bits of an element are those of a key that its index is folded into. So
  noise of an id is the same however many devices share the vocabulary, and
  none makes that of others.
  """
  if axis is None:
    return jax.random.gumbel(key, (width,), jnp.float32)
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  words = jax.random.key_data(fold(key, token_ids(width, axis)))
  return _gumbel(words[:, 0] ^ words[:, 1])


def _gumbel(bits: Int[Array, "*n"]) -> Float[Array, "*n"]:
  """Gumbel noise of uint32 bits, made as in `jax.random.gumbel`."""
  one = jnp.uint32(0x3F800000)
  # The highest 23 bits are the mantissa of a number in [1, 2).
  number = jax.lax.bitcast_convert_type((bits >> 9) | one, jnp.float32)
  uniform = jnp.maximum(number - 1, jnp.finfo(jnp.float32).tiny)
  return -jnp.log(-jnp.log(uniform))


def draft_key(seed: Int[Array, ""]) -> Int[Array, " words"]:
  """Key data for drafts that are drawn, apart from all noise of the target's.

  The words of the key, uint32: state fields are plain arrays.
  """
  key = jax.random.fold_in(jax.random.key(seed), _DRAFT_STREAM)
  return jax.random.key_data(key)


def draft_samples(
  logits: Float[Array, "B slots V"],
  positions: Int[Array, "B slots"],
  sequence_ids: Int[Array, " B"],
  key_data: Int[Array, " words"],
  count: int,
  axis: str | None = None,
) -> Int[Array, "B count slots"]:
  """Independent draws from a drafter's marginals at temperature 1.

  A draw depends on (seed, sequence, position, its number) and on no batch.

  Args:
    logits: a drafter's, of each slot.
    positions: of each slot in its sequence.
    sequence_ids: index of each row's prompt in the input.
    key_data: see `draft_key`.
    count: draws of every slot.
    axis: of a mesh, over whose devices the vocabulary is split.

  Returns:
    int32 token ids.
  """

  key = jax.random.wrap_key_data(key_data)
  width = logits.shape[-1]

  def at(sequence_id, position, draw):
    own = jax.random.fold_in(jax.random.fold_in(key, sequence_id), position)
    return _noise_of_tokens(jax.random.fold_in(own, draw), width, axis)

  over_slots = jax.vmap(at, in_axes=(None, 0, None))
  over_draws = jax.vmap(over_slots, in_axes=(None, None, 0))
  noise = jax.vmap(over_draws, in_axes=(0, 0, None))(
    sequence_ids, positions, jnp.arange(count)
  )
  return best_token(logits.astype(jnp.float32)[:, None] + noise, axis)


def filter_logits(
  logits: Float[Array, "... V"],
  top_k: Int[Array, ""],
  top_p: Float[Array, ""],
  axis: str | None = None,
) -> Float[Array, "... V"]:
  """Sets all but the likeliest tokens to -inf: top-k first, then top-p.

  Top-k keeps every logit at least as large as the k-th largest. Top-p keeps,
  of the mass that remains, the smallest set of likeliest tokens that reaches
  `top_p`; at least one token, and tokens equal at the edge together.

  Args:
    logits: float32, finite or -inf.
    top_k: tokens to keep; 0 keeps all.
    top_p: mass to keep, in (0, 1]; 1 keeps all.
    axis: of a mesh, over whose devices the vocabulary is split.

  Returns:
    float32, `logits` with the dropped tokens at -inf.
  """

  def keep_top_k(logits):
    size = sum_parts(logits.shape[-1], axis)
    wanted = jnp.minimum(top_k, size)
    enough = lambda kept: sum_parts(kept.sum(-1), axis) >= wanted
    floor = _largest_threshold(logits, enough)
    return jnp.where(logits >= floor[..., None], logits, -jnp.inf)

  def keep_top_p(logits):
    largest = largest_score(logits, axis)[..., None]
    total = sum_parts(jnp.exp(logits - largest).sum(-1, keepdims=True), axis)

    def mass(kept):
      # Made anew in every pass: cheaper than one more array to read.
      share = jnp.where(kept, jnp.exp(logits - largest) / total, 0).sum(-1)
      return sum_parts(share, axis)

    # Rounding may leave the whole mass a little under 1: cap what is asked.
    wanted = jnp.minimum(top_p, mass(logits > -jnp.inf))
    floor = _largest_threshold(logits, lambda kept: mass(kept) >= wanted)
    kept = (logits >= floor[..., None]) | (logits == largest)
    return jnp.where(kept, logits, -jnp.inf)

  same = lambda logits: logits
  logits = jax.lax.cond(top_k > 0, keep_top_k, same, logits)
  return jax.lax.cond(top_p < 1, keep_top_p, same, logits)


def _largest_threshold(
  logits: Float[Array, "*n V"],
  enough: Callable[[Bool[Array, "*n V"]], Bool[Array, "*n"]],
) -> Float[Array, "*n"]:
  """Largest t with `enough(logits >= t)`, found bit by bit.

  32 passes over the vocabulary cost far less than sorting it, and the result
  is exact. `enough` must hold for everything and get harder as t grows.
  """

  def refine(i, rank):
    trial = rank | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    kept = logits >= _float_of_rank(trial)[..., None]
    return jnp.where(enough(kept), trial, rank)

  start = jnp.zeros(logits.shape[:-1], jnp.uint32)
  return _float_of_rank(jax.lax.fori_loop(0, 32, refine, start))


def _float_of_rank(rank: Int[Array, "*n"]) -> Float[Array, "*n"]:
  """The float32 of that rank in the order of all floats, as uint32.

  Ranks below -inf's are -inf's. Those above inf's are NaN, than which no
  logit is larger or equal, so that a search turns back from them.
  """
  sign = jnp.uint32(1 << 31)
  bits = jnp.where(rank & sign, rank ^ sign, ~rank)
  value = jax.lax.bitcast_convert_type(bits, jnp.float32)
  below = (rank < sign) & jnp.isnan(value)
  return jnp.where(below, -jnp.inf, value)

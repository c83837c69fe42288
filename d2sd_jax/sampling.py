"""Choosing tokens: temperature, top-k, top-p and position-keyed noise."""

import dataclasses

import jax
import jax.numpy as jnp

from d2sd_jax.typing import Array, Float, Int


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
) -> Int[Array, "B R"]:
  """`argmax(logits / T + Gumbel(seed, sequence, position))`, or the argmax.

  The filters come in the order temperature, top-k, top-p. At temperature 0
  neither noise nor filters are computed.

  Args:
    logits: any float dtype; the choice is made in float32.
    positions: position of the token to be chosen, padding not counted.
    sequence_ids: index of each row's prompt in the input.
    sampling: how to choose.

  Returns:
    int32 token ids.
  """
  logits = logits.astype(jnp.float32)

  def noisy(logits):
    scores = sampling_scores(logits, positions, sequence_ids, sampling)
    return jnp.argmax(scores, axis=-1)

  greedy = lambda logits: jnp.argmax(logits, axis=-1)
  chosen = jax.lax.cond(sampling.temperature > 0, noisy, greedy, logits)
  return chosen.astype(jnp.int32)


def sampling_scores(
  logits: Float[Array, "B R V"],
  positions: Int[Array, "B R"],
  sequence_ids: Int[Array, " B"],
  sampling: Sampling,
) -> Float[Array, "B R V"]:
  """What `sample` takes the argmax of at a temperature above 0; see there."""
  # Measured from the largest, so that no temperature overflows.
  logits = logits - logits.max(-1, keepdims=True)
  logits = logits / sampling.temperature
  filtered = (sampling.top_k > 0) | (sampling.top_p < 1)
  logits = jax.lax.cond(
    filtered,
    lambda x: filter_logits(x, sampling.top_k, sampling.top_p),
    lambda x: x,
    logits,
  )
  noise = position_noise(
    sampling.seed, sequence_ids, positions, logits.shape[-1]
  )
  return logits + noise


def position_noise(
  seed: Int[Array, ""],
  sequence_ids: Int[Array, " B"],
  positions: Int[Array, "B R"],
  vocab_size: int,
) -> Float[Array, "B R V"]:
  """Gumbel noise that depends on (seed, sequence, position, token id) only."""

  def at(sequence_id, position):
    key = jax.random.fold_in(jax.random.key(seed), sequence_id)
    key = jax.random.fold_in(key, position)
    return jax.random.gumbel(key, (vocab_size,), jnp.float32)

  over_nodes = jax.vmap(at, in_axes=(None, 0))
  return jax.vmap(over_nodes)(sequence_ids, positions)


def filter_logits(
  logits: Float[Array, "... V"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "... V"]:
  """Sets all but the likeliest tokens to -inf: top-k first, then top-p.

  Top-k keeps every logit at least as large as the k-th largest. Top-p keeps,
  of the mass that remains, the smallest set of likeliest tokens that reaches
  `top_p`; at least one token, and tokens equal at the edge together.

  Args:
    logits: finite, float32.
    top_k: tokens to keep; 0 keeps all.
    top_p: mass to keep, in (0, 1]; 1 keeps all.

  Returns:
    float32, `logits` with the dropped tokens at -inf.
  """
  ranks = _sortable(logits)
  count = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), 1)
  enough = lambda kept: kept.sum(-1) >= count
  floor = _largest_threshold(ranks, enough)
  kept = (ranks >= floor[..., None]) | (top_k <= 0)

  probabilities = jax.nn.softmax(logits, axis=-1, where=kept)
  mass = lambda kept: jnp.where(kept, probabilities, 0).sum(-1)
  # Rounding may leave the whole mass a little under 1: cap what is asked for.
  wanted = jnp.minimum(top_p, mass(kept))
  floor = _largest_threshold(ranks, lambda kept: mass(kept) >= wanted)
  kept &= (ranks >= floor[..., None]) | (top_p >= 1)
  kept |= ranks == ranks.max(-1, keepdims=True)
  return jnp.where(kept, logits, -jnp.inf)


def _sortable(x: Float[Array, "..."]) -> Int[Array, "..."]:
  """Float32 values as uint32 in the same order (-0 and 0 are made equal)."""
  # Adding 0.0 would do the same, but the compiler drops that.
  x = jnp.where(x == 0, 0.0, x)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits & sign, ~bits, bits | sign)


def _largest_threshold(ranks, enough):
  """Largest t with `enough(ranks >= t)`, found bit by bit.

  32 passes over the vocabulary cost far less than sorting it, and the result
  is exact. `enough` must hold for everything and get harder as t grows.
  """

  def refine(i, threshold):
    trial = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    return jnp.where(enough(ranks >= trial[..., None]), trial, threshold)

  start = jnp.zeros(ranks.shape[:-1], jnp.uint32)
  return jax.lax.fori_loop(0, 32, refine, start)

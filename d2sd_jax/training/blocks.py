"""From a conversation to training blocks: anchors, prefixes, labels.

A block starts at an anchor `a` and has γ slots. Its first `l + 1` slots show
real tokens, the others the mask; slot k predicts the token at its *own*
position, `a + k`. Drafter 1 is the case `l = 0`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from d2sd_jax.models.drafter import fill_masked
from d2sd_jax.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversations:
  """Token sequences whose answers are supervised.

  Attributes:
    tokens: prompt, answer, padding.
    prompt_lengths: first token of the answer.
    lengths: tokens of prompt and answer together.
  """

  tokens: Int[Array, "B T"]
  prompt_lengths: Int[Array, " B"]
  lengths: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """A blocks in each of B sequences.

  Attributes:
    inputs: visible tokens and masks.
    labels: the token at each slot's own position.
    positions: absolute positions of the slots.
    anchors: position of slot 0: the context of the block ends before it.
    prefix_lengths: l, real tokens shown after the anchor.
    supervised: slots that count; never slot 0, a visible slot, or a position
      past the answer.
  """

  inputs: Int[Array, "B A block"]
  labels: Int[Array, "B A block"]
  positions: Int[Array, "B A block"]
  anchors: Int[Array, "B A"]
  prefix_lengths: Int[Array, "B A"]
  supervised: Bool[Array, "B A block"]


def is_anchor(batch: Conversations) -> Bool[Array, "B T"]:
  """Positions where decoding could stand: an answer token with a successor."""
  position = jnp.arange(batch.tokens.shape[1])
  start, end = batch.prompt_lengths[:, None], batch.lengths[:, None]
  return (position >= start) & (position < end - 1)


def sample_anchors(
  key: Array, batch: Conversations, num_anchors: int
) -> tuple[Int[Array, "B A"], Bool[Array, "B A"]]:
  """Draws distinct anchors of every sequence, uniformly.

  Args:
    key: PRNG key.
    batch: the sequences; T must be at least `num_anchors`.
    num_anchors: A.

  Returns:
    Positions, and whether they are anchors: a short answer has too few.
  """
  allowed = is_anchor(batch)
  score = jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1.0)
  score, anchors = jax.lax.top_k(score, num_anchors)
  return anchors.astype(jnp.int32), score >= 0


def sample_prefix_lengths(
  key: Array,
  shape: tuple[int, ...],
  block_size: int,
  prefix_decay: float,
  min_length: int = 0,
) -> Int[Array, "..."]:
  """Draws visible prefixes: `Pr(l = j)` proportional to `β^j` (Eq. 6).

  Args:
    key: PRNG key.
    shape: of the draw.
    block_size: γ; lengths go up to γ - 2, so that one slot is masked.
    prefix_decay: β.
    min_length: 0 as in Eq. 6, or 1 as in the released code.

  Returns:
    int32 lengths in `[min_length, γ - 2]`.
  """
  lengths = jnp.arange(block_size - 1)
  logits = jnp.where(
    lengths >= min_length, lengths * jnp.log(prefix_decay), -jnp.inf
  )
  return jax.random.categorical(key, logits, shape=shape).astype(jnp.int32)


def make_blocks(
  batch: Conversations,
  anchors: Int[Array, "B A"],
  valid: Bool[Array, "B A"],
  prefix_lengths: Int[Array, "B A"],
  block_size: int,
  mask_token_id: int,
) -> Blocks:
  """Cuts blocks out of the sequences.

  Args:
    batch: the sequences.
    anchors: where the blocks start.
    valid: blocks that count.
    prefix_lengths: real tokens each block shows after its anchor.
    block_size: γ.
    mask_token_id: what the drafter sees in a masked slot.
  """
  slots = jnp.arange(block_size)
  positions = anchors[:, :, None] + slots
  last = batch.tokens.shape[1] - 1
  flat = jnp.minimum(positions, last).reshape(positions.shape[0], -1)
  labels = jnp.take_along_axis(batch.tokens, flat, axis=1)
  labels = labels.reshape(positions.shape)
  masked = slots > prefix_lengths[:, :, None]
  inside = positions < batch.lengths[:, None, None]
  return Blocks(
    inputs=fill_masked(labels, prefix_lengths + 1, mask_token_id),
    labels=labels,
    positions=positions,
    anchors=anchors,
    prefix_lengths=prefix_lengths,
    supervised=masked & inside & valid[:, :, None],
  )


def slot_weights(
  blocks: Blocks, loss_decay: float
) -> Float[Array, "B A block"]:
  """`exp(-(k - l - 1) / τ)` on supervised slots, 0 elsewhere (Eq. 7).

  Drafter 1's weights, `exp(-(k - 1) / τ)`, are the case l = 0.
  """
  slots = jnp.arange(blocks.inputs.shape[-1], dtype=jnp.float32)
  distance = slots - blocks.prefix_lengths[:, :, None] - 1
  return jnp.where(blocks.supervised, jnp.exp(-distance / loss_decay), 0.0)


def pace_weights(
  supervised: Bool[Array, "*n slots"],
  label_probability: Float[Array, "*n slots"],
  smoothing: float = 0.5,
) -> Float[Array, "*n slots"]:
  """D-PACE: weighs a slot by the accepted tokens that hang on it.

  `w_j = sum_{m>=j} prod_{i<=m} q_i` over supervised slots, with q the drafter's
  probability of the label, pulled towards 1. Expected accepted length is the
  same sum over all m; its gradient reaches slot j through the terms m >= j.

  Args:
    supervised: slots that count; the product starts at the first of them.
    label_probability: the drafter's, detached.
    smoothing: a; q is `(1 - a) q + a`, lest one bad slot hide all later ones.

  Returns:
    float32 weights, 0 where nothing is supervised.
  """
  pulled = (1 - smoothing) * label_probability + smoothing
  reached = jnp.cumprod(jnp.where(supervised, pulled, 1.0), axis=-1)
  reached = jnp.where(supervised, reached, 0.0)
  total = jnp.cumsum(reached[..., ::-1], axis=-1)[..., ::-1]
  return jnp.where(supervised, total, 0.0)

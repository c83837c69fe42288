"""The distillation loss and what is measured beside it."""

import jax.numpy as jnp
import numpy as np
import optax

from d2sd_jax.errors import require
from d2sd_jax.typing import Array, Bool, Float, Int


def default_loss_decay(block_size: int) -> float:
  """The published τ: 4, 5 and 7 for γ = 8, 10 and 16; between them, linear."""
  return float(np.interp(block_size, [8, 10, 16], [4.0, 5.0, 7.0]))


def block_loss(
  logits: Float[Array, "B A slots V"],
  labels: Int[Array, "B A slots"],
  weights: Float[Array, "B A slots"],
  normalizer: str = "batch",
) -> Float[Array, ""]:
  """Weighted cross-entropy, `Σ w CE / Σ w` (Eq. 7), in float32.

  Args:
    logits: of the drafter, at the slots' own positions.
    labels: the target's tokens there.
    weights: from `slot_weights`.
    normalizer: `batch`, one ratio over all sequences; `example`, the mean over
      sequences of each one's ratio.

  Raises:
    UsageError: the normalizer is unknown.
  """
  known = ("batch", "example")
  require(
    normalizer in known, "loss_normalizer", normalizer, " or ".join(known)
  )
  loss = optax.losses.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), labels
  )
  axes = None if normalizer == "batch" else (1, 2)
  total = weights.sum(axes)
  ratio = (loss * weights).sum(axes) / jnp.where(total > 0, total, 1.0)
  some = total > 0
  return jnp.where(some, ratio, 0.0).sum() / jnp.maximum(some.sum(), 1)


def accepted_lengths(
  correct: Bool[Array, "*n slots"], supervised: Bool[Array, "*n slots"]
) -> Int[Array, "*n"]:
  """Masked slots that are right before the first wrong one.

  Visible slots are stepped over; a slot past the answer ends the count.

  Args:
    correct: whether the argmax equals the label, slots 1..γ-1.
    supervised: masked slots inside the answer.
  """
  started = jnp.cumsum(supervised, axis=-1) > 0
  alive = jnp.where(started, supervised & correct, True)
  return (jnp.cumprod(alive, axis=-1) * supervised).sum(-1)

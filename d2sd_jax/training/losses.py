"""The distillation loss and what is measured beside it."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from d2sd_jax.errors import require
from d2sd_jax.typing import Array, Bool, Float, Int

NORMALIZERS = ("batch", "example")
# Rows whose logits are in memory at a time.
MAX_ROWS = 8192
# Largest difference of logits that is told apart: e^80 is still finite.
MAX_DIFFERENCE = 80.0


@dataclasses.dataclass(frozen=True)
class Teacher:
  """Whose distributions are learnt: `head(hidden)` are its float32 logits.

  Attributes:
    head: of rows, each on its own.
    hidden: what it reads, for every row of the losses.
  """

  head: Callable[[Float[Array, "rows D"]], Float[Array, "rows V"]]
  hidden: Float[Array, "*n D"]


def default_loss_decay(block_size: int) -> float:
  """The published τ: 4, 5 and 7 for γ = 8, 10 and 16; between them, linear."""
  return float(np.interp(block_size, [8, 10, 16], [4.0, 5.0, 7.0]))


def token_losses(
  head: Callable[[Float[Array, "rows D"]], Float[Array, "rows V"]],
  hidden: Float[Array, "*n D"],
  labels: Int[Array, "*n"],
  shards: int = 1,
  teacher: Teacher | None = None,
) -> tuple[Float[Array, "*n"], Float[Array, "*n"], Bool[Array, "*n"]]:
  """Losses of a frozen head's logits, which never exist all at once.

  The cross-entropy of the label; or, with a teacher, the divergence
  `KL(p || q)` of the teacher's distribution p from the drafter's q, both at
  temperature 1. The gradient of a row's loss, `(q - p) head^T` with p one-hot
  where there is no teacher, is known as soon as its logits are. So logits are
  made for some rows at a time, once, and the gradient is attached to `hidden`;
  a backward pass has nothing to recompute.

  Args:
    head: float32 logits of rows, each on its own; gets no gradient itself.
    hidden: what the head reads.
    labels: the right token of each row.
    shards: equal parts that the rows are split into over devices; each device
      then goes through its own, `MAX_ROWS` at a time.
    teacher: whose distribution is to be learnt.

  Returns:
    float32 losses, differentiable in `hidden`; the label's cross-entropy,
    which is not; and whether the label is the argmax (or equal to it).
  """
  rows = math.prod(labels.shape) // shards
  count = math.ceil(rows / MAX_ROWS)
  size = math.ceil(rows / count)
  flat_hidden = jax.lax.stop_gradient(hidden).reshape(shards, rows, -1)
  unused = (0, count * size - rows)
  cut = lambda x: rearrange(
    jnp.pad(x, ((0, 0), unused, *[(0, 0)] * (x.ndim - 2))),
    "shards (count size) ... -> count (shards size) ...",
    count=count,
  )
  flat = [flat_hidden, labels.reshape(shards, rows)]
  if teacher is not None:
    flat.append(teacher.hidden.reshape(shards, rows, -1))
  teach = None if teacher is None else teacher.head
  parts = jax.lax.map(
    lambda part: _rows_loss(head, teach, *part), [cut(x) for x in flat]
  )
  whole = lambda x: rearrange(
    x, "count (shards size) ... -> shards (count size) ...", shards=shards
  )[:, :rows]
  loss, label_loss, correct, slope = (
    whole(part).reshape(*labels.shape, *part.shape[2:]) for part in parts
  )
  # Worth zero, with the slope as its gradient.
  delta = hidden - jax.lax.stop_gradient(hidden)
  attached = jnp.einsum(
    "...d,...d->...",
    slope,
    delta,
    preferred_element_type=jnp.float32,
  )
  return loss + attached, label_loss, correct


def _rows_loss(head, teach, hidden, labels, *taught):
  """Loss, the label's, whether that is the best, and the slope in `hidden`."""
  logits, pull_back = jax.vjp(head, hidden)
  # Measured from the label's own logit, the sum and the largest come out of
  # one pass over the vocabulary.
  differences = logits - jnp.take_along_axis(logits, labels[:, None], axis=-1)
  ratios = jnp.exp(jnp.minimum(differences, MAX_DIFFERENCE))
  total = ratios.sum(-1, keepdims=True)
  label_loss = loss = jnp.log(total[:, 0])
  wanted = jnp.arange(logits.shape[-1]) == labels[:, None]
  if teach is not None:
    logs = jax.nn.log_softmax(teach(*taught))
    wanted = jnp.exp(logs)
    # log q is `differences - loss`, and p sums to one.
    loss = (wanted * (logs - differences)).sum(-1) + label_loss
  (slope,) = pull_back(ratios / total - wanted)
  return loss, label_loss, differences.max(-1) <= 0, slope


def block_loss(
  losses: Float[Array, "B A slots"],
  weights: Float[Array, "B A slots"],
  normalizer: str = "batch",
) -> Float[Array, ""]:
  """Weighted mean of the slots' losses, `Σ w CE / Σ w` (Eq. 7).

  Args:
    losses: float32 cross-entropy of each slot.
    weights: from `slot_weights`.
    normalizer: `batch`, one ratio over all sequences; `example`, the mean over
      sequences of each one's ratio.

  Raises:
    UsageError: the normalizer is unknown.
  """
  require(
    normalizer in NORMALIZERS,
    "loss_normalizer",
    normalizer,
    " or ".join(NORMALIZERS),
  )
  axes = None if normalizer == "batch" else (1, 2)
  total = weights.sum(axes)
  ratio = (losses * weights).sum(axes) / jnp.where(total > 0, total, 1.0)
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

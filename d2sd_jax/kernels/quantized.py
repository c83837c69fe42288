"""Matrices in int8 with a scale per output channel, for drafting only."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from d2sd_jax.kernels.transposed import Transposed
from d2sd_jax.typing import Array, Float, Int

_LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedMatrix:
  """Stands for `values * scales`, symmetric about 0.

  Attributes:
    values: int8, in [-127, 127].
    scales: float32, one per output channel: the axis of `values` that a
      product does not sum over.
  """

  values: Int[Array, "rows columns"]
  scales: Float[Array, " channels"]


def quantize(matrix: Any, *, summed: int) -> Any:
  """Rounds each channel to 255 steps that reach its largest magnitude.

  `|w - value * scale| <= scale / 2` for every weight w, up to float32.

  Args:
    matrix: weights of any real dtype, or `Transposed`, which stays so.
    summed: the axis that products sum over: 0 for `[in, out]`.

  Returns:
    A `QuantizedMatrix`.
  """
  if isinstance(matrix, Transposed):
    return Transposed(stored=quantize(matrix.stored, summed=1 - summed))
  wide = jnp.asarray(matrix).astype(jnp.float32)
  scales = jnp.abs(wide).max(axis=summed, keepdims=True) / _LARGEST
  # A channel of zeros has no scale; any will do.
  scales = jnp.where(scales > 0, scales, 1.0)
  values = jnp.clip(jnp.round(wide / scales), -_LARGEST, _LARGEST)
  return QuantizedMatrix(
    values=values.astype(jnp.int8), scales=scales.squeeze(summed)
  )

"""Matrices in int8 with a scale per output channel, for drafting only."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

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


def quantize(
  matrix: Float[Array, "rows columns"], *, summed: int
) -> QuantizedMatrix:
  """Rounds each channel to 255 steps that reach its largest magnitude.

  `|w - value * scale| <= scale / 2` for every weight w, up to float32.

  Args:
    matrix: weights of any real dtype.
    summed: the axis that products sum over: 0 for `[in, out]`.
  """
  wide = jnp.asarray(matrix).astype(jnp.float32)
  scales = jnp.abs(wide).max(axis=summed, keepdims=True) / _LARGEST
  # A channel of zeros has no scale; any will do.
  scales = jnp.where(scales > 0, scales, 1.0)
  values = jnp.clip(jnp.round(wide / scales), -_LARGEST, _LARGEST)
  return QuantizedMatrix(
    values=values.astype(jnp.int8), scales=scales.squeeze(summed)
  )


def quantized_product(
  spec: str, x: Array, matrix: QuantizedMatrix, dtype: Any
) -> Array:
  """`einsum` of activations and the matrix, scaled once it is summed.

  Args:
    spec: of two operands; the matrix's channels come last in the output.
    x: activations; products are of their dtype, which holds int8 exactly.
    matrix: the weights.
    dtype: of the result; sums are float32.
  """
  # Tied to x, or XLA would convert the matrix once, before a decode loop, and
  # the loop would read the wider copy.
  values, x = jax.lax.optimization_barrier((matrix.values, x))
  wide = jnp.einsum(
    *(spec, x, values.astype(x.dtype)),
    precision="highest",
    preferred_element_type=jnp.float32,
  )
  return (wide * matrix.scales).astype(dtype)

"""Contractions with the precision this project means."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from d2sd_jax.kernels.quantized import QuantizedMatrix
from d2sd_jax.kernels.transposed import Transposed
from d2sd_jax.typing import Array


def matmul(
  spec: str, a: Array, b: Any, preferred_element_type: Any = None
) -> Array:
  """`einsum` of two operands in the precision that their dtype promises.

  "highest" is what makes float32 float32: the default is TF32 on NVIDIA and
  bfloat16 on TPU. Products of 16-bit arrays come out the same with either; on a
  GPU "highest" leaves many rows to cuBLAS. One row is a sum where the matrix
  is `Transposed`.

  Args:
    spec: an einsum specification of two operands.
    a: left operand.
    b: right operand: an array, a `QuantizedMatrix` or `Transposed`.
    preferred_element_type: of the result; `None` is the operands'.
  """
  dtype = preferred_element_type or a.dtype
  if _is_row_sum(a, b):
    return _row_sum(a, b.stored).astype(dtype)
  if isinstance(b, Transposed):
    left, right = spec.split(",")
    spec = f"{left},{right[1::-1]}{right[2:]}"
    return matmul(spec, a, b.stored, dtype)
  if isinstance(b, QuantizedMatrix):
    return _quantized_product(spec, a, b, dtype)
  return jnp.einsum(
    *(spec, a, b),
    precision="highest",
    preferred_element_type=preferred_element_type,
  )


def _is_row_sum(x, matrix):
  """Whether a product is of one row alone, a sum along the matrix's rows."""
  return (
    x.size == x.shape[-1]
    and isinstance(matrix, Transposed)
    and not isinstance(matrix.stored, QuantizedMatrix)
  )


def _row_sum(x, stored):
  """Product of one row, in float32 or wider: one kernel in XLA.

  Left to XLA, each term would be rounded to the result's dtype.
  """
  dtype = jnp.promote_types(jnp.result_type(x, stored), jnp.float32)
  terms = stored.astype(dtype) * x.reshape(-1).astype(dtype)
  return terms.sum(-1).reshape(*x.shape[:-1], -1)


def _quantized_product(
  spec: str, x: Array, matrix: QuantizedMatrix, dtype: Any
) -> Array:
  """`einsum` of activations and the matrix, scaled once it is summed.

  Products are of the activations' dtype, which holds int8 exactly, and sums are
  float32. The matrix's channels come last in the output.
  """
  # Tied to x, or XLA would convert the matrix once, before a decode loop, and
  # the loop would read the wider copy.
  values, x = jax.lax.optimization_barrier((matrix.values, x))
  values = values.astype(x.dtype)
  wide = jnp.einsum(
    *(spec, x, values),
    precision=None if x.dtype.itemsize == 2 else "highest",
    preferred_element_type=jnp.float32,
  )
  return (wide * matrix.scales).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dot_float32(spec: str, a: Array, b: Array) -> Array:
  """`einsum` of two arrays of one dtype, accumulated and returned in float32.

  The gradient's products run in the operands' dtype. Left to itself, the
  float32 cotangent would turn every bfloat16 product of the backward pass
  into a float32 one, several times slower on a GPU.

  Args:
    spec: an einsum specification of two operands.
    a: left operand.
    b: right operand.
  """
  return matmul(spec, a, b, preferred_element_type=jnp.float32)


def _forward(spec, a, b):
  return dot_float32(spec, a, b), (a, b)


def _backward(spec, operands, cotangent):
  _, vjp = jax.vjp(functools.partial(matmul, spec), *operands)
  return vjp(cotangent.astype(operands[0].dtype))


dot_float32.defvjp(_forward, _backward)

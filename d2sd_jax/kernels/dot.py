"""Contractions with the precision this project means."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from d2sd_jax.kernels.quantized import QuantizedMatrix, quantized_product
from d2sd_jax.typing import Array


def matmul(
  spec: str, a: Array, b: Any, preferred_element_type: Any = None
) -> Array:
  """`einsum` of two operands in the precision that their dtype promises.

  "highest" is what makes float32 float32: the default is TF32 on NVIDIA and
  bfloat16 on TPU. Products of bfloat16 arrays are not affected by it.

  Args:
    spec: an einsum specification of two operands.
    a: left operand.
    b: right operand: an array, or a `QuantizedMatrix`.
    preferred_element_type: of the result; `None` is the operands'.
  """
  if isinstance(b, QuantizedMatrix):
    return quantized_product(spec, a, b, preferred_element_type or a.dtype)
  return jnp.einsum(
    *(spec, a, b),
    precision="highest",
    preferred_element_type=preferred_element_type,
  )


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

"""Contractions with the precision this project means."""

import functools

import jax
import jax.numpy as jnp

from d2sd_jax.typing import Array

# "highest" is what makes float32 float32: the default is TF32 on NVIDIA and
# bfloat16 on TPU. Products of bfloat16 arrays are not affected by it.
matmul = functools.partial(jnp.einsum, precision="highest")


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

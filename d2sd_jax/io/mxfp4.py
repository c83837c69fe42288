"""MXFP4 weights: blocks of 32 four-bit floats with a shared power of two.

The OCP Microscaling format (version 1.0, Sec. 5) as GPT-OSS publishes it: two
codes a byte, the first in the low half, and a scale 2^(s - 127) a block.
"""

import jax
import jax.numpy as jnp

from d2sd_jax.typing import Array, Float, UInt8

BLOCK = 32
# E2M1: what codes 0..7 stand for; 8..15 are the same, negated.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The one scale that is not a number.
NAN_SCALE = 255


def dequantize(
  blocks: UInt8[Array, "*rows blocks 16"],
  scales: UInt8[Array, "*rows blocks"],
  dtype: jax.typing.DTypeLike,
) -> Float[Array, "*rows columns"]:
  """The values of rows of blocks, 32 columns a block.

  Args:
    blocks: codes of columns 2i and 2i+1 in the low and high half of byte i.
    scales: biased exponents; 0 is below float32's normal numbers and gives 0.
    dtype: of the values; each is exact in bfloat16.
  """
  table = jnp.array((*_MAGNITUDES, *(-x for x in _MAGNITUDES)), jnp.float32)
  codes = jnp.stack([blocks & 15, blocks >> 4], axis=-1)
  codes = codes.reshape(*blocks.shape[:-1], BLOCK)
  # Eight exponent bits above a mantissa of zeros.
  bits = scales.astype(jnp.uint32) << 23
  powers = jax.lax.bitcast_convert_type(bits, jnp.float32)
  values = table[codes] * powers[..., None]
  return values.reshape(*scales.shape[:-1], -1).astype(dtype)

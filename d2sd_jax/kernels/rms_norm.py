"""RMSNorm: XLA's, and a kernel for some rows on a GPU.

XLA's lasts 2.8 µs for 80 rows of 4096 on an H200 where this one lasts 1.7.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from d2sd_jax.kernels import triton
from d2sd_jax.typing import Array, Float

# Elements of a row that one load takes, at most; from how many on it has one
# more warp, up to eight.
MOST_COLUMNS, WARP_COLUMNS = 4096, 512


def rms_norm(
  x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
  """RMSNorm in float32, returned in `x`'s dtype."""
  wide = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
  return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def decoding_norm(
  x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
  """As `rms_norm`, by whatever is fastest here; it may have no gradient."""
  return (rms_norm_rows if fits(x) else rms_norm)(x, weight, eps)


def fits(x: Float[Array, "... D"]) -> bool:
  """Whether `rms_norm_rows` can run, and pays: not for a lone row.

  XLA takes the square sum of one along with the residual sum.
  """
  width = x.shape[-1]
  return triton.runs_here() and width < x.size <= triton.MOST_ROWS * width


@triton.lowered_once("eps")
def rms_norm_rows(
  x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
  """As `rms_norm`, by a kernel that has no gradient."""
  width = x.shape[-1]
  rows = x.reshape(-1, width)
  row = pl.BlockSpec((None, width), lambda i: (i, 0))
  out = triton.call(
    functools.partial(_kernel, eps=eps),
    grid=(len(rows),),
    in_specs=[row, pl.BlockSpec((width,), lambda _: (0,))],
    out_specs=row,
    out_shape=jax.ShapeDtypeStruct(rows.shape, x.dtype),
    warps=_warps(width),
    name="rms_norm",
  )(rows, weight.reshape(width))
  return out.reshape(x.shape)


def _warps(width: int) -> int:
  """1 to 8, a power of two."""
  return 1 << min(3, (width // WARP_COLUMNS | 1).bit_length() - 1)


def _kernel(x_ref, weight_ref, out_ref, *, eps):
  """One row."""
  width = len(weight_ref)
  pieces = [pl.ds(*piece) for piece in triton.pieces(width, MOST_COLUMNS)]
  # Both are sent for before the sum is waited for.
  x, weight = (
    [ref[at].astype(jnp.float32) for at in pieces]
    for ref in (x_ref, weight_ref)
  )
  squares = sum(jnp.square(part).sum() for part in x)
  scale = jax.lax.rsqrt(squares / width + eps)
  for at, part, factor in zip(pieces, x, weight, strict=True):
    out_ref[at] = (part * scale * factor).astype(out_ref.dtype)

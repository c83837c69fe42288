"""One row times a matrix on a GPU, with what comes before and after, in Triton.

A step of autoregressive decoding is bound by reading its matrices. In XLA the
norm before a product, its gate and the residual sum after it are kernels of
1.2 to 2.9 µs each, whatever they compute; here they ride along. The norm's
factor is one number, so it is applied to the sums: the sum of squares is taken
by every program for itself, from the row that it needs anyway. A program is one
warp and has one number to find: many of them hide each other's waits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from d2sd_jax.kernels import triton
from d2sd_jax.kernels.quantized import QuantizedMatrix
from d2sd_jax.kernels.transposed import Transposed
from d2sd_jax.typing import Array, Float

DTYPES = ("bfloat16", "float16", "float32")
# Elements of a matrix up to which it is the default. XLA reads a large one
# faster, by about as much as its small kernels take.
MOST_ELEMENTS = 2**22
# Elements of the row that one load takes, at most.
MOST_COLUMNS = 512


def why_not(x: Array, matrix: Array | Transposed) -> str | None:
  """What the kernel asks for that is not so, or `None`.

  Args:
    x: as for `api.linear`.
    matrix: as for `api.linear`.
  """
  if not triton.runs_here():
    return triton.DEVICE
  if not isinstance(matrix, Transposed):
    return "a matrix stored [out, in]"
  if isinstance(matrix.stored, QuantizedMatrix):
    return "a matrix that is not quantized"
  if x.dtype != matrix.stored.dtype or x.dtype.name not in DTYPES:
    return f"a row and a matrix of one of {', '.join(DTYPES)}"
  return None if x.size == x.shape[-1] else "one row alone"


def wins(x: Array, matrix: Array | Transposed, *, gated: bool = False) -> bool:
  """Whether this is the default: where it can run, and the matrix is small.

  Args:
    x: as for `api.linear`.
    matrix: as for `api.linear`.
    gated: makes no difference.
  """
  if why_not(x, matrix) is not None:
    return False
  return matrix.stored.size <= MOST_ELEMENTS  # type: ignore[union-attr]


@triton.lowered_once("eps", "gated")
def linear(
  x: Float[Array, "... D"],
  stored: Float[Array, "out D"],
  norm: Float[Array, " D"] | None = None,
  eps: float = 0.0,
  gated: bool = False,
  residual: Float[Array, "... out"] | None = None,
) -> Float[Array, "... out"]:
  """See `api.linear`.

  Args:
    x: one row.
    stored: the matrix, transposed.
    norm: see there.
    eps: see there.
    gated: see there.
    residual: see there.

  Returns:
    One row, in `x`'s dtype.
  """
  parts, width = 2 if gated else 1, x.shape[-1]
  stored = stored.reshape(parts, stored.shape[0] // parts, width)
  size = stored.shape[1]
  whole = pl.BlockSpec((width,), lambda i: (0,))
  part = pl.BlockSpec((1,), lambda i: (i,))
  block = pl.BlockSpec((parts, 1, width), lambda i: (0, i, 0))
  operands = [(x.reshape(-1), whole), (stored, block)]
  if norm is not None:
    operands.append((norm.reshape(width), whole))
  if residual is not None:
    operands.append((residual.reshape(size), part))
  arrays, specs = zip(*operands, strict=True)
  out = triton.call(
    functools.partial(_kernel, eps=None if norm is None else eps),
    grid=(size,),
    in_specs=specs,
    out_specs=part,
    out_shape=jax.ShapeDtypeStruct((size,), x.dtype),
    warps=1,
    name="lone_row",
  )(*arrays)
  return out.reshape(*x.shape[:-1], -1)


def _kernel(*refs, eps):
  """The sum of a row of each part, normed, gated and added to."""
  x_ref, matrix_ref, *refs, out_ref = refs
  norm_ref = None if eps is None else refs.pop(0)
  parts, _, width = matrix_ref.shape
  # Sums that are as wide are summed before they are summed up.
  wide: dict[int, list[Any]] = {}
  for start, count in triton.pieces(width, MOST_COLUMNS):
    at = pl.ds(start, count)
    x = x_ref[at].astype(jnp.float32)
    factors = x if eps is None else x * norm_ref[at].astype(jnp.float32)
    new = [matrix_ref[i, :, at].astype(jnp.float32) for i in range(parts)]
    new = [x * x, *(rows * factors for rows in new)]
    old = wide.get(count)
    wide[count] = [a + b for a, b in zip(old, new, strict=True)] if old else new
  squares, *rows = (
    sum(terms.sum(-1) for terms in same)
    for same in zip(*wide.values(), strict=True)
  )
  if eps is not None:
    scale = jax.lax.rsqrt(squares / width + eps)
    rows = [r * scale for r in rows]
  out = rows[0] if parts == 1 else rows[0] * jax.nn.sigmoid(rows[0]) * rows[1]
  if refs:
    out = out + refs[0][...].astype(jnp.float32)
  out_ref[...] = out.astype(out_ref.dtype)

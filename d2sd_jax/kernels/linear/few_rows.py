"""A few rows times a small matrix on a GPU, in Triton; see `lone_row`.

For small targets and for drafters, whose products last no longer than a launch:
norm, product, gate and residual sum are one kernel. A program has a block of
the rows and a strip of the matrix's rows, and takes the sums of squares for
itself, from the tiles that it multiplies anyway.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from d2sd_jax.kernels import triton
from d2sd_jax.typing import Array, Float

# Rows times the norm's weights are rounded before the norm's factor is known,
# and float16 might not hold them.
DTYPES = ("bfloat16",)
MOST_ROWS = 128
# Elements of a matrix up to which it is the default.
MOST_ELEMENTS = 2**22
# A tensor core's least operand.
LEAST = 16


def why_not(x: Array, stored: Array, parts: int) -> str | None:
  """What the kernel asks for of these sizes that is not so, or `None`."""
  if x.size > MOST_ROWS * x.shape[-1]:
    return f"at most {MOST_ROWS} rows"
  if x.shape[-1] % LEAST or stored.shape[0] % (parts * LEAST):
    return f"sizes that are multiples of {LEAST}"
  return None


def linear(
  x: Float[Array, "... D"],
  stored: Float[Array, "out D"],
  norm: Float[Array, " D"] | None = None,
  eps: float = 0.0,
  gated: bool = False,
  residual: Float[Array, "... out"] | None = None,
  *,
  tile: tuple[int, int, int, int, int] | None = None,
) -> Float[Array, "... out"]:
  """See `api.linear`.

  Args:
    x: at most `MOST_ROWS` rows.
    stored: the matrix, transposed.
    norm: see there.
    eps: see there.
    gated: see there.
    residual: see there.
    tile: rows of the stored matrix to a program, rows of `x` to a product,
      columns to a step, warps, and how many steps are loaded ahead.

  Returns:
    As many rows, in `x`'s dtype.
  """
  parts, width = 2 if gated else 1, x.shape[-1]
  shape = x.shape[:-1]
  x = x.reshape(-1, width)
  stored = stored.reshape(parts, stored.shape[0] // parts, width)
  count, size = len(x), stored.shape[1]
  strip, block, columns, warps, stages = tile or _tile(count, width)
  block = min(block, max(LEAST, pl.next_power_of_2(count)))
  own = pl.BlockSpec((block, strip), lambda m, i: (m, i))
  operands = [
    (x, pl.BlockSpec((block, width), lambda m, _: (m, 0))),
    (stored, pl.BlockSpec((parts, strip, width), lambda _, i: (0, i, 0))),
  ]
  if norm is not None:
    operands.append((norm, pl.BlockSpec((width,), lambda *_: (0,))))
  if residual is not None:
    operands.append((residual.reshape(count, size), own))
  arrays, specs = zip(*operands, strict=True)
  out = triton.call(
    functools.partial(
      _kernel,
      count=count,
      columns=columns,
      eps=None if norm is None else eps,
    ),
    # Programs of one strip run at once, and find it in the cache.
    grid=(pl.cdiv(count, block), size // strip),
    in_specs=specs,
    out_specs=own,
    out_shape=jax.ShapeDtypeStruct((count, size), x.dtype),
    warps=warps,
    stages=stages,
    name="few_rows",
  )(*arrays)
  return out.reshape(*shape, size)


def _tile(count, width):
  """Sizes of a program's work."""
  columns = min(128 if count <= LEAST else 64, width & -width)
  return LEAST, 64, columns, 4, 4


def _kernel(*refs, count, columns, eps):
  """A block of rows times a strip of the matrix."""
  load, dot = triton.language.load, triton.language.dot
  x_ref, matrix_ref, *refs, out_ref = refs
  norm_ref = None if eps is None else refs.pop(0)
  parts, strip, width = matrix_ref.shape
  block = len(x_ref)
  there = pl.program_id(0) * block + jnp.arange(block) < count
  mask = lambda size: jnp.broadcast_to(there[:, None], (block, size))

  def step(k, sums):
    squares, *products = sums
    at = pl.ds(k * columns, columns)
    x = load(x_ref.at[:, at], mask=mask(columns), other=0.0)
    if eps is not None:
      wide = x.astype(jnp.float32)
      squares = squares + (wide * wide).sum(1)
      x = (wide * norm_ref[at].astype(jnp.float32)[None]).astype(x.dtype)
    return squares, *(
      product + dot(x, matrix_ref[i, :, at], trans_b=True)
      for i, product in enumerate(products)
    )

  zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
  squares, *products = jax.lax.fori_loop(
    *(0, width // columns, step),
    (zeros(block), *(zeros(block, strip) for _ in range(parts))),
  )
  if eps is not None:
    scale = jax.lax.rsqrt(squares / width + eps)[:, None]
    products = [product * scale for product in products]
  out = products[0]
  if parts == 2:
    out = out * jax.nn.sigmoid(out) * products[1]
  if refs:
    added = load(refs[0], mask=mask(strip), other=0.0)
    out = out + added.astype(jnp.float32)
  triton.language.store(out_ref, out.astype(out_ref.dtype), mask=mask(strip))

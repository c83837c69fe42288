"""Writing new rows into the caches of all layers on a GPU, in one launch.

In XLA each array takes a launch of its own, of 1.1 µs for a row of 1 KB.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from d2sd_jax.kernels import triton
from d2sd_jax.typing import Array, Float, Int

# A kernel's parameters are 4 KB at most, two pointers for each of these.
MOST_ARRAYS = 240


def fits(
  caches: tuple[Float[Array, "B J S H"], ...],
  rows: tuple[Float[Array, "B J R H"], ...],
) -> bool:
  """Whether the kernel can write, and it pays."""
  if not caches or not triton.runs_here():
    return False
  head_dim, count = caches[0].shape[3], rows[0].shape[2]
  return (
    1 < len(caches) <= MOST_ARRAYS
    and len({(c.shape, c.dtype) for c in caches}) == 1
    and count <= caches[0].shape[2]
    and head_dim & (head_dim - 1) == 0
    and 0 < count <= triton.MOST_ROWS
  )


def write_all(
  caches: tuple[Float[Array, "B J S H"], ...],
  rows: tuple[Float[Array, "B J P H"], ...],
  starts: Int[Array, " B"],
) -> tuple[Float[Array, "B J S H"], ...]:
  """Writes each array's rows to its cache, from row `starts[b]` on.

  Args:
    caches: arrays that `fits`; donate them, so that they are written in place.
    rows: new rows, one array per cache.
    starts: first row to be written; `starts` + P must not pass the capacity.

  Returns:
    The caches with P rows written.
  """
  batch, heads, size, head_dim = caches[0].shape
  # One array of them all is made in few launches, and without a copy of each.
  new = jnp.stack([r.astype(caches[0].dtype) for r in rows])
  count = new.shape[3]
  return triton.call(
    functools.partial(_kernel, heads=heads, last=size - count),
    grid=(len(caches), batch * heads, count),
    in_specs=[
      pl.BlockSpec((batch,), lambda *_: (0,)),
      pl.BlockSpec(
        (None, None, None, None, head_dim),
        lambda i, row, p: (i, row // heads, row % heads, p, 0),
      ),
      *[pl.BlockSpec(c.shape, lambda *_: (0, 0, 0, 0)) for c in caches],
    ],
    out_specs=tuple(
      pl.BlockSpec(c.shape, lambda *_: (0, 0, 0, 0)) for c in caches
    ),
    out_shape=tuple(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in caches),
    input_output_aliases={2 + i: i for i in range(len(caches))},
    warps=1,
    name="write_all",
  )(starts, new, *caches)


def _kernel(starts_ref, row_ref, *cache_refs, heads, last):
  """One row of one head of one array."""
  caches = cache_refs[len(cache_refs) // 2 :]
  b, head = pl.program_id(1) // heads, pl.program_id(1) % heads
  # As XLA's update would: never past the cache.
  at = jnp.clip(starts_ref[b], 0, last) + pl.program_id(2)
  row = row_ref[...]
  for i, cache in enumerate(caches):

    @pl.when(pl.program_id(0) == i)
    def _(cache=cache):
      cache[b, head, at, :] = row

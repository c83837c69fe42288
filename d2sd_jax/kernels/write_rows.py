"""Writing a few rows into a key/value cache on TPU, in place.

XLA moves whole layers through VMEM there to update a slice of one. This kernel
touches only the aligned blocks that the new rows fall into.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from d2sd_jax.kernels.device import in_hbm, is_transposed
from d2sd_jax.typing import Array, Float, Int

# Rows of the cache in one block: a whole tile in memory, by either layout.
BLOCK_ROWS = 16
BLOCK_COLUMNS = 128
# A cache this short may be one block.
MAX_WHOLE = 256


def fits(cache: Float[Array, "B J S H"]) -> bool:
  """Whether the capacity is made of whole blocks, or small."""
  return cache.shape[2] % _block(cache) == 0


def _block(cache):
  capacity, head_dim = cache.shape[2:]
  block = BLOCK_COLUMNS if is_transposed(head_dim) else BLOCK_ROWS
  return capacity if capacity % block and capacity <= MAX_WHOLE else block


def write_rows(
  caches: tuple[Float[Array, "B J S H"], ...],
  rows: tuple[Float[Array, "B J R H"], ...],
  index: Int[Array, "B P"] | None,
  starts: Int[Array, " B"],
) -> tuple[Float[Array, "B J S H"], ...]:
  """Copies rows `index[b]` to the rows of the caches from `starts[b]` on.

  Args:
    caches: arrays of one shape that `fits`; donate them, so that they are
      written in place.
    rows: where the new rows are taken from, one array per cache.
    index: which of `rows`, in order; `None` is all of them.
    starts: first row to be written; `starts` + P must not pass the capacity.

  Returns:
    The caches with P rows written.
  """
  batch, heads, capacity, head_dim = caches[0].shape
  if index is None:
    size = rows[0].shape[2]
    index = jnp.broadcast_to(jnp.arange(size), (batch, size))
  block, last = _block(caches[0]), capacity // _block(caches[0]) - 1
  num_blocks = min(pl.cdiv(index.shape[1] + block - 1, block), last + 1)
  transposed = is_transposed(head_dim)
  as_held = lambda x: x.swapaxes(2, 3) if transposed else x
  order = (
    (lambda b, i: (b, 0, 0, i)) if transposed else (lambda b, i: (b, 0, i, 0))
  )
  shape = (head_dim, block) if transposed else (block, head_dim)
  aligned = pl.BlockSpec((None, heads, *shape), lambda b, i, _: order(b, i))
  in_place = pl.BlockSpec(
    (None, heads, *shape),
    lambda b, i, starts: order(b, jnp.minimum(starts[b] // block + i, last)),
  )
  new = [
    as_held(_align(r, index, starts, block, num_blocks)).astype(c.dtype)
    for r, c in zip(rows, caches, strict=True)
  ]
  held = [in_hbm(as_held(c)) for c in caches]
  count = len(caches)
  written = pl.pallas_call(
    functools.partial(
      _kernel,
      size=index.shape[1],
      block=block,
      last=last,
      axis=2 if transposed else 1,
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(batch, num_blocks),
      in_specs=[aligned] * count + [in_place] * count,
      out_specs=tuple([in_place] * count),
    ),
    out_shape=tuple(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in held),
    input_output_aliases={1 + count + i: i for i in range(count)},
    name="write_rows",
  )(starts, *new, *held)
  return tuple(map(as_held, written))


def _align(rows, index, starts, block, num_blocks):
  """The picked rows at their places within the blocks they fall into."""
  place = jnp.arange(num_blocks * block) - starts[:, None] % block
  place = jnp.clip(place, 0, index.shape[1] - 1)
  picked = jnp.take_along_axis(index, place, axis=1)
  return jnp.take_along_axis(rows, picked[:, None, :, None], axis=2)


def _kernel(starts, *refs, size, block, last, axis):
  """One block of each cache: new rows where they belong, else the old."""
  count = len(refs) // 3
  new, old, out = (refs[i * count : (i + 1) * count] for i in range(3))
  start = starts[pl.program_id(0)]
  here = start // block + pl.program_id(1)

  # Past the last block the index map stays on it: it is finished already.
  @pl.when(here <= last)
  def _():
    for new_rows, old_rows, rows in zip(new, old, out, strict=True):
      at = jax.lax.broadcasted_iota(jnp.int32, rows.shape, axis) + here * block
      written = (at >= start) & (at < start + size)
      rows[...] = jnp.where(written, new_rows[...], old_rows[...])

"""Cascade attention as one Pallas kernel for TPU.

The nodes are cut into tiles of whole groups (or of parts of one long group).
For each tile and key head the kernel walks over blocks of the prefix, from the
first row any of the tile's nodes sees to the last, and then takes the tile's
own nodes as one more block. One online softmax in float32 serves both parts,
so there is nothing to merge. The cache is read in place, in its own layout:
lengths are prefetched as scalars, and the index map never leaves the blocks
that are needed, so nothing is fetched past a row's length.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from d2sd_jax.errors import UsageError
from d2sd_jax.kernels.cascade_attention import xla
from d2sd_jax.kernels.device import (
  in_hbm,
  is_transposed,
  runs_tpu_kernels,
)

DTYPES = ("float32", "bfloat16")
# Rows of the prefix in one block, a multiple of every dtype's tile.
BLOCK_KEYS = 512
# Query rows (nodes times heads that share a key head) of a tile, and nodes of
# the local part: what fits VMEM beside the blocks.
MAX_ROWS = 1024
MAX_LOCAL_KEYS = 512
MAX_HEAD_DIM = 256
# Fewer (a product over a single one) Mosaic does not take.
MIN_LOCAL_KEYS = 8
# The highest score starts at _LEAST, and what is not seen scores below it: its
# weight is exactly zero from the start, and finite all the way.
_LEAST = -1e30
_UNSEEN = -2e30


def why_not(query, prefix_keys) -> str | None:
  """Why these operands do not fit the kernel; `None` where they do.

  Args:
    query: as for `cascade_attention`.
    prefix_keys: as for `cascade_attention`.
  """
  nodes, heads = query.shape[2:4]
  share = heads // prefix_keys.shape[1]
  if query.dtype.name not in DTYPES:
    return f"{' or '.join(DTYPES)}, not {query.dtype.name}"
  if prefix_keys.dtype != query.dtype:
    return f"a cache in the query's {query.dtype}, not {prefix_keys.dtype}"
  if nodes > MAX_LOCAL_KEYS:
    return f"groups of at most {MAX_LOCAL_KEYS} nodes, not {nodes}"
  if query.shape[4] > MAX_HEAD_DIM:
    return f"heads of at most {MAX_HEAD_DIM}, not {query.shape[4]}"
  if share > MAX_ROWS:
    return f"at most {MAX_ROWS} query heads to a key head, not {share}"
  return None


def wins(query, prefix_keys) -> bool:
  """Whether this is the default: on a TPU, in decoding, where it fits.

  Prefill has no prefix, and training keeps XLA's operands for the gradient.

  Args:
    query: as for `cascade_attention`.
    prefix_keys: as for `cascade_attention`.
  """
  few = query.shape[1] * query.shape[2] <= MAX_ROWS
  return (
    runs_tpu_kernels()
    and few
    and prefix_keys.shape[2] > 0
    and why_not(query, prefix_keys) is None
  )


def cascade_attention(
  query, prefix_keys, prefix_values, local_keys, local_values, **options
):
  """See `api.cascade_attention`; TPU only. The gradient is XLA's."""
  name = "implementation='mosaic_tpu': expected "
  if not runs_tpu_kernels():
    raise UsageError(name + "a TPU, or `kernels.device.tpu_interpreter`")
  if reason := why_not(query, prefix_keys):
    raise UsageError(name + reason)
  local = (x.astype(query.dtype) for x in (local_keys, local_values))
  return _attend((query, prefix_keys, prefix_values, *local), options)


@jax.custom_vjp
def _attend(arrays, options):
  return _run(*arrays, **options)


def _forward(arrays, options):
  return _run(*arrays, **options), (arrays, options)


def _backward(operands, cotangent):
  """XLA's gradient: the kernel itself has none."""
  _, vjp = jax.vjp(lambda a, o: xla.cascade_attention(*a, **o), *operands)
  return vjp(cotangent)


_attend.defvjp(_forward, _backward)


def _run(
  query,
  prefix_keys,
  prefix_values,
  local_keys,
  local_values,
  *,
  prefix_end,
  prefix_start,
  local_mask,
  sinks,
):
  """Lays the nodes out in tiles, runs the kernel, and undoes the layout."""
  groups, nodes, heads, head_dim = query.shape[1:]
  kv_heads, size = prefix_keys.shape[1:3]
  share = heads // kv_heads
  tile = _tile(groups, nodes, share)
  bounds = _visible_rows(prefix_end, prefix_start, size, query.shape[:3])
  bounds, mask = tile.of_nodes(bounds), _tile_mask(local_mask, groups, tile)
  if size == 0:
    empty = (*prefix_keys.shape[:2], 8, head_dim)
    prefix_keys = prefix_values = jnp.zeros(empty, query.dtype)
  block = min(BLOCK_KEYS, prefix_keys.shape[2])
  if is_transposed(head_dim):
    prefix_keys, prefix_values = (
      x.swapaxes(2, 3) for x in (prefix_keys, prefix_values)
    )

  # Nodes times the query heads that share a key head are the kernel's rows.
  per_row = lambda x: repeat(x, "b t m k -> b t (m n) k", n=share)
  rows = tile.of_nodes(
    rearrange(query, "b g r (j n) h -> b g r j n h", n=share)
  )
  local_keys, local_values = map(tile.of_groups, (local_keys, local_values))
  if (spare := MIN_LOCAL_KEYS - mask.shape[-1]) > 0:
    mask = jnp.pad(mask, [(0, 0)] * 3 + [(0, spare)])
    pad = [(0, 0)] * 3 + [(0, spare), (0, 0)]
    local_keys, local_values = (
      jnp.pad(local_keys, pad),
      jnp.pad(local_values, pad),
    )
  operands = [
    rearrange(rows, "b t m j n h -> b t j (m n) h"),
    in_hbm(prefix_keys),
    in_hbm(prefix_values),
    local_keys,
    local_values,
    per_row(bounds),
    per_row(mask.astype(jnp.float32)),
  ]
  if sinks is not None:
    sinks = rearrange(sinks.astype(jnp.float32), "(j n) -> j n", n=share)
    per_tile = tile.groups * tile.nodes
    operands.append(repeat(sinks, "j n -> j (m n) 1", m=per_tile))
  output = _call(_needed_blocks(bounds, block), operands, block, nodes)
  output = rearrange(output, "b t j (m n) h -> b t m (j n) h", n=share)
  return tile.undo(output, groups)


class _Tile(NamedTuple):
  """What one tile holds: whole groups, or some nodes of a single one."""

  groups: int
  nodes: int

  def of_nodes(self, x):
    """Values of each node, tile by tile."""
    spec = "b (t g) (u r) ... -> b (t u) (g r) ..."
    return rearrange(x, spec, g=self.groups, r=self.nodes)

  def of_groups(self, x):
    """Local keys: all of the groups that a tile's nodes belong to."""
    spec = "b (t g) k j h -> b t j (g k) h"
    return rearrange(x, spec, g=self.groups)

  def undo(self, x, groups):
    """The inverse of `of_nodes`."""
    spec = "b (t u) (g r) n h -> b (t g) (u r) n h"
    tiles = groups // self.groups
    return rearrange(x, spec, t=tiles, g=self.groups)


def _tile(groups, nodes, share):
  """The largest tile within `MAX_ROWS` and `MAX_LOCAL_KEYS`."""
  if nodes * share > MAX_ROWS:
    return _Tile(1, _largest_divisor(nodes, MAX_ROWS // share))
  most = min(MAX_ROWS // (nodes * share), MAX_LOCAL_KEYS // nodes)
  return _Tile(_largest_divisor(groups, most), nodes)


def _largest_divisor(number, most):
  return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def _visible_rows(prefix_end, prefix_start, size, shape):
  """First row each node sees, and the one after the last: `[B, G, R, 2]`."""
  end = jnp.broadcast_to(prefix_end[:, :, None], shape)
  start = jnp.zeros(shape, jnp.int32) if prefix_start is None else prefix_start
  return jnp.clip(jnp.stack([start, end], -1), 0, size).astype(jnp.int32)


def _needed_blocks(bounds, block):
  """First block any node of a tile needs, and the one after the last."""
  start, end = bounds[..., 0], bounds[..., 1]
  first = jnp.where(start < end, start, jnp.iinfo(jnp.int32).max).min(-1)
  last = pl.cdiv(jnp.where(start < end, end, 0).max(-1), block)
  return jnp.minimum(first // block, last), last


def _tile_mask(local_mask, groups, tile):
  """`mask[b, t, i, k]`: node i of a tile sees the k-th of its local keys."""
  batch, _, nodes, _ = local_mask.shape
  mask = jnp.broadcast_to(local_mask, (batch, groups, nodes, nodes))
  spec = "b (t g) (u r) k -> b t u g r 1 k"
  mask = rearrange(mask, spec, g=tile.groups, r=tile.nodes)
  same_group = jnp.eye(tile.groups, dtype=bool)[:, None, :, None]
  return rearrange(mask & same_group, "b t u g r e k -> b (t u) (g r) (e k)")


def _call(blocks, operands, block, nodes):
  """The kernel over (row, tile, key head, block of the prefix).

  Args:
    blocks: `_needed_blocks`, the scalars that are prefetched.
    operands: as `_kernel` takes them.
    block: rows of the prefix in one block.
    nodes: of a group; its tiles share their local keys.
  """
  first, last = blocks
  batch, tiles, kv_heads, rows, head_dim = operands[0].shape
  local, mask = operands[3], operands[6]
  transposed = is_transposed(head_dim)
  size = operands[1].shape[3 if transposed else 2]
  tiles_per_group = tiles // local.shape[1]
  num_blocks = jnp.maximum((last - first).max(), 1)

  def prefix_block(b, t, j, i, first, last):
    # Clamped: a block that is there already is not fetched again.
    block = jnp.clip(first[b, t] + i, 0, jnp.maximum(last[b, t] - 1, 0))
    return (b, j, 0, block) if transposed else (b, j, block, 0)

  of_tile = lambda b, t, j, i, *_: (b, t, j, 0, 0)
  of_groups = lambda b, t, j, i, *_: (b, t // tiles_per_group, j, 0, 0)
  shared = lambda b, t, j, i, *_: (b if mask.shape[0] > 1 else 0, t, 0, 0)
  rows_spec = pl.BlockSpec((None, None, None, rows, head_dim), of_tile)
  prefix = (head_dim, block) if transposed else (block, head_dim)
  prefix_spec = pl.BlockSpec((None, None, *prefix), prefix_block)
  local_spec = pl.BlockSpec((None, None, None, *local.shape[3:]), of_groups)
  in_specs = [
    rows_spec,
    *(prefix_spec, prefix_spec),
    *(local_spec, local_spec),
    pl.BlockSpec((None, None, rows, 2), lambda b, t, *_: (b, t, 0, 0)),
    pl.BlockSpec((None, None, rows, mask.shape[3]), shared),
    pl.BlockSpec((None, rows, 1), lambda b, t, j, *_: (j, 0, 0)),
  ]
  column = pltpu.VMEM((rows, 1), jnp.float32)
  return pl.pallas_call(
    functools.partial(_kernel, block=block, size=size, axis=int(transposed)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(batch, tiles, kv_heads, num_blocks),
      in_specs=in_specs[: len(operands)],
      out_specs=rows_spec,
      scratch_shapes=[
        pltpu.VMEM((rows, head_dim), jnp.float32),
        column,
        column,
      ],
    ),
    out_shape=jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",) * 3 + ("arbitrary",)
    ),
    name="cascade_attention",
  )(first, last, *operands)


def _kernel(
  first,
  last,
  query,
  keys,
  values,
  local_keys,
  local_values,
  bounds,
  mask,
  *refs,
  block,
  size,
  axis,
):
  """One block of the prefix for one tile; with the last one the local part.

  Args:
    first: first block the tile needs (scalars, as is `last`).
    last: the block after the last it needs.
    query: `[rows, H]`, rows being nodes times heads.
    keys: `[block, H]`, or `[H, block]` where `axis` is 1.
    values: as `keys`.
    local_keys: `[local, H]`.
    local_values: `[local, H]`.
    bounds: `[rows, 2]`, the prefix rows that are seen.
    mask: `[rows, local]`, 1 where a local key is seen.
    *refs: sinks `[rows, 1]` if there are any; the output `[rows, H]`; weighted
      sum, highest score and sum of weights so far.
    block: rows of a block.
    size: S; the last block may reach beyond it.
    axis: of the prefix's rows in its blocks.
  """
  *sinks, output, acc, top, total = refs
  row, tile, step = pl.program_id(0), pl.program_id(1), pl.program_id(3)
  here = first[row, tile] + step

  @pl.when(step == 0)
  def _():
    acc[...] = jnp.zeros_like(acc)
    top[...] = sinks[0][...] if sinks else jnp.full_like(top, _LEAST)
    total[...] = jnp.full_like(total, 1.0 if sinks else 0.0)

  def attend(keys, values, seen, axis):
    scores = _dot(query[...], keys, contract=1 - axis) * query.shape[-1] ** -0.5
    scores = jnp.where(seen, scores, _UNSEEN)
    highest = jnp.maximum(top[...], scores.max(-1, keepdims=True))
    weights, decay = jnp.exp(scores - highest), jnp.exp(top[...] - highest)
    total[...] = total[...] * decay + weights.sum(-1, keepdims=True)
    weighted = _dot(weights.astype(values.dtype), values, contract=axis)
    acc[...] = acc[...] * decay + weighted
    top[...] = highest

  @pl.when(here < last[row, tile])
  def _():
    rows = query.shape[0]
    at = here * block + jax.lax.broadcasted_iota(jnp.int32, (rows, block), 1)
    seen = (at >= bounds[:, 0:1]) & (at < bounds[:, 1:2])
    weighed = values[...]
    if size % block:  # Past the cache's end lies anything, and 0 × NaN is NaN.
      at = here * block + jax.lax.broadcasted_iota(
        jnp.int32, values.shape, axis
      )
      weighed = jnp.where(at < size, weighed, jnp.zeros_like(weighed))
    attend(keys[...], weighed, seen, axis)

  @pl.when(step == pl.num_programs(3) - 1)
  def _():
    attend(local_keys[...], local_values[...], mask[...] > 0, 0)
    some = jnp.where(total[...] > 0, total[...], 1.0)
    output[...] = (acc[...] / some).astype(output.dtype)


def _dot(a, b, *, contract):
  """`a` [m, k] by `b` along b's dimension `contract`; float32 is exact."""
  exact = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (contract,)), ((), ())),
    precision=jax.lax.Precision("highest" if exact else "default"),
    preferred_element_type=jnp.float32,
  )

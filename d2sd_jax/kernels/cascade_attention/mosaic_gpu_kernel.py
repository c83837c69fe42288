"""The Hopper kernel of cascade attention, in Pallas Mosaic GPU.

One block serves up to three tiles of 64 query rows, one tile a warpgroup, of
one batch row and key head. Another warpgroup streams keys and values through
shared memory, so that all the block's tiles share one read of the cache, and
reads no tile past the length. A long prefix is cut into splits, one block
each; the last split also attends to the local keys. Whatever splits leave is
merged by their log-sum-exp, in float32.

Logarithms here are base 2: `exp2` is one instruction, `exp` is two.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from d2sd_jax.kernels.cascade_attention.mosaic_gpu_tile import (
  CHUNK,
  CHUNKS,
  ROWS,
  Tile,
)
from d2sd_jax.typing import Array

# Registers of a thread: what loads gives up, what computes gets, by the number
# of computing warpgroups. One alone has enough as it is.
_REGISTERS = {2: (40, 232), 3: (32, 160)}


@dataclasses.dataclass(frozen=True)
class Plan:
  """How the work is cut.

  Attributes:
    warpgroups: tiles of 64 query rows in a block.
    blocks: blocks that share the query rows of one batch row and key head.
    block_keys: keys in a step; a multiple of 64.
    stages: steps whose keys and values are in shared memory at once.
    splits: parts of the prefix and the local keys, the latter in the last.
    registers: whether probabilities go to the tensor cores from registers, as
      they should, or through shared memory, as Pallas' interpreter needs it.
  """

  warpgroups: int
  blocks: int
  block_keys: int
  stages: int
  splits: int
  registers: bool = True

  @property
  def rows(self) -> int:
    """Query rows of one batch row and key head, padding included."""
    return self.blocks * self.warpgroups * ROWS


class Operands(NamedTuple):
  """The arrays the kernel reads.

  Attributes:
    query: [B, R, all, H], R nodes of all groups; see `First`.
    prefix_keys: [B, J, S, H].
    prefix_values: as `prefix_keys`.
    local_keys: [B, R, all, H].
    local_values: [B, R, all, H].
    bounds: int32 [B, 4]: the least start, the largest start, the least end
      and the largest end of any row's prefix.
    rows: int32 [B, 2 + words, Plan.rows]: start and end of each row's prefix,
      then the local keys it sees, 32 to a word, the first the lowest bit. A
      key head's rows are chunks of eight nodes: the first eight nodes for
      each of its query heads in turn, then the next eight.
  """

  query: Array
  prefix_keys: Array
  prefix_values: Array
  local_keys: Array
  local_values: Array
  bounds: Array
  rows: Array


class First(NamedTuple):
  """Where heads begin in the arrays that hold them, and how many share a key.

  Attributes:
    query: the first query head in `Operands.query`.
    keys: the first head in `Operands.local_keys`.
    values: the first head in `Operands.local_values`.
    share: query heads of one key head.
  """

  query: int
  keys: int
  values: int
  share: int

  def chunks(self, nodes: int) -> int:
    """Chunks of query rows of one batch row and key head."""
    return -(-nodes // CHUNK) * self.share

  def moved(self, nodes: int) -> int:
    """Chunks that a tile moves; a lone one of few leaves the others alone."""
    return min(self.chunks(nodes), CHUNKS)


class _Scratch(NamedTuple):
  """Shared memory of a block, and its barriers."""

  query: Any
  keys: Any
  values: Any
  weights: Any
  logs: Any
  query_ready: Any
  keys_ready: Any
  values_ready: Any
  keys_free: Any
  values_free: Any
  cleaned: Any


class _Steps(NamedTuple):
  """Steps of one block: `local`, then prefix tiles `[first, last)`.

  Tiles in `[whole, partial)` are seen whole by every row.
  """

  local: Array
  first: Array
  whole: Array
  partial: Array
  last: Array


def attend(
  operands: Operands,
  plan: Plan,
  first: First,
  *,
  windowed: bool,
  merged: bool,
  interpret: Any = None,
) -> Any:
  """Runs the kernel.

  Args:
    operands: what it reads.
    plan: how the work is cut.
    first: which heads of the operands are meant.
    windowed: whether some row's prefix starts after 0.
    merged: with one split only: whether to return the output itself.
    interpret: `plgpu.InterpretGPUParams` runs it on a CPU.

  Returns:
    `merged`: the output [B, R, J * share, H] in the operands' dtype. Otherwise
    each split's own output [splits, B, J, Plan.rows, H] and base-2 log-sum-exp
    [splits, B, J, Plan.rows], both float32; a row that a split shows nothing
    has zeros, and `UNSEEN`; what lies past the last chunk is not written.
  """
  batch, nodes, _, head_dim = operands.query.shape
  heads = operands.prefix_keys.shape[1]
  shape = jax.ShapeDtypeStruct
  if merged:
    whole = batch, nodes, heads * first.share, head_dim
    out_type: Any = shape(whole, operands.query.dtype)
  else:
    split = (plan.splits, batch, heads, plan.rows)
    out_type = [
      shape((*split, head_dim), jnp.float32),
      shape(split, jnp.float32),
    ]
  run = plgpu.kernel(
    functools.partial(
      _block, plan=plan, first=first, windowed=windowed, merged=merged
    ),
    out_type=out_type,
    scratch_types=_scratch(
      plan, operands.query.dtype, head_dim, first.moved(nodes)
    ),
    grid=(batch, heads, plan.splits, plan.blocks),
    grid_names=("batch", "head", "split", "block"),
    num_threads=plan.warpgroups + 1,
    thread_name="warpgroup",
    # A row lies within a warp: its sums need no shared memory.
    compiler_params=plgpu.CompilerParams(
      approx_math=True, reduction_scratch_bytes=0
    ),
    kernel_name="cascade_attention",
    interpret=interpret,
  )
  return run(*operands)


def _scratch(plan, dtype, head_dim, moved):
  swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
  tiles = lambda *shape: plgpu.SMEM(shape, dtype, transforms=swizzled)
  stage = plan.stages, plan.block_keys, head_dim
  barriers = lambda count, arrivals=1: plgpu.Barrier(
    num_arrivals=arrivals, num_barriers=count
  )
  groups = plan.warpgroups
  weights = None if plan.registers else tiles(groups, ROWS, plan.block_keys)
  return _Scratch(
    query=tiles(groups, ROWS, head_dim),
    keys=tiles(*stage),
    values=tiles(*stage),
    weights=weights,
    logs=plgpu.SMEM((groups, ROWS), jnp.float32),
    query_ready=barriers(groups, moved),
    keys_ready=barriers(plan.stages),
    values_ready=barriers(plan.stages),
    keys_free=barriers(plan.stages, groups),
    values_free=barriers(plan.stages, groups),
    cleaned=barriers(1, groups),
  )


def _block(*refs, plan, first, windowed, merged):
  """Body of one block; its last warpgroup loads, the others compute."""
  count = len(Operands._fields)
  operands = Operands(*refs[:count])
  outputs = refs[count : count + (1 if merged else 2)]
  scratch = _Scratch(*refs[count + len(outputs) :])
  warpgroup = lax.axis_index("warpgroup")
  fewer, more = _REGISTERS.get(plan.warpgroups, (None, None))

  @pl.when(warpgroup == plan.warpgroups)
  def _load():
    if fewer:
      plgpu.set_max_registers(fewer, action="decrease")
    _load_tiles(operands, scratch, plan, first, windowed)

  @pl.when(warpgroup < plan.warpgroups)
  def _compute():
    if more:
      plgpu.set_max_registers(more, action="increase")
    tile = Tile(operands, scratch, plan, first, windowed)
    # What needs no bounds goes first: a look into memory takes a microsecond.
    tile.fetch()
    tile.run(_steps(operands, plan, windowed), outputs)


def _local_steps(operands, plan):
  """Tiles of local keys that are this block's: the last split has them."""
  tiles = _local_tiles(operands, plan)
  return jnp.where(lax.axis_index("split") == plan.splits - 1, tiles, 0)


def _local_tiles(operands, plan):
  return pl.cdiv(operands.local_keys.shape[1], plan.block_keys)


def _steps(operands, plan, windowed):
  """What this block's split holds of the prefix, as tiles of keys.

  As evenly as whole tiles allow; the local ones are all the last split's.
  """
  batch, split = lax.axis_index("batch"), lax.axis_index("split")
  width = jnp.int32(plan.block_keys)
  up = lambda x: lax.div(x + (width - 1), width)
  low, most_low, least_high, high = (
    operands.bounds[batch, i] for i in range(4)
  )
  low = lax.div(low, width) if windowed else jnp.int32(0)
  high = up(high)
  tiles = jnp.maximum(high - low, 0) + _local_tiles(operands, plan)
  share = lax.div(tiles + (plan.splits - 1), jnp.int32(plan.splits))
  first = jnp.minimum(low + split * share, high)
  last = jnp.minimum(first + share, high)
  whole = jnp.clip(up(most_low), first, last) if windowed else first
  partial = jnp.clip(lax.div(least_high, width), whole, last)
  return _Steps(_local_steps(operands, plan), first, whole, partial, last)


def _load_tiles(operands, scratch, plan, first, windowed):
  """Streams the block's tiles: a slot is filled again once all have read it."""
  batch, head = lax.axis_index("batch"), lax.axis_index("head")
  width = plan.block_keys

  def load(step, keys, values):
    slot = lax.rem(step, jnp.int32(plan.stages))

    def fill(source, target, ready, free):
      @pl.when(step >= plan.stages)
      def _wait():
        plgpu.barrier_wait(free.at[slot])

      plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

    fill(keys, scratch.keys, scratch.keys_ready, scratch.keys_free)
    fill(values, scratch.values, scratch.values_ready, scratch.values_free)

  @pl.loop(0, _local_steps(operands, plan))
  def _local(step):
    nodes = pl.ds(step * width, width)
    load(
      step,
      operands.local_keys.at[batch, nodes, first.keys + head],
      operands.local_values.at[batch, nodes, first.values + head],
    )

  steps = _steps(operands, plan, windowed)

  @pl.loop(steps.first, steps.last)
  def _prefix(tile):
    cached = pl.ds(tile * width, width)
    load(
      steps.local + tile - steps.first,
      operands.prefix_keys.at[batch, head, cached],
      operands.prefix_values.at[batch, head, cached],
    )

  # Nothing is left unheard, as the interpreter of jax 0.11 wants it.
  total = steps.local + steps.last - steps.first

  @pl.loop(jnp.maximum(total - plan.stages, 0), total)
  def _drain(step):
    slot = lax.rem(step, jnp.int32(plan.stages))
    plgpu.barrier_wait(scratch.keys_free.at[slot])
    plgpu.barrier_wait(scratch.values_free.at[slot])

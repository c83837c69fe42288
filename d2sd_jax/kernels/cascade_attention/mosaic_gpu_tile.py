"""What one warpgroup of the Hopper kernel computes: 64 query rows."""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from d2sd_jax.kernels.cascade_attention.mosaic_gpu import TILE

# A wgmma takes 64 rows: eight chunks, each of eight nodes and one head, as
# queries lie in memory and the copy engine moves them.
ROWS = 64
CHUNK = TILE
CHUNKS = ROWS // CHUNK
MASK_BITS = 32
# Far below any real score. The running maximum starts above what a masked
# score becomes, so that a masked score always weighs exactly nothing.
UNSEEN = -1e30
LOWEST = -1e28
_FLOAT_TILE = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)


class Tile:
  """One warpgroup's 64 query rows, attending to tile after tile of keys.

  Its state is the output so far [64, H], not yet divided; the largest score so
  far [64], times log2(e); and the sum of weights so far [64].
  """

  def __init__(self, operands, scratch, plan, first, windowed):
    self.operands, self.scratch, self.plan = operands, scratch, plan
    self.first, self.windowed = first, windowed
    self.dtype = operands.query.dtype
    self.head_dim = operands.query.shape[-1]
    self.scale = math.log2(math.e) / math.sqrt(self.head_dim)
    self.batch, self.head = lax.axis_index("batch"), lax.axis_index("head")
    self.warpgroup = lax.axis_index("warpgroup")
    block = lax.axis_index("block")
    self.tile = block * plan.warpgroups + self.warpgroup
    self.rows = pl.ds(self.tile * ROWS, ROWS)

  def fetch(self):
    """Sends for the queries, and for what they see of the prefix."""
    for i, (chunk, _) in enumerate(self._chunks(self.first.query)):
      plgpu.copy_gmem_to_smem(
        self.operands.query.at[chunk],
        self._query(i),
        self.scratch.query_ready.at[self.warpgroup],
      )
    self.starts = self._row(0) if self.windowed else None
    self.ends = self._row(1)

  def run(self, steps, outputs):
    """Attends to all of `steps` and writes what the block leaves."""
    plgpu.barrier_wait(self.scratch.query_ready.at[self.warpgroup])
    state = (
      _full((ROWS, self.head_dim), 0.0, _FLOAT_TILE),
      _full((ROWS,), LOWEST, _ROW),
      _full((ROWS,), 0.0, _ROW),
    )
    state = lax.fori_loop(0, steps.local, self._local, state)
    prefix = functools.partial(self._prefix, steps.local - steps.first)
    masked = functools.partial(prefix, True)
    if self.windowed:
      state = lax.fori_loop(steps.first, steps.whole, masked, state)
    state = lax.fori_loop(
      steps.whole, steps.partial, functools.partial(prefix, False), state
    )
    state = lax.fori_loop(steps.partial, steps.last, masked, state)
    self._write(outputs, *state)

  def _chunks(self, first_head):
    """This tile's chunks: where in an array [B, R, all, H], and if they are.

    What lies past the last node must not be written. Where all nodes are one
    chunk, Pallas drops its index, and another would land on the same place.
    """
    nodes, share = self.operands.query.shape[1], jnp.int32(self.first.share)
    for i in range(self.first.moved(nodes)):
      chunk = self.tile * CHUNKS + i
      rows = pl.ds(lax.div(chunk, share) * CHUNK, CHUNK)
      head = first_head + self.head * share + lax.rem(chunk, share)
      yield (self.batch, rows, head), chunk < self.first.chunks(nodes)

  def _query(self, i):
    """The i-th chunk of this tile in shared memory."""
    chunk = pl.ds(i * CHUNK, CHUNK)
    return self.scratch.query.at[self.warpgroup, chunk]

  def _local(self, step, state):
    """The local keys; those a row may not see are cleared in its words."""
    count = self.plan.block_keys // MASK_BITS
    # Sent for before the keys are waited for.
    words = [self._row(2 + step * count + i) for i in range(count)]
    return self._attend(state, step, lambda: self._local_mask(words))

  def _prefix(self, shift, masked, tile, state):
    """A tile of the prefix, the `shift + tile`-th step of this block."""
    if not masked:
      return self._attend(state, shift + tile, None)
    # Weights of 0 would still make nan of what is not finite.
    end = self.operands.bounds[self.batch, 3]
    seen = end - tile * self.plan.block_keys
    return self._attend(
      state, shift + tile, lambda: self._prefix_mask(tile), seen
    )

  def _attend(self, state, step, mask, seen=None):
    """One tile: scores, online softmax, values (Sec. 3.3's merge, unrolled).

    Args:
      state: of this tile of rows.
      step: of this block; says where the tile lies in shared memory.
      mask: makes the mask [64, block_keys]; `None` sees all.
      seen: rows of the tile from here on hold nothing; `None`: all hold some.
    """
    output, top, total = state
    scratch = self.scratch
    slot = lax.rem(step, jnp.int32(self.plan.stages))
    if seen is not None:
      # First of all, while few registers are in use.
      plgpu.barrier_wait(scratch.values_ready.at[slot])
      self._clean(slot, seen)
    plgpu.barrier_wait(scratch.keys_ready.at[slot])
    scores = _product(
      scratch.query.at[self.warpgroup],
      scratch.keys.at[slot].transpose((1, 0)),
      (ROWS, self.plan.block_keys),
    )
    plgpu.barrier_arrive(scratch.keys_free.at[slot])
    if mask is not None:
      scores = jnp.where(mask(), scores, UNSEEN)
    new_top = jnp.maximum(top, scores.max(axis=1) * self.scale)
    weights = jnp.exp2(scores * self.scale - _across(new_top, scores.shape))
    decay = jnp.exp2(top - new_top)
    total = total * decay + weights.sum(axis=1)
    output = output * _across(decay, output.shape)
    if seen is None:
      plgpu.barrier_wait(scratch.values_ready.at[slot])
    output = self._weigh(output, weights.astype(self.dtype), slot)
    plgpu.barrier_arrive(scratch.values_free.at[slot])
    return output, new_top, total

  def _weigh(self, output, weights, slot):
    """Adds the weighted values."""
    values = self.scratch.values.at[slot]
    if self.plan.registers:
      add = lambda sums: plgpu.wgmma(sums, weights, values)
      return pl.run_state(add)(plgpu.ACC.init(output))
    shared = self.scratch.weights.at[self.warpgroup]
    shared[...] = weights
    plgpu.commit_smem()
    return output + _product(shared, values, output.shape)

  def _clean(self, slot, seen):
    """Zeroes the values of a tile from row `seen` on."""

    @pl.when(seen < self.plan.block_keys)
    def _partial():
      @pl.when(self.warpgroup == 0)
      def _zero():
        for row in range(0, self.plan.block_keys, ROWS):
          values = self.scratch.values.at[slot, pl.ds(row, ROWS)]
          shape = (ROWS, self.head_dim)
          held = _iota(shape, 0) < seen - row
          kept = plgpu.load(values, layout=_FLOAT_TILE)
          values[...] = jnp.where(held, kept, jnp.zeros((), self.dtype))
        plgpu.commit_smem()

      if self.plan.warpgroups > 1:
        plgpu.barrier_arrive(self.scratch.cleaned)
        plgpu.barrier_wait(self.scratch.cleaned)

  def _row(self, index):
    """A line of `Operands.rows`, of this tile's rows."""
    line = self.operands.rows.at[self.batch, index, self.rows]
    return plgpu.load(line, layout=_ROW, optimized=False)

  def _prefix_mask(self, tile):
    shape = (ROWS, self.plan.block_keys)
    # Rows move by the tile, not keys: that keeps fewer registers alive.
    moved = lambda row: _across(row - tile * self.plan.block_keys, shape)
    mask = _iota(shape, 1) < moved(self.ends)
    if self.windowed:
      mask = mask & (_iota(shape, 1) >= moved(self.starts))
    return mask

  def _local_mask(self, words):
    shape = (ROWS, self.plan.block_keys)
    key = _iota(shape, 1)
    mask = jnp.int32(0)
    for i, word in enumerate(words):
      mask = jnp.where(key >= i * MASK_BITS, _across(word, shape), mask)
    bit = lax.shift_right_logical(mask, key & (MASK_BITS - 1)) & 1
    return bit != 0

  def _write(self, outputs, output, top, total):
    """Writes the output, or the output and log-sum-exp of the split."""
    some = total > 0
    inverse = jnp.where(some, 1.0 / jnp.where(some, total, 1.0), 0.0)
    output = output * _across(inverse, output.shape)
    if len(outputs) == 1:
      # No product reads the query any more.
      shared = self.scratch.query.at[self.warpgroup]
      shared[...] = output.astype(self.dtype)
      plgpu.commit_smem()
      for i, (chunk, is_there) in enumerate(self._chunks(0)):
        copy = functools.partial(
          plgpu.copy_smem_to_gmem, self._query(i), outputs[0].at[chunk]
        )
        pl.when(is_there)(copy)
    else:
      # A block's last tiles may hold no node; nothing reads what they leave.
      nodes = self.operands.query.shape[1]
      is_there = self.tile * CHUNKS < self.first.chunks(nodes)

      @pl.when(is_there)
      def _split():
        at = lax.axis_index("split"), self.batch, self.head, self.rows
        outputs[0].at[at][...] = output
        logs = self.scratch.logs.at[self.warpgroup]
        logs[...] = jnp.where(some, top + jnp.log2(total), UNSEEN)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(logs, outputs[1].at[at])

    # The kernel's end waits for the writes themselves.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _product(left, right, shape):
  """The float32 product of two tiles in shared memory."""

  def multiply(sums):
    plgpu.wgmma(sums, left, right)
    return sums[...]

  return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _full(shape, value, layout):
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _iota(shape, axis):
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_FLOAT_TILE)


def _across(column, shape):
  """A value a row, for all columns."""
  return lax.broadcast_in_dim(column, shape, [0])

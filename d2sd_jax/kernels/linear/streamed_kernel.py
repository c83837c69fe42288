"""The kernel of `streamed`, in Pallas Mosaic GPU.

The 64 rows that a wgmma takes are the matrix's, so few rows of `x` waste
nothing. The blocks of a cluster share a strip of the matrix: tiles of 64 rows,
one for each block or for two, which then have half of `x`'s rows each. A block
multiplies all of the strip by all of `x`, for its own share of the columns, so
that it reads no more of `x` than that; then it sends the others what they miss
of their own part, and finishes its own.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from d2sd_jax.kernels.linear.streamed import TILE, Plan, half_sizes
from d2sd_jax.typing import Array, Float

_TILE = plgpu.Layout.WGMMA
_TURNED = plgpu.Layout.WGMMA_TRANSPOSED


class _Scratch(NamedTuple):
  """Shared memory of a block, and its barriers."""

  x: Any
  matrix: Any
  out: Any
  sums: Any
  ready: Any
  out_ready: Any
  sums_ready: Any


# All layers of a model share one lowering this way.
@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def multiply(
  x: Float[Array, "R D"],
  stored: Float[Array, "parts out D"],
  residual: Float[Array, "R out"] | None,
  plan: Plan,
  *,
  interpret: Any = None,
) -> Float[Array, "R out"]:
  """Runs the kernel.

  Args:
    x: whole chunks of rows.
    stored: the matrix, or the gate's and the gated one's.
    residual: added to the result; `None` is nothing.
    plan: how the work is cut.
    interpret: `plgpu.InterpretGPUParams` runs it on a CPU, clusters of one
      block alone.

  Returns:
    As many rows, in `x`'s dtype.
  """
  count, (parts, size, _) = len(x), stored.shape
  given = {"x": x, "stored": stored, "residual": residual}
  names = [name for name, array in given.items() if array is not None]
  run = plgpu.kernel(
    functools.partial(_block, names=names, plan=plan),
    out_type=jax.ShapeDtypeStruct((count, size), x.dtype),
    scratch_types=_scratch(plan, x.dtype, count, parts),
    grid=(size // (plan.tiles * TILE),),
    grid_names=("strip",),
    **_cluster(plan),
    num_threads=1,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(
      approx_math=True, unsafe_no_auto_barriers=True
    ),
    kernel_name="streamed",
    interpret=interpret,
  )
  return run(*(given[name] for name in names))


def _cluster(plan):
  if plan.blocks == 1:
    return {}
  return {"cluster": (plan.blocks,), "cluster_names": ("block",)}


def _scratch(plan, dtype, count, parts):
  def tiles(dtype, *shape, row=None):
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle((row or shape[-1]) * bits)
    transforms = (
      plgpu.TilingTransform((8, 8 * swizzle // bits)),
      plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)

  barriers = lambda count, arrivals=1: plgpu.Barrier(
    num_arrivals=arrivals, num_barriers=count
  )
  others, sizes = plan.blocks - 1, half_sizes(count, plan.halves)
  sums = others, parts, TILE, sizes[0]
  return _Scratch(
    x=tiles(dtype, plan.stages, count, plan.columns),
    matrix=tiles(dtype, plan.stages, plan.tiles, parts, TILE, plan.columns),
    out=tiles(dtype, sizes[0], TILE),
    # Its tiles fit rows of either half's size.
    sums=tiles(jnp.float32, *sums, row=math.gcd(*sizes)) if others else None,
    ready=barriers(plan.stages, 1 + plan.tiles),
    out_ready=barriers(1),
    sums_ready=barriers(1, others * parts) if others else None,
  )


def _block(*refs, names, plan):
  """Body of one block."""
  given = dict(zip(names, refs, strict=False))
  out, *scratch = refs[len(names) :]
  block = _Block(given, out, _Scratch(*scratch), plan)
  block.fetch()
  sums = block.multiply()
  for half in range(plan.halves):
    pl.when(block.half == half)(functools.partial(block.finish, sums, half))


class _Block:
  """A share of a strip's columns, and then one of its tiles, or half of it."""

  def __init__(self, given, out, scratch, plan):
    self.x, self.stored = given["x"], given["stored"]
    self.residual = given.get("residual")
    self.out, self.scratch, self.plan = out, scratch, plan
    self.parts = self.stored.shape[0]
    self.steps = self.x.shape[1] // (plan.columns * plan.blocks)
    self.own = jnp.int32(0) if plan.blocks == 1 else lax.axis_index("block")
    self.tile = lax.div(self.own, jnp.int32(plan.halves))
    self.half = lax.rem(self.own, jnp.int32(plan.halves))
    first, *_ = self.sizes = half_sizes(self.x.shape[0], plan.halves)
    self.firsts = [0, first]

  def fetch(self):
    """Sends for all that needs no other to be done with."""
    for step in range(self.plan.stages):
      self._load(step)
    if self.residual is not None:
      for half in range(self.plan.halves):
        pl.when(self.half == half)(functools.partial(self._load_residual, half))

  def multiply(self):
    """The own tile's sums over own columns, the next tile's, and so on.

    Each is a list of parts, float32 [TILE, R].
    """
    shape = TILE, self.x.shape[0]

    def add(sums):
      lax.fori_loop(0, self.steps, functools.partial(self._step, sums), None)
      plgpu.wgmma_wait(0)
      return [[part[...] for part in tile] for tile in sums]

    return pl.run_scoped(
      add,
      [
        [plgpu.ACC(shape, jnp.float32) for _ in range(self.parts)]
        for _ in range(self.plan.tiles)
      ],
    )

  def finish(self, sums, half):
    """Sends what others miss, and writes the own half of the own tile."""
    own = [self._of(part, half) for part in sums[0]]
    for turn, tile in enumerate(sums):
      for other in range(self.plan.halves):
        if (turn, other) != (0, half):
          self._send(tile, turn, half, other)
    self._write(self._receive(own, half), half)

  def _tile_at(self, turn):
    """Which of the strip's tiles comes at a turn; the own one is first."""
    return lax.rem(self.tile + turn, jnp.int32(self.plan.tiles))

  def _rows(self, turn):
    """The matrix's rows of that tile."""
    first = lax.axis_index("strip") * self.plan.tiles
    return pl.ds((first + self._tile_at(turn)) * TILE, TILE)

  def _of(self, x, half):
    """A half's rows of `x`, which are columns here."""
    first = self.firsts[half]
    return x[:, first : first + self.sizes[half]]

  def _shared(self, half):
    """Where the result is put together."""
    return self.scratch.out.at[pl.ds(0, self.sizes[half])]

  def _at(self, array, half):
    """The part of the result, or of the residual, that is the block's own."""
    rows = pl.ds(self.firsts[half], self.sizes[half])
    return array.at[rows, self._rows(0)]

  def _load_residual(self, half):
    plgpu.copy_gmem_to_smem(
      self._at(self.residual, half), self._shared(half), self.scratch.out_ready
    )

  def _load(self, step):
    """Sends for the operands of a step."""
    slot = lax.rem(jnp.int32(step), jnp.int32(self.plan.stages))
    # The blocks of a cluster read side by side.
    first = (step * self.plan.blocks + self.own) * self.plan.columns
    at, ready = pl.ds(first, self.plan.columns), self.scratch.ready.at[slot]
    for turn in range(self.plan.tiles):
      plgpu.copy_gmem_to_smem(
        self.stored.at[:, self._rows(turn), at],
        self.scratch.matrix.at[slot, turn],
        ready,
      )
    plgpu.copy_gmem_to_smem(self.x.at[:, at], self.scratch.x.at[slot], ready)

  def _step(self, sums, step, _):
    """Adds the product of a step's columns."""
    slot = lax.rem(step, jnp.int32(self.plan.stages))
    plgpu.barrier_wait(self.scratch.ready.at[slot])
    x = self.scratch.x.at[slot].transpose((1, 0))
    for turn, tile in enumerate(sums):
      for i, part in enumerate(tile):
        plgpu.wgmma(part, self.scratch.matrix.at[slot, turn, i], x)
    # The products of this step may last while the next one's are sent off,
    # where a slot more than that keeps the copies going.
    behind = 1 if self.plan.stages > 2 else 0
    plgpu.wgmma_wait(behind * self.plan.tiles * self.parts)
    done = step - behind

    @pl.when((done >= 0) & (done + self.plan.stages < self.steps))
    def _next():
      # All warps are done with the slot.
      plgpu.commit_smem()
      self._load(done + self.plan.stages)

  def _send(self, tile, turn, half, other):
    """Sends a tile's sums for the other half's rows to the block they are for.

    It keeps them by how far away, in tiles and halves, they come from.
    """
    slot = turn * self.plan.halves + (half if turn else 0) - (turn > 0)
    for i, part in enumerate(tile):
      to = self.scratch.sums.at[slot, i, :, pl.ds(0, self.sizes[other])]
      plgpu.async_store_smem(
        self._of(part, other),
        to,
        self.scratch.sums_ready,
        cluster_idx=self._tile_at(turn) * self.plan.halves + other,
        cluster_dim="block",
      )

  def _receive(self, own, half):
    """The own sums, with what all other blocks sent."""
    if self.plan.blocks == 1:
      return own
    plgpu.barrier_wait(self.scratch.sums_ready)
    for slot in range(self.plan.blocks - 1):
      left = [
        self.scratch.sums.at[slot, i, :, pl.ds(0, self.sizes[half])]
        for i in range(self.parts)
      ]
      left = [plgpu.load(ref, layout=_TILE) for ref in left]
      own = [a + b for a, b in zip(own, left, strict=True)]
    return own

  def _write(self, sums, half):
    """Gates the product, adds to it and writes it."""
    result = sums[0]
    if len(sums) == 2:
      result = result / (1.0 + jnp.exp(-result)) * sums[1]
    shared = self._shared(half)
    turned = shared.transpose((1, 0))
    if self.residual is not None:
      plgpu.barrier_wait(self.scratch.out_ready)
      added = plgpu.layout_cast(plgpu.load(turned, layout=_TURNED), _TILE)
      result = result + added.astype(jnp.float32)
      plgpu.commit_smem()
    result = result.astype(self.scratch.out.dtype)
    turned[...] = plgpu.layout_cast(result, _TURNED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared, self._at(self.out, half))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

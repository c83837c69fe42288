"""The kernel of `streamed`, in Pallas Mosaic GPU.

The 64 rows that a wgmma takes are the matrix's, so few rows of `x` waste
nothing. The blocks of a cluster share a strip of the matrix, a tile of 64 rows
for each of them. Each multiplies all of the strip, for its own share of the
columns, so that it reads no more than that share of `x`; then it sends the
others what they miss of their own tiles, and finishes its own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from d2sd_jax.kernels.linear.streamed import TILE, Plan
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
    grid=(size // (plan.blocks * TILE),),
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
  def tiles(dtype, *shape):
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    transforms = (
      plgpu.TilingTransform((8, 8 * swizzle // bits)),
      plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)

  barriers = lambda count, arrivals=1: plgpu.Barrier(
    num_arrivals=arrivals, num_barriers=count
  )
  others = plan.blocks - 1
  return _Scratch(
    x=tiles(dtype, plan.stages, count, plan.columns),
    matrix=tiles(dtype, plan.stages, plan.blocks, parts, TILE, plan.columns),
    out=tiles(dtype, count, TILE),
    sums=tiles(jnp.float32, others, parts, TILE, count) if others else None,
    ready=barriers(plan.stages, 1 + plan.blocks),
    out_ready=barriers(1),
    sums_ready=barriers(1, others * parts) if others else None,
  )


def _block(*refs, names, plan):
  """Body of one block."""
  given = dict(zip(names, refs, strict=False))
  out, *scratch = refs[len(names) :]
  block = _Block(given, out, _Scratch(*scratch), plan)
  block.fetch()
  pl.run_scoped(block.finish, block.accumulators())


class _Block:
  """A share of a strip's columns, and then one of its tiles."""

  def __init__(self, given, out, scratch, plan):
    self.x, self.stored = given["x"], given["stored"]
    self.residual = given.get("residual")
    self.out, self.scratch, self.plan = out, scratch, plan
    self.steps = self.x.shape[1] // (plan.columns * plan.blocks)
    self.own = jnp.int32(0) if plan.blocks == 1 else lax.axis_index("block")

  def accumulators(self):
    """Of the block's own tile, of the next block's, and so on."""
    shape = TILE, self.x.shape[0]
    return [
      [plgpu.ACC(shape, jnp.float32) for _ in range(self.stored.shape[0])]
      for _ in range(self.plan.blocks)
    ]

  def fetch(self):
    """Sends for all that needs no other to be done with."""
    for step in range(self.plan.stages):
      self._load(step)
    if self.residual is not None:
      plgpu.copy_gmem_to_smem(
        self.residual.at[:, self._rows(0)],
        self.scratch.out,
        self.scratch.out_ready,
      )

  def finish(self, sums):
    """Multiplies, sends, and writes the own tile."""
    lax.fori_loop(0, self.steps, functools.partial(self._step, sums), None)
    plgpu.wgmma_wait(0)
    own, *others = [[part[...] for part in tile] for tile in sums]
    self._send(others)
    self._write(self._receive(own))

  def _block_of(self, turn):
    """Which block's tile comes at a turn; the own one is first."""
    return lax.rem(self.own + turn, jnp.int32(self.plan.blocks))

  def _rows(self, turn):
    """The matrix's rows of that tile."""
    first = lax.axis_index("strip") * self.plan.blocks
    return pl.ds((first + self._block_of(turn)) * TILE, TILE)

  def _load(self, step):
    """Sends for the operands of a step."""
    slot = lax.rem(jnp.int32(step), jnp.int32(self.plan.stages))
    # The blocks of a cluster read side by side.
    first = (step * self.plan.blocks + self.own) * self.plan.columns
    at, ready = pl.ds(first, self.plan.columns), self.scratch.ready.at[slot]
    for turn in range(self.plan.blocks):
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
    # The products of this step may last while the next one's are sent off.
    behind = min(1, self.plan.stages - 1)
    plgpu.wgmma_wait(behind * len(sums) * len(sums[0]))
    done = step - behind

    @pl.when((done >= 0) & (done + self.plan.stages < self.steps))
    def _next():
      # All warps are done with the slot.
      plgpu.commit_smem()
      self._load(done + self.plan.stages)

  def _send(self, others):
    """Sends every other block its tile's sums."""
    for turn, tile in enumerate(others):
      for i, part in enumerate(tile):
        plgpu.async_store_smem(
          part,
          self.scratch.sums.at[turn, i],
          self.scratch.sums_ready,
          cluster_idx=self._block_of(turn + 1),
          cluster_dim="block",
        )

  def _receive(self, own):
    """The own tile's sums, with what the other blocks sent."""
    if self.plan.blocks == 1:
      return own
    plgpu.barrier_wait(self.scratch.sums_ready)
    for turn in range(self.plan.blocks - 1):
      own = [
        part + plgpu.load(self.scratch.sums.at[turn, i], layout=_TILE)
        for i, part in enumerate(own)
      ]
    return own

  def _write(self, sums):
    """Gates the product, adds to it and writes it."""
    result = sums[0]
    if len(sums) == 2:
      result = result / (1.0 + jnp.exp(-result)) * sums[1]
    shared = self.scratch.out.transpose((1, 0))
    if self.residual is not None:
      plgpu.barrier_wait(self.scratch.out_ready)
      added = plgpu.layout_cast(plgpu.load(shared, layout=_TURNED), _TILE)
      result = result + added.astype(jnp.float32)
      plgpu.commit_smem()
    result = result.astype(self.scratch.out.dtype)
    shared[...] = plgpu.layout_cast(result, _TURNED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(self.scratch.out, self.out.at[:, self._rows(0)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

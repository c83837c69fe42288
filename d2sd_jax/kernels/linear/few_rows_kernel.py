"""The kernel of `few_rows`, in Pallas Mosaic GPU.

A block has some rows of `x` and a strip of the matrix, and is one warpgroup. It
sends for as many steps of both as shared memory holds before it waits for the
first. The norm's factor is one number a row, so it is applied to the sums; the
squares are summed from the rows that are there for the product anyway.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from d2sd_jax.kernels.linear.few_rows import CHUNK, COLUMNS, Plan
from d2sd_jax.typing import Array, Float

# A wgmma takes 64 rows; those past the block's own are nobody's.
ROWS = 64
_TILE = plgpu.Layout.WGMMA
_COLUMN = _TILE.reduce(0)


class _Scratch(NamedTuple):
  """Shared memory of a block, and its barriers."""

  x: Any
  matrix: Any
  norm: Any
  out: Any
  ready: Any
  norm_ready: Any
  out_ready: Any


# All layers of a model share one lowering this way; each takes 0.3 s.
@functools.partial(jax.jit, static_argnames=("plan", "eps", "interpret"))
def multiply(
  x: Float[Array, "R D"],
  stored: Float[Array, "parts out D"],
  norm: Float[Array, " D"] | None,
  residual: Float[Array, "R out"] | None,
  plan: Plan,
  *,
  eps: float,
  interpret: Any = None,
) -> Float[Array, "R out"]:
  """Runs the kernel.

  Args:
    x: whole chunks of rows.
    stored: the matrix, or the gate's and the gated one's.
    norm: of the rows; `None` is none.
    residual: added to the result; `None` is nothing.
    plan: how the work is cut.
    eps: of the norm.
    interpret: `plgpu.InterpretGPUParams` runs it on a CPU.

  Returns:
    As many rows, in `x`'s dtype.
  """
  count, (parts, size, _) = len(x), stored.shape
  if norm is not None:
    # A copy takes no more than 256 along an axis.
    norm = norm.reshape(-1, COLUMNS)
  given = {"x": x, "stored": stored, "norm": norm, "residual": residual}
  names = [name for name, array in given.items() if array is not None]
  run = plgpu.kernel(
    functools.partial(_block, names=names, plan=plan, eps=eps),
    out_type=jax.ShapeDtypeStruct((count, size), x.dtype),
    scratch_types=_scratch(plan, x.dtype, parts, norm),
    grid=(size // plan.strip, pl.cdiv(count, plan.rows)),
    grid_names=("strip", "tile"),
    num_threads=1,
    thread_name="warpgroup",
    # A row lies within a warp: its sums need no shared memory. Barriers before
    # each copy, which Pallas would set, are one for all where a slot is filled
    # again or the result is written.
    compiler_params=plgpu.CompilerParams(
      approx_math=True, reduction_scratch_bytes=0, unsafe_no_auto_barriers=True
    ),
    kernel_name="few_rows",
    interpret=interpret,
  )
  return run(*(given[name] for name in names))


def _scratch(plan, dtype, parts, norm):
  def tiles(*shape):
    swizzle = plgpu.find_swizzle(shape[-1] * 16)
    transforms = (
      plgpu.TilingTransform((8, swizzle // 2)),
      plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)

  barriers = lambda count, arrivals=1: plgpu.Barrier(
    num_arrivals=arrivals, num_barriers=count
  )
  return _Scratch(
    x=tiles(plan.stages, ROWS, COLUMNS),
    matrix=tiles(plan.stages, parts, plan.strip, COLUMNS),
    norm=None if norm is None else plgpu.SMEM(norm.shape, dtype),
    out=tiles(ROWS, plan.strip),
    ready=barriers(plan.stages, 2),
    norm_ready=barriers(1),
    out_ready=barriers(1),
  )


def _block(*refs, names, plan, eps):
  """Body of one block."""
  given = dict(zip(names, refs, strict=False))
  out, *scratch = refs[len(names) :]
  block = _Block(given, out, _Scratch(*scratch), plan)
  block.fetch()
  block.write(block.sums(eps))


class _Block:
  """The product of `plan.rows` rows and a strip of the matrix."""

  def __init__(self, given, out, scratch, plan):
    self.x, self.stored = given["x"], given["stored"]
    self.norm, self.residual = given.get("norm"), given.get("residual")
    self.out, self.scratch, self.plan = out, scratch, plan
    self.steps = self.x.shape[1] // COLUMNS
    self.first = lax.axis_index("tile") * plan.rows
    self.rows = pl.ds(self.first, plan.rows)
    self.strip = pl.ds(lax.axis_index("strip") * plan.strip, plan.strip)

  def fetch(self):
    """Sends for all that needs no other to be done with."""
    if self.norm is not None:
      plgpu.copy_gmem_to_smem(
        self.norm, self.scratch.norm, self.scratch.norm_ready
      )
    for step in range(self.plan.stages):
      self._load(step)
    if self.residual is not None:
      plgpu.copy_gmem_to_smem(
        self.residual.at[self.rows, self.strip],
        self.scratch.out.at[pl.ds(0, self.plan.rows)],
        self.scratch.out_ready,
      )

  def sums(self, eps):
    """The float32 products of each part, of normed rows if there is a norm."""
    shape, normed = (ROWS, self.plan.strip), self.norm is not None
    if normed:
      plgpu.barrier_wait(self.scratch.norm_ready)

    def add(*sums):
      zero = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), _TILE)
      step = functools.partial(self._step, sums)
      squares = lax.fori_loop(0, self.steps, step, zero if normed else ())
      sums = [s[...] for s in sums]
      if not normed:
        return sums
      # Along a row in the end alone: that takes shuffles.
      mean = squares.sum(axis=1) / self.x.shape[1]
      factor = lax.broadcast_in_dim(lax.rsqrt(mean + eps), shape, [0])
      return [s * factor for s in sums]

    parts = self.stored.shape[0]
    accumulators = [plgpu.ACC(shape, jnp.float32) for _ in range(parts)]
    return pl.run_scoped(add, *accumulators)

  def write(self, sums):
    """Gates the product, adds to it and writes it."""
    result = sums[0]
    if len(sums) == 2:
      result = result / (1.0 + jnp.exp(-result)) * sums[1]
    shared = self.scratch.out
    if self.residual is not None:
      plgpu.barrier_wait(self.scratch.out_ready)
      added = plgpu.load(shared, layout=_TILE)
      result = result + added.astype(jnp.float32)
      plgpu.commit_smem()
    shared[...] = result.astype(shared.dtype)
    plgpu.commit_smem()
    # By the chunk, for what lies past the last row must not be written.
    for i in range(self.plan.rows // CHUNK):
      first = self.first + i * CHUNK
      copy = functools.partial(
        plgpu.copy_smem_to_gmem,
        shared.at[pl.ds(i * CHUNK, CHUNK)],
        self.out.at[pl.ds(first, CHUNK), self.strip],
      )
      pl.when(first < self.x.shape[0])(copy)
    # The kernel's end waits for the writes themselves.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  def _load(self, step):
    """Sends for the operands of a step."""
    slot = lax.rem(jnp.int32(step), jnp.int32(self.plan.stages))
    at, ready = pl.ds(step * COLUMNS, COLUMNS), self.scratch.ready.at[slot]
    plgpu.copy_gmem_to_smem(
      self.x.at[self.rows, at],
      self.scratch.x.at[slot, pl.ds(0, self.plan.rows)],
      ready,
    )
    plgpu.copy_gmem_to_smem(
      self.stored.at[:, self.strip, at], self.scratch.matrix.at[slot], ready
    )

  def _step(self, sums, step, squares):
    """Adds the product of 64 columns."""
    slot = lax.rem(step, jnp.int32(self.plan.stages))
    plgpu.barrier_wait(self.scratch.ready.at[slot])
    x = self.scratch.x.at[slot]
    if self.norm is not None:
      x, squares = self._weigh(x, step, squares)
    for i, part in enumerate(sums):
      matrix = self.scratch.matrix.at[slot, i].transpose((1, 0))
      plgpu.wgmma(part, x, matrix)
    plgpu.wgmma_wait(0)
    if self.steps > self.plan.stages:

      @pl.when(step + self.plan.stages < self.steps)
      def _next():
        # All warps are done with the slot.
        plgpu.commit_smem()
        self._load(step + self.plan.stages)

    return squares

  def _weigh(self, x, step, squares):
    """Rows times the norm's weights, and the squares so far."""
    wide = plgpu.load(x, layout=_TILE).astype(jnp.float32)
    squares = squares + wide * wide
    norm = self.scratch.norm.at[step]
    norm = plgpu.load(norm, layout=_COLUMN, optimized=False)
    norm = lax.broadcast_in_dim(norm.astype(jnp.float32), wide.shape, [1])
    weighed = wide * norm
    weighed = weighed.astype(x.dtype)
    if self.plan.registers:
      return weighed, squares
    x[...] = weighed
    plgpu.commit_smem()
    return x, squares

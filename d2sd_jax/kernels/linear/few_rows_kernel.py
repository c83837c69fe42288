"""The kernel of `few_rows`, in Pallas Mosaic GPU.

A block has some rows of `x` and a strip of the matrix. Its warpgroups take
turns with their columns, and the first adds up what they found. Each sends for
as many of its steps as shared memory holds before it waits for the first. The
norm's factor is one number a row, so it is applied to the sums; the squares are
summed from the rows that are there for the product anyway.
"""

import functools
from typing import Any, NamedTuple

import chex
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
_COLUMN, _ROW = _TILE.reduce(0), _TILE.reduce(1)


class _Scratch(NamedTuple):
  """Shared memory of a block, and its barriers.

  Of `x`, `matrix` and `ready` each warpgroup has its own; of `sums` and
  `squares` each but the first, which reads them.
  """

  x: Any
  matrix: Any
  norm: Any
  out: Any
  sums: Any
  squares: Any
  ready: Any
  norm_ready: Any
  out_ready: Any
  summed: Any


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
  chex.assert_is_divisible(size, plan.strip)
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
    num_threads=plan.warpgroups,
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
  slots, others = plan.warpgroups * plan.stages, plan.warpgroups - 1
  floats = lambda *shape: plgpu.SMEM(shape, jnp.float32)
  return _Scratch(
    x=tiles(slots, ROWS, COLUMNS),
    matrix=tiles(slots, parts, plan.strip, COLUMNS),
    norm=None if norm is None else plgpu.SMEM(norm.shape, dtype),
    out=tiles(ROWS, plan.strip),
    sums=floats(others, parts, ROWS, plan.strip) if others else None,
    squares=floats(others, ROWS) if others else None,
    ready=barriers(slots, 2),
    norm_ready=barriers(1),
    out_ready=barriers(1),
    summed=barriers(1, others) if others else None,
  )


def _block(*refs, names, plan, eps):
  """Body of one block."""
  given = dict(zip(names, refs, strict=False))
  out, *scratch = refs[len(names) :]
  block = _Block(given, out, _Scratch(*scratch), plan)
  block.fetch()
  sums, squares = block.multiply()
  warpgroup, summed = block.warpgroup, block.scratch.summed
  if plan.warpgroups == 1:
    block.write(block.normed(sums, squares, eps))
    return

  @pl.when(warpgroup > 0)
  def _leave():
    block.leave(sums, squares)
    plgpu.barrier_arrive(summed)

  @pl.when(warpgroup == 0)
  def _write():
    plgpu.barrier_wait(summed)
    block.write(block.normed(*block.gather(sums, squares), eps))


class _Block:
  """The product of `plan.rows` rows and a strip of the matrix."""

  def __init__(self, given, out, scratch, plan):
    self.x, self.stored = given["x"], given["stored"]
    self.norm, self.residual = given.get("norm"), given.get("residual")
    self.out, self.scratch, self.plan = out, scratch, plan
    self.warpgroup = lax.axis_index("warpgroup")
    steps, count = self.x.shape[1] // COLUMNS, plan.warpgroups
    # The first has as many steps as any.
    self.most_steps = pl.cdiv(steps, count)
    self.steps = lax.div(steps - self.warpgroup + count - 1, jnp.int32(count))
    self.first = lax.axis_index("tile") * plan.rows
    self.rows = pl.ds(self.first, plan.rows)
    self.strip = pl.ds(lax.axis_index("strip") * plan.strip, plan.strip)

  def fetch(self):
    """Sends for all that needs no other to be done with."""
    scratch, leads = self.scratch, self.warpgroup == 0
    if self.norm is not None:

      @pl.when(leads)
      def _norm():
        plgpu.copy_gmem_to_smem(self.norm, scratch.norm, scratch.norm_ready)

    for step in range(self.plan.stages):
      pl.when(step < self.steps)(functools.partial(self._load, step))
    if self.residual is not None:

      @pl.when(leads)
      def _residual():
        plgpu.copy_gmem_to_smem(
          self.residual.at[self.rows, self.strip],
          scratch.out.at[pl.ds(0, self.plan.rows)],
          scratch.out_ready,
        )

  def multiply(self):
    """Float32 products of each part over own columns, and the rows' squares."""
    shape, normed = (ROWS, self.plan.strip), self.norm is not None
    if normed:
      plgpu.barrier_wait(self.scratch.norm_ready)

    def add(*sums):
      zero = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), _TILE)
      step = functools.partial(self._step, sums)
      squares = lax.fori_loop(0, self.steps, step, zero if normed else ())
      plgpu.wgmma_wait(0)
      # Along a row in the end alone: that takes shuffles.
      return [s[...] for s in sums], squares.sum(axis=1) if normed else None

    parts = self.stored.shape[0]
    accumulators = [plgpu.ACC(shape, jnp.float32) for _ in range(parts)]
    return pl.run_scoped(add, *accumulators)

  def leave(self, sums, squares):
    """Puts what `multiply` found where `gather` finds it."""
    own = self.warpgroup - 1
    for i, part in enumerate(sums):
      self.scratch.sums[own, i] = part
    if squares is not None:
      self.scratch.squares[own] = squares

  def gather(self, sums, squares):
    """What all warpgroups found, their own among it."""
    load = functools.partial(plgpu.load, optimized=False)
    for other in range(self.plan.warpgroups - 1):
      shared = [self.scratch.sums.at[other, i] for i in range(len(sums))]
      shared = [load(ref, layout=_TILE) for ref in shared]
      sums = [a + b for a, b in zip(sums, shared, strict=True)]
      if squares is not None:
        left = self.scratch.squares.at[other]
        squares = squares + load(left, layout=_ROW)
    return sums, squares

  def normed(self, sums, squares, eps):
    """Sums times the norm's factor of their rows, if there is a norm."""
    if squares is None:
      return sums
    shape = ROWS, self.plan.strip
    factor = lax.rsqrt(squares / self.x.shape[1] + eps)
    factor = lax.broadcast_in_dim(factor, shape, [0])
    return [s * factor for s in sums]

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

  def _columns(self, step):
    """Which 64 columns an own step is about."""
    return step * self.plan.warpgroups + self.warpgroup

  def _slot(self, step):
    stages = self.plan.stages
    return self.warpgroup * stages + lax.rem(jnp.int32(step), jnp.int32(stages))

  def _load(self, step):
    """Sends for the operands of a step."""
    slot, at = self._slot(step), pl.ds(self._columns(step) * COLUMNS, COLUMNS)
    ready = self.scratch.ready.at[slot]
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
    slot = self._slot(step)
    plgpu.barrier_wait(self.scratch.ready.at[slot])
    x = self.scratch.x.at[slot]
    if self.norm is not None:
      x, squares = self._weigh(x, self._columns(step), squares)
    for i, part in enumerate(sums):
      matrix = self.scratch.matrix.at[slot, i].transpose((1, 0))
      plgpu.wgmma(part, x, matrix)
    # Rows in registers must stay there until they have been read; and a slot
    # that is waited for must not be one that is still to be filled.
    behind = 0 if self.norm is not None or self.plan.stages == 1 else 1
    plgpu.wgmma_wait(behind * len(sums))
    if self.most_steps > self.plan.stages:
      done = step - behind

      @pl.when((done >= 0) & (done + self.plan.stages < self.steps))
      def _next():
        # All warps are done with the slot.
        plgpu.commit_smem()
        self._load(done + self.plan.stages)

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

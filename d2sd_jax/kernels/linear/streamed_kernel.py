"""The kernel of `streamed`, in Pallas Mosaic GPU.

The 64 rows that a wgmma takes are the matrix's, so few rows of `x` waste
nothing. A block multiplies a tile of so many rows by all of `x`, or a cluster
of two does, each block half of the columns: it sends the other what that misses
of its half of `x`'s rows, and finishes its own.
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
    grid=(size // TILE,),
    grid_names=("tile",),
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
  if plan.halves == 1:
    return {}
  return {"cluster": (plan.halves,), "cluster_names": ("half",)}


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
  shared, sizes = plan.halves > 1, half_sizes(count, plan.halves)
  return _Scratch(
    x=tiles(dtype, plan.stages, count, plan.columns),
    matrix=tiles(dtype, plan.stages, parts, TILE, plan.columns),
    out=tiles(dtype, sizes[0], TILE),
    # Its tiles fit rows of either half's size.
    sums=tiles(jnp.float32, parts, TILE, sizes[0], row=math.gcd(*sizes))
    if shared
    else None,
    ready=barriers(plan.stages, 2),
    out_ready=barriers(1),
    sums_ready=barriers(1, parts) if shared else None,
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
  """A tile of the matrix, or half of its columns."""

  def __init__(self, given, out, scratch, plan):
    self.x, self.stored = given["x"], given["stored"]
    self.residual = given.get("residual")
    self.out, self.scratch, self.plan = out, scratch, plan
    self.parts = self.stored.shape[0]
    self.steps = self.x.shape[1] // (plan.columns * plan.halves)
    self.half = jnp.int32(0) if plan.halves == 1 else lax.axis_index("half")
    self.rows = pl.ds(lax.axis_index("tile") * TILE, TILE)
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
    """The tile's sums over own columns: parts, float32 [TILE, R]."""
    shape = TILE, self.x.shape[0]

    def add(sums):
      lax.fori_loop(0, self.steps, functools.partial(self._step, sums), None)
      plgpu.wgmma_wait(0)
      return [part[...] for part in sums]

    sums = [plgpu.ACC(shape, jnp.float32) for _ in range(self.parts)]
    return pl.run_scoped(add, sums)

  def finish(self, sums, half):
    """Sends what the other half misses, and writes the own rows of `x`."""
    own = [self._of(part, half) for part in sums]
    if self.plan.halves > 1:
      self._send(sums, 1 - half)
      own = self._receive(own, half)
    self._write(own, half)

  def _of(self, x, half):
    """A half's rows of `x`, which are columns here."""
    first = self.firsts[half]
    return x[:, first : first + self.sizes[half]]

  def _shared(self, half):
    """Where the result is put together."""
    return self.scratch.out.at[pl.ds(0, self.sizes[half])]

  def _at(self, array, half):
    """The part of the result, or of the residual, that is the block's own."""
    return array.at[pl.ds(self.firsts[half], self.sizes[half]), self.rows]

  def _load_residual(self, half):
    plgpu.copy_gmem_to_smem(
      self._at(self.residual, half), self._shared(half), self.scratch.out_ready
    )

  def _load(self, step):
    """Sends for the operands of a step."""
    slot = lax.rem(jnp.int32(step), jnp.int32(self.plan.stages))
    # Halves read side by side.
    first = (step * self.plan.halves + self.half) * self.plan.columns
    at, ready = pl.ds(first, self.plan.columns), self.scratch.ready.at[slot]
    plgpu.copy_gmem_to_smem(
      self.stored.at[:, self.rows, at], self.scratch.matrix.at[slot], ready
    )
    plgpu.copy_gmem_to_smem(self.x.at[:, at], self.scratch.x.at[slot], ready)

  def _step(self, sums, step, _):
    """Adds the product of a step's columns."""
    stages = self.plan.stages
    slot = lax.rem(step, jnp.int32(stages))
    plgpu.barrier_wait(self.scratch.ready.at[slot])
    x = self.scratch.x.at[slot].transpose((1, 0))
    for i, part in enumerate(sums):
      plgpu.wgmma(part, self.scratch.matrix.at[slot, i], x)
    # The products of this step may last while the next one's are sent off,
    # where a slot more than that keeps the copies going.
    behind = 1 if stages > 2 else 0
    plgpu.wgmma_wait(behind * self.parts)
    done = step - behind

    @pl.when((done >= 0) & (done + stages < self.steps))
    def _next():
      # All warps are done with the slot.
      plgpu.commit_smem()
      self._load(done + stages)

  def _send(self, sums, other):
    for i, part in enumerate(sums):
      plgpu.async_store_smem(
        self._of(part, other),
        self.scratch.sums.at[i, :, pl.ds(0, self.sizes[other])],
        self.scratch.sums_ready,
        cluster_idx=jnp.int32(other),
        cluster_dim="half",
      )

  def _receive(self, own, half):
    """The own sums, with what the other half sent."""
    plgpu.barrier_wait(self.scratch.sums_ready)
    left = [
      self.scratch.sums.at[i, :, pl.ds(0, self.sizes[half])]
      for i in range(self.parts)
    ]
    left = [plgpu.load(ref, layout=_TILE) for ref in left]
    return [a + b for a, b in zip(own, left, strict=True)]

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

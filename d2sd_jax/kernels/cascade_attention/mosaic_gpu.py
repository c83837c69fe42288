"""Cascade attention on Hopper: the operands, the plan and the merge.

`mosaic_gpu_kernel` reads the prefix for tiles of a row's nodes and attends to
their own tree too. It has no gradient of its own: XLA's serves.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from d2sd_jax.errors import require
from d2sd_jax.kernels import hopper, triton
from d2sd_jax.kernels.cascade_attention import merge_triton, xla
from d2sd_jax.kernels.cascade_attention.heads import Heads, in_place
from d2sd_jax.typing import Array

DTYPES = ("bfloat16", "float16")
HEAD_SIZES = (64, 128)
# Rows of a tile in shared memory; arrays are whole tiles, or less than one.
TILE = 8
# More nodes a row are prefill or training, where cuDNN's kernel is the default.
MAX_NODES = 256


def why_not(
  query: Array | Heads,
  prefix_keys: Array,
  local_keys: Array | Heads | None = None,
) -> tuple[str, str, str] | None:
  """What keeps the kernel from these operands, as (field, value, expected).

  Args:
    query: as for `api.cascade_attention`.
    prefix_keys: as for `api.cascade_attention`.
    local_keys: as for `api.cascade_attention`; `None`: of `query`'s dtype.
  """
  arrays = query, prefix_keys, query if local_keys is None else local_keys
  dtypes = {x.dtype.name for x in arrays}
  if len(dtypes) > 1 or not dtypes <= set(DTYPES):
    # The tensor cores' float32 is TF32; ours means float32.
    return "dtype", "/".join(sorted(dtypes)), f"{' or '.join(DTYPES)} alone"
  if query.shape[-1] not in HEAD_SIZES:
    sizes = " or ".join(map(str, HEAD_SIZES))
    return "head size", str(query.shape[-1]), sizes
  size = prefix_keys.shape[2]
  if size > TILE and size % TILE:
    # Others would have to be copied into a larger cache each time.
    return "cache rows", str(size), f"a multiple of {TILE}"
  return None


def wins(
  query: Array | Heads,
  prefix_keys: Array,
  local_keys: Array | Heads | None = None,
) -> bool:
  """Whether this is the default: on Hopper, in decoding, where it fits.

  There it took a fifth to three fifths of XLA's time (docs/performance.md).

  Args:
    query: as for `api.cascade_attention`.
    prefix_keys: as for `api.cascade_attention`.
    local_keys: as for `why_not`.
  """
  return (
    prefix_keys.shape[2] > 0
    and query.shape[1] * query.shape[2] <= MAX_NODES
    and why_not(query, prefix_keys, local_keys) is None
    and hopper.runs_here()
  )


def cascade_attention(
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
  plan=None,
  interpret=None,
):
  """See `api.cascade_attention`; 16-bit operands, head size 64 or 128, Hopper.

  Not float32: its products would be TF32, and float32 means float32 here. XLA
  computes those.

  Args:
    query: as for `api.cascade_attention`.
    prefix_keys: as for `api.cascade_attention`.
    prefix_values: as for `api.cascade_attention`.
    local_keys: as for `api.cascade_attention`.
    local_values: as for `api.cascade_attention`.
    prefix_end: [B, G].
    prefix_start: as for `api.cascade_attention`.
    local_mask: bool [#B, #G, R, R].
    sinks: as for `api.cascade_attention`.
    plan: a `mosaic_gpu_kernel.Plan`; `None` chooses one by the shapes.
    interpret: `InterpretGPUParams` runs the kernel on a CPU.

  Raises:
    UsageError: dtype, head size, JAX or device do not allow the kernel.
  """
  name = "implementation='mosaic_gpu' with "
  if problem := why_not(query, prefix_keys, local_keys):
    field, value, expected = problem
    require(False, name + field, value, expected)
  require(hopper.has_kernels(), name + "jax", jax.__version__, "0.11 or newer")
  if interpret is None:
    expected = "an NVIDIA GPU of compute capability 9.x for it"
    require(hopper.runs_here(), "implementation", "mosaic_gpu", expected)
  arrays = query, prefix_keys, prefix_values, local_keys, local_values, sinks
  options = prefix_end, prefix_start, local_mask
  return _attend_once(plan, interpret, arrays, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan, interpret, arrays, options):
  # Pallas Mosaic is imported where it runs: few do, and it moves fast.
  from d2sd_jax.kernels.cascade_attention import mosaic_gpu_kernel as kernel

  query, prefix_keys, prefix_values, local_keys, local_values, sinks = arrays
  prefix_end, prefix_start, local_mask = options
  batch, groups, nodes, heads, head_dim = query.shape
  kv_heads, size = prefix_keys.shape[1:3]
  share = heads // kv_heads
  lying = [in_place(x) for x in (query, local_keys, local_values)]
  first = kernel.First(*(x.first for x in lying), share)
  rows = first.chunks(groups * nodes) * kernel.CHUNK
  if plan is None:
    plan = choose_plan(rows, batch * kv_heads, size, head_dim, groups * nodes)
  if interpret is not None:
    plan = dataclasses.replace(plan, registers=False)
  if size == 0:
    # The kernel wants some cache to point to; it reads none of it.
    prefix_keys = prefix_values = jnp.zeros(
      (batch, kv_heads, 8, head_dim), query.dtype
    )
  merged = plan.splits == 1 and sinks is None
  query, local_keys, local_values = (
    _to_tiles(rearrange(x.array, "b g r heads h -> b (g r) heads h"), 1)
    for x in lying
  )
  visible = _visible(prefix_end, prefix_start, local_mask, nodes, share, plan)
  outputs = kernel.attend(
    kernel.Operands(
      *(query, prefix_keys, prefix_values, local_keys, local_values),
      *visible,
    ),
    plan,
    first,
    windowed=prefix_start is not None,
    merged=merged,
    interpret=interpret,
  )
  # XLA's merge is for sinks, and for a JAX without Pallas for Triton.
  if not merged and sinks is None and triton.runs_here():
    outputs = merge_triton.merge(
      *outputs,
      nodes=groups * nodes,
      chunk=kernel.CHUNK,
      share=share,
      dtype=query.dtype,
    )
  elif not merged:
    held = min(groups * nodes, kernel.CHUNK)
    outputs = _merge(*(_by_node(x, rows, share, held) for x in outputs), sinks)
  outputs = outputs[:, : groups * nodes].astype(query.dtype)
  return rearrange(outputs, "b (g r) heads h -> b g r heads h", g=groups)


def _forward(plan, interpret, arrays, options):
  return _attend(plan, interpret, arrays, options), (arrays, options)


def _backward(plan, interpret, saved, cotangent):
  return xla.gradient(*saved, cotangent), None


_attend.defvjp(_forward, _backward)
# All layers of a model share one lowering this way; each takes 0.4 s.
_attend_once = jax.jit(_attend, static_argnums=(0, 1))


def choose_plan(
  rows: int, pairs: int, size: int, head_dim: int, local: int
) -> Any:
  """The plan for operands of these sizes on a whole H100 or H200.

  Args:
    rows: query rows of one batch row and key head: nodes, in whole chunks,
      times group heads.
    pairs: batch rows times key heads.
    size: rows of the cache; how many of them are used is not known yet.
    head_dim: head size.
    local: local keys.
  """
  from d2sd_jax.kernels.cascade_attention import mosaic_gpu_kernel as kernel

  tiles = -(-rows // kernel.ROWS)
  # With many blocks, two fit one multiprocessor and hide each other's waits.
  many = tiles == 1 and pairs >= 2 * hopper.MULTIPROCESSORS
  work = _Work(tiles, pairs, size, head_dim, local)
  warpgroups, block_keys, splits = min(
    (
      (warpgroups, block_keys, splits)
      for warpgroups, block_keys in ([(1, 64)] if many else _STEPS[head_dim])
      if warpgroups <= tiles
      for splits in range(1, min(work.steps(block_keys), 32) + 1)
    ),
    key=lambda cut: work.microseconds(*cut),
  )
  stages = most_stages(warpgroups, block_keys, head_dim, 2 if many else 1)
  return kernel.Plan(
    warpgroups=warpgroups,
    blocks=-(-tiles // warpgroups),
    block_keys=block_keys,
    stages=min(stages, 6, max(2, -(-size // block_keys) + 1)),
    splits=splits,
  )


# Microseconds of a step, by the head size, its tiles of query rows (one a
# warpgroup) and its keys; how much longer a mask takes; of a block's begin and
# end; of each tile that a split leaves to be merged. Fitted to sweeps on an
# H200 (docs/performance.md); with heads of 64 only one tile a block was swept,
# and more are as much faster.
_STEPS = {
  128: {
    **{(1, 128): 1.25, (1, 64): 0.62, (2, 128): 1.9, (2, 64): 1.1},
    (3, 64): 1.55,
  },
  64: {
    **{(1, 128): 0.8, (1, 64): 0.29, (2, 128): 1.2, (2, 64): 0.5},
    (3, 64): 0.7,
  },
}
_MASKED, _BEGIN, _LEFT_TILE = 0.25, 6.0, 0.0094


@dataclasses.dataclass(frozen=True)
class _Work:
  """What there is to do, as `choose_plan` gets it; `tiles` of query rows."""

  tiles: int
  pairs: int
  size: int
  head_dim: int
  local: int

  def steps(self, block_keys: int) -> int:
    """Steps of all splits."""
    return -(-self.size // block_keys) + -(-self.local // block_keys)

  def microseconds(
    self, warpgroups: int, block_keys: int, splits: int
  ) -> float:
    """What a plan takes by a count, to be compared with another's.

    Blocks take turns if they are more than there are multiprocessors. What all
    plans have in common, reading the cache once, is not counted.
    """
    blocks = self.pairs * -(-self.tiles // warpgroups)
    waves = -(-blocks * splits // hopper.MULTIPROCESSORS)
    step = _STEPS[self.head_dim][warpgroups, block_keys]
    left = self.pairs * self.tiles * splits if splits > 1 else 0
    longest = self._longest(step, block_keys, splits)
    return waves * (_BEGIN + longest) + left * _LEFT_TILE

  def _longest(self, step: float, block_keys: int, splits: int) -> float:
    """What the longest split takes at most; see `mosaic_gpu_kernel._steps`.

    Masks are on the local tiles, which are the last split's, and on the last
    tile of the prefix.
    """
    local = -(-self.local // block_keys)
    prefix = self.steps(block_keys) - local
    share = -(-(prefix + local) // splits)
    rest = max(prefix - share * (splits - 1), 0)
    last = (rest + local) * step + (local + (rest > 0)) * _MASKED
    others = min(share, prefix) * step + (rest == 0) * _MASKED
    return max(last, others) if splits > 1 else last


def most_stages(
  warpgroups: int, block_keys: int, head_dim: int, resident: int = 1
) -> int:
  """Stages of 16-bit keys and values that fit in shared memory.

  Args:
    warpgroups: tiles of 64 query rows in a block.
    block_keys: keys in a stage.
    head_dim: head size.
    resident: blocks on one multiprocessor at once.
  """
  # Of it, a little is for barriers, logarithms and the system.
  room = (
    hopper.SHARED_MEMORY // resident - 2560 - warpgroups * 64 * head_dim * 2
  )
  return room // (4 * block_keys * head_dim)


def _to_tiles(x, axis):
  """Pads an axis to what the copy engine takes: whole tiles, or part of one."""
  missing = -x.shape[axis] % TILE if x.shape[axis] > TILE else 0
  return jnp.pad(x, [(0, missing * (i == axis)) for i in range(x.ndim)])


def _visible(prefix_end, prefix_start, local_mask, nodes, share, plan):
  """`Operands.bounds` and `.rows`: what each query row sees."""
  batch, groups = prefix_end.shape
  ends = repeat(prefix_end, "b g -> b (g r)", r=nodes)
  starts, bounds = jnp.zeros_like(ends), [jnp.zeros_like(ends[:, 0])] * 2
  if prefix_start is not None:
    starts = jnp.maximum(rearrange(prefix_start, "b g r -> b (g r)"), 0)
    bounds = [starts.min(1), starts.max(1)]
  bounds += [prefix_end.min(1), prefix_end.max(1)]
  words = _words(local_mask, groups, plan.block_keys)
  words = jnp.broadcast_to(words, (batch, *words.shape[1:]))
  lines = [starts[:, None], ends[:, None], words]
  lines = [x.astype(jnp.int32) for x in lines]
  rows = _by_chunk(jnp.concatenate(lines, 1), share)
  missing = plan.rows - rows.shape[2]
  rows = jnp.pad(rows, ((0, 0), (0, 0), (0, missing)))
  return jnp.stack(bounds, 1).astype(jnp.int32), rows


def _by_chunk(lines, share):
  """What is said of each node, of the query rows: [B, lines, rows]."""
  missing = -lines.shape[2] % TILE
  lines = jnp.pad(lines, ((0, 0), (0, 0), (0, missing)))
  return repeat(lines, "b i (a r) -> b i (a n r)", n=share, r=TILE)


def _by_node(x, rows, share, held):
  """Query rows as nodes and heads: [splits, B, nodes, J, share, ...].

  Args:
    x: [splits, B, J, Plan.rows, ...].
    rows: how many of them are in chunks.
    share: query heads of a key head.
    held: nodes of each chunk that are there.
  """
  x = rearrange(
    x[:, :, :, :rows], "s b j (a n r) ... -> s b a r j n ...", n=share, r=TILE
  )
  return rearrange(x[:, :, :, :held], "s b a r ... -> s b (a r) ...")


def _words(local_mask, groups, block_keys):
  """The keys each node sees, 32 to a word: int32 [#B, words, G * R]."""
  nodes = local_mask.shape[-1]
  if groups > 1:
    same = jnp.eye(groups, dtype=bool)[:, None, :, None]
    local_mask = local_mask[:, :, :, None, :] & same
    local_mask = rearrange(local_mask, "b g i k j -> b (g i) (k j)")
  else:
    local_mask = local_mask[:, 0]
  missing = -groups * nodes % block_keys
  bits = jnp.pad(local_mask, ((0, 0), (0, 0), (0, missing)))
  bits = rearrange(bits, "b i (w k) -> b w i k", k=32).astype(jnp.uint32)
  words = (bits << jnp.arange(32, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)
  return jax.lax.bitcast_convert_type(words, jnp.int32)


def _merge(outputs, logs, sinks):
  """The splits' outputs as one, weighted by e^{l - m} (Sec. 3.3).

  Written split by split and for every output, so that XLA makes one kernel of
  it, which reads each split once.
  """
  splits = range(outputs.shape[0])
  tops = [logs[i] for i in splits]
  if sinks is not None:
    sinks = sinks.astype(jnp.float32) * math.log2(math.e)
    tops.append(rearrange(sinks, "(j n) -> j n", j=logs.shape[3]))
  tops = [jnp.broadcast_to(x[..., None], outputs.shape[1:]) for x in tops]
  top = functools.reduce(jnp.maximum, tops)
  weights = [jnp.exp2(x - top) for x in tops]
  total = functools.reduce(jnp.add, weights)
  terms = [outputs[i] * weights[i] for i in splits]
  merged = functools.reduce(jnp.add, terms) / total
  return rearrange(merged, "b r j n h -> b r (j n) h")

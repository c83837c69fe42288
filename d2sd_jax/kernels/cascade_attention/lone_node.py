"""Attention of one node a row over a short prefix, in one launch, in Triton.

A step of autoregressive decoding over a short cache reads little: to split the
prefix among the multiprocessors and to merge the parts takes longer than it
saves. One program has the query heads of a key head, and all of their prefix.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from d2sd_jax.errors import require
from d2sd_jax.kernels import triton
from d2sd_jax.kernels.cascade_attention import xla
from d2sd_jax.kernels.cascade_attention.heads import Heads, in_place
from d2sd_jax.typing import Array

DTYPES = ("bfloat16", "float16")
# What two loads of keys and values leave room for in shared memory.
HEAD_SIZES = (16, 32, 64, 128)
# Capacity up to which it is the default; then splitting the prefix pays. Timed
# for one row of three key heads on an H200.
MOST_KEYS = 512
BLOCK_KEYS = 128
# Rows of a tensor core's least operand.
ROWS = 16


def why_not(
  query: Array | Heads, prefix_keys: Array, local_keys: Array | Heads
) -> str | None:
  """What the kernel asks for that is not so, or `None`.

  Args:
    query: as for `api.cascade_attention`.
    prefix_keys: as for `api.cascade_attention`.
    local_keys: as for `api.cascade_attention`.
  """
  _, groups, nodes, heads, head_dim = query.shape
  share = heads // prefix_keys.shape[1]
  same = {x.dtype.name for x in (query, prefix_keys, local_keys)}
  if not triton.runs_here():
    return triton.DEVICE
  if prefix_keys.shape[2] == 0:
    return "a cache"
  if groups * nodes > 1:
    return "one node a row"
  if len(same) > 1 or not same <= set(DTYPES):
    return f"operands of one dtype of {', '.join(DTYPES)}"
  if head_dim not in HEAD_SIZES or share > ROWS:
    return f"head size 16 to 128, at most {ROWS} query heads to a key head"
  if in_place(query).first % share:
    return "query heads that begin at a whole key head"
  return None


def wins(
  query: Array | Heads, prefix_keys: Array, local_keys: Array | Heads | None
) -> bool:
  """Whether this is the default.

  Args:
    query: as for `api.cascade_attention`.
    prefix_keys: as for `api.cascade_attention`.
    local_keys: as for `api.cascade_attention`; `None`: like `query`.
  """
  local_keys = query if local_keys is None else local_keys
  return (
    prefix_keys.shape[2] <= MOST_KEYS
    and why_not(query, prefix_keys, local_keys) is None
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
):
  """See `api.cascade_attention`; one node a row, 16-bit operands.

  Args:
    query: as for `api.cascade_attention`.
    prefix_keys: as for `api.cascade_attention`.
    prefix_values: as for `api.cascade_attention`.
    local_keys: as for `api.cascade_attention`.
    local_values: as for `api.cascade_attention`.
    prefix_end: [B, 1].
    prefix_start: as for `api.cascade_attention`.
    local_mask: bool [#B, 1, 1, 1].
    sinks: as for `api.cascade_attention`.

  Raises:
    UsageError: operands, JAX or device do not allow the kernel.
  """
  missing = why_not(query, prefix_keys, local_keys)
  require(missing is None, "implementation", "lone_node", str(missing))
  return _attend_once(
    (query, prefix_keys, prefix_values, local_keys, local_values, sinks),
    (prefix_end, prefix_start, local_mask),
  )


@jax.custom_vjp
def _attend(arrays, options):
  query, prefix_keys, prefix_values, local_keys, local_values, sinks = arrays
  prefix_end, prefix_start, local_mask = options
  batch, kv_heads, size, head_dim = prefix_keys.shape
  share = query.shape[3] // kv_heads
  lying = [in_place(x) for x in (query, local_keys, local_values)]
  firsts = [x.first for x in lying]
  flat = [x.array.reshape(batch, -1, head_dim) for x in lying]
  start, end = jnp.zeros((), jnp.int32), prefix_end.reshape(batch)
  if prefix_start is not None:
    start = jnp.maximum(prefix_start.reshape(batch), 0)
  # First and last key, and whether the node sees itself.
  seen = jnp.stack(
    jnp.broadcast_arrays(start, jnp.minimum(end, size), local_mask.reshape(-1)),
    axis=1,
  ).astype(jnp.int32)
  group = lambda first: pl.BlockSpec(
    (None, share, head_dim), lambda b, j: (b, first // share + j, 0)
  )
  single = lambda first: pl.BlockSpec(
    (None, None, head_dim), lambda b, j: (b, first + j, 0)
  )
  prefix = pl.BlockSpec((None, None, size, head_dim), lambda b, j: (b, j, 0, 0))
  operands = [
    (seen, pl.BlockSpec((None, 3), lambda b, _: (b, 0))),
    (flat[0], group(firsts[0])),
    (prefix_keys, prefix),
    (prefix_values, prefix),
    (flat[1], single(firsts[1])),
    (flat[2], single(firsts[2])),
  ]
  if sinks is not None:
    operands.append((sinks, pl.BlockSpec((share,), lambda _, j: (j,))))
  arrays, specs = zip(*operands, strict=True)
  out = triton.call(
    functools.partial(_kernel, block=min(BLOCK_KEYS, _power(size))),
    warps=4,
    stages=2,
    grid=(batch, kv_heads),
    in_specs=specs,
    out_specs=group(0),
    out_shape=jax.ShapeDtypeStruct(
      (batch, kv_heads * share, head_dim), query.dtype
    ),
    name="lone_node",
  )(*arrays)
  return out[:, None, None]


def _forward(arrays, options):
  return _attend(arrays, options), (arrays, options)


def _backward(saved, cotangent):
  return xla.gradient(*saved, cotangent), None


_attend.defvjp(_forward, _backward)
_attend_once = triton.lowered_once()(_attend)


def _power(size):
  """The least power of two that a tensor core takes and that covers `size`."""
  return max(ROWS, pl.next_power_of_2(size))


def _kernel(
  seen_ref, query_ref, keys_ref, values_ref, key_ref, value_ref, *refs, block
):
  """The query heads of one key head."""
  *sinks_ref, out_ref = refs
  load, dot = triton.language.load, triton.language.dot
  size, head_dim = keys_ref.shape
  share = len(query_ref)
  start, end, itself = (seen_ref[i] for i in range(3))
  # Rows past the last head are that head again, and write what it writes.
  heads = jnp.minimum(jnp.arange(ROWS), share - 1)
  at = (heads[:, None], jnp.arange(head_dim)[None])
  query = query_ref[at]
  scale = math.log2(math.e) / math.sqrt(head_dim)

  def step(i, carry):
    top, total, output = carry
    keys_at = i * block + jnp.arange(block)
    there = jnp.broadcast_to((keys_at < size)[:, None], (block, head_dim))
    rows = (pl.ds(i * block, block), slice(None))
    keys = load(keys_ref.at[rows], mask=there, other=0.0)
    scores = dot(query, keys, trans_b=True) * scale
    visible = (keys_at >= start) & (keys_at < end)
    scores = jnp.where(visible[None], scores, -jnp.inf)
    new = jnp.maximum(top, scores.max(1))
    weights = jnp.exp2(scores - new[:, None])
    keep = jnp.exp2(top - new)
    values = load(values_ref.at[rows], mask=there, other=0.0)
    output = output * keep[:, None] + dot(weights.astype(values.dtype), values)
    return new, total * keep + weights.sum(1), output

  # The node itself, and the sink, before any key; low, but no infinity.
  seen = jnp.broadcast_to(itself > 0, (ROWS,))
  own = query.astype(jnp.float32) * key_ref[...].astype(jnp.float32)[None]
  own = jnp.where(seen, own.sum(1) * scale, -1e30)
  top, sunk = own, jnp.zeros((ROWS,), jnp.float32)
  if sinks_ref:
    sink = sinks_ref[0][heads].astype(jnp.float32) * math.log2(math.e)
    top = jnp.maximum(own, sink)
    sunk = jnp.exp2(sink - top)
  weight = jnp.where(seen, jnp.exp2(own - top), 0.0)
  output = weight[:, None] * value_ref[...].astype(jnp.float32)[None]
  _, total, output = jax.lax.fori_loop(
    start // block, pl.cdiv(end, block), step, (top, weight + sunk, output)
  )
  output = output / jnp.where(total > 0, total, 1.0)[:, None]
  out_ref[at] = output.astype(out_ref.dtype)

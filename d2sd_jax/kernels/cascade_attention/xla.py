"""Cascade attention in plain XLA: split, differentiable, any device."""

import jax
import jax.numpy as jnp
from einops import rearrange

from d2sd_jax.kernels.cascade_attention.heads import taken
from d2sd_jax.kernels.dot import dot_float32

# The score of what is not seen: far below any real one, and still finite.
UNSEEN = -1e30
# Longer groups go through in slices, so that a long prompt's scores fit.
MAX_NODES = 1024


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
  """See `api.cascade_attention`."""
  batch, groups, nodes = query.shape[:3]
  share = query.shape[3] // local_keys.shape[3]
  query = rearrange(query, "b g r (j n) h -> b g r j n h", n=share)
  local_mask = jnp.broadcast_to(local_mask, (batch, groups, nodes, nodes))
  if prefix_start is None:
    prefix_start = jnp.zeros((batch, groups, nodes), jnp.int32)
  if sinks is not None:
    sinks = rearrange(sinks, "(j n) -> j 1 1 n", n=share)

  def attend(query, local_mask, prefix_start):
    parts = [_local_part(query, local_keys, local_values, local_mask)]
    if prefix_keys.shape[2]:
      row = jnp.arange(prefix_keys.shape[2])
      seen = row < prefix_end[:, :, None, None]
      seen = seen & (row >= prefix_start[..., None])
      parts.append(_prefix_part(query, prefix_keys, prefix_values, seen))
    output = _merge(parts, sinks).astype(query.dtype)
    return rearrange(output, "b j g r n h -> b g r (j n) h")

  if nodes > MAX_NODES and nodes % MAX_NODES == 0:
    slices = [
      rearrange(x, "b g (c r) ... -> c b g r ...", r=MAX_NODES)
      for x in (query, local_mask, prefix_start)
    ]
    output = jax.lax.map(lambda xs: attend(*xs), slices)
    return rearrange(output, "c b g r ... -> b g (c r) ...")
  return attend(query, local_mask, prefix_start)


# Each part is its masked scores [b, j, g, r, n, keys], batch dimensions first
# as the products leave them, and the weighing of its values.


def gradient(arrays, options, cotangent):
  """The gradient of `cascade_attention`, for kernels that have none.

  Args:
    arrays: its operands, which may be `Heads`, and `sinks`.
    options: `prefix_end`, `prefix_start` and `local_mask`.
    cotangent: of its output.

  Returns:
    Of each of `arrays`.
  """
  *operands, sinks = arrays
  prefix_end, prefix_start, local_mask = options

  def attend(operands, sinks):
    return cascade_attention(
      *map(taken, operands),
      prefix_end=prefix_end,
      prefix_start=prefix_start,
      local_mask=local_mask,
      sinks=sinks,
    )

  operands, sinks = jax.vjp(attend, operands, sinks)[1](cotangent)
  return *operands, sinks


def _prefix_part(query, keys, values, mask):
  """All nodes of all groups against the one shared prefix."""
  scores = dot_float32("bgrjnh,bjsh->bjgrns", query, keys)
  scores = _mask(scores, mask, query.shape[-1])
  return scores, lambda weights: _weigh("bjgrns,bjsh->bjgrnh", weights, values)


def _local_part(query, keys, values, mask):
  """Each group's nodes against the nodes of the same group."""
  # Or XLA merges this product with the prefix's, on a copy of both keys.
  query = jax.lax.optimization_barrier(query)
  scores = dot_float32("bgrjnh,bgkjh->bgjrnk", query, keys)
  scores = rearrange(scores, "b g j r n k -> b j g r n k")
  scores = _mask(scores, mask, query.shape[-1])

  def weigh(weights):
    weights = rearrange(weights, "b j g r n k -> b g j r n k")
    output = _weigh("bgjrnk,bgkjh->bgjrnh", weights, values)
    return rearrange(output, "b g j r n h -> b j g r n h")

  return scores, weigh


def _mask(scores, mask, head_dim):
  """Scaled scores; `UNSEEN` where the mask [b, g, r, keys] is false."""
  mask = mask[:, None, :, :, None, :]
  return jnp.where(mask, scores * head_dim**-0.5, UNSEEN)


def _merge(parts, sinks):
  """One softmax over all parts: their largest score and sum are shared.

  That is the merge of Sec. 3.3, e^{l - m} weighing each part, with m the
  largest score of all instead of the largest log-sum-exp.
  """
  tops = [scores.max(-1) for scores, _ in parts]
  if sinks is not None:
    tops.append(jnp.broadcast_to(sinks.astype(jnp.float32), tops[0].shape))
  top = jax.lax.stop_gradient(jnp.stack(tops).max(0))
  weights = [jnp.exp(scores - top[..., None]) for scores, _ in parts]
  total = sum(part.sum(-1) for part in weights)
  if sinks is not None:
    total = total + jnp.exp(tops[-1] - top)
  output = sum(
    weigh(part) for part, (_, weigh) in zip(weights, parts, strict=True)
  )
  # A node that sees nothing would weigh all alike.
  some = (top > UNSEEN)[..., None]
  return jnp.where(some, output / total[..., None], 0.0)


def _weigh(spec, weights, values):
  """Weighted sum of values, in their dtype, accumulated in float32."""

  def narrow(weights, values):
    return dot_float32(spec, weights.astype(values.dtype), values)

  def wide(weights, values):
    return dot_float32(spec, weights, values.astype(jnp.float32))

  # XLA has no bfloat16 product for some of these layouts on a CPU.
  return jax.lax.platform_dependent(weights, values, cpu=wide, default=narrow)

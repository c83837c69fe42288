"""Cascade attention in plain XLA: split, differentiable, any device."""

import jax
import jax.numpy as jnp
from einops import rearrange

from d2sd_jax.kernels.dot import dot_float32

# Scores of an empty part: far below any real one, and still finite.
EMPTY = -1e30
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
    sinks = rearrange(sinks, "(j n) -> j n", n=share)

  def attend(query, local_mask, prefix_start):
    parts = [_local_part(query, local_keys, local_values, local_mask)]
    if prefix_keys.shape[2]:
      row = jnp.arange(prefix_keys.shape[2])
      seen = row < prefix_end[:, :, None, None]
      seen = seen & (row >= prefix_start[..., None])
      parts.append(_prefix_part(query, prefix_keys, prefix_values, seen))
    return _merge(parts, sinks).astype(query.dtype)

  if nodes > MAX_NODES and nodes % MAX_NODES == 0:
    slices = [
      rearrange(x, "b g (c r) ... -> c b g r ...", r=MAX_NODES)
      for x in (query, local_mask, prefix_start)
    ]
    output = jax.lax.map(lambda xs: attend(*xs), slices)
    output = rearrange(output, "c b g r ... -> b g (c r) ...")
  else:
    output = attend(query, local_mask, prefix_start)
  return rearrange(output, "b g r j n h -> b g r (j n) h")


def _prefix_part(query, keys, values, mask):
  """All nodes of all groups against the one shared prefix."""
  scores = dot_float32("bgrjnh,bjsh->bgrjns", query, keys)
  weights, total, lse = _softmax(scores, mask, query.shape[-1])
  return _weigh("bgrjns,bjsh->bgrjnh", weights, values) / total, lse


def _local_part(query, keys, values, mask):
  """Each group's nodes against the nodes of the same group."""
  scores = dot_float32("bgrjnh,bgkjh->bgrjnk", query, keys)
  weights, total, lse = _softmax(scores, mask, query.shape[-1])
  return _weigh("bgrjnk,bgkjh->bgrjnh", weights, values) / total, lse


def _weigh(spec, weights, values):
  """Weighted sum of values, in their dtype, accumulated in float32."""

  def narrow(weights, values):
    return dot_float32(spec, weights.astype(values.dtype), values)

  def wide(weights, values):
    return dot_float32(spec, weights, values.astype(jnp.float32))

  # XLA has no bfloat16 product for some of these layouts on a CPU.
  return jax.lax.platform_dependent(weights, values, cpu=wide, default=narrow)


def _softmax(scores, mask, head_dim):
  """Masked exponentials, their sum (1 where nothing is seen), log-sum-exp."""
  mask = mask[:, :, :, None, None, :]
  scores = jnp.where(mask, scores * head_dim**-0.5, EMPTY)
  top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
  total = weights.sum(-1, keepdims=True)
  some = total > 0
  total = jnp.where(some, total, 1.0)
  lse = jnp.where(some, jnp.log(total) + top, EMPTY)
  return weights, total, lse[..., 0]


def _merge(parts, sinks):
  """Weighs the parts' outputs by their share of the whole softmax."""
  lses = [lse for _, lse in parts]
  if sinks is not None:
    lses.append(jnp.broadcast_to(sinks.astype(jnp.float32), lses[0].shape))
  shares = jax.nn.softmax(jnp.stack(lses), axis=0)
  return sum(
    output * share[..., None]
    for (output, _), share in zip(parts, shares, strict=False)
  )

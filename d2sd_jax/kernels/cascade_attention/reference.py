"""Dense semantics of cascade attention: one softmax over all keys."""

import jax.numpy as jnp
from einops import rearrange, repeat


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
  """See `api.cascade_attention`; slow, and clear enough to check by eye."""
  batch, groups, nodes, heads, head_dim = query.shape
  size = prefix_keys.shape[2]
  share = heads // local_keys.shape[3]
  per_group = lambda x: repeat(
    x, "b j s h -> b g s (j share) h", g=groups, share=share
  )
  per_head = lambda x: repeat(x, "b g r j h -> b g r (j share) h", share=share)
  keys = jnp.concatenate([per_group(prefix_keys), per_head(local_keys)], 2)
  values = jnp.concatenate(
    [per_group(prefix_values), per_head(local_values)], 2
  )

  row = jnp.arange(size)
  seen = row < prefix_end[:, :, None, None]
  if prefix_start is not None:
    seen = seen & (row >= prefix_start[..., None])
  shape = (batch, groups, nodes)
  mask = jnp.concatenate(
    [
      jnp.broadcast_to(seen, (*shape, size)),
      jnp.broadcast_to(local_mask, (*shape, nodes)),
    ],
    axis=-1,
  )

  scores = jnp.einsum(
    "bgrnh,bgknh->bgrnk",
    query,
    keys,
    precision="highest",
    preferred_element_type=jnp.float32,
  )
  scores = scores / jnp.sqrt(jnp.float32(head_dim))
  scores = jnp.where(rearrange(mask, "b g r k -> b g r 1 k"), scores, -jnp.inf)
  floor = scores.max(-1, keepdims=True)
  if sinks is not None:
    floor = jnp.maximum(floor, sinks[:, None])
  floor = jnp.where(jnp.isfinite(floor), floor, 0.0)
  weights = jnp.exp(scores - floor)
  total = weights.sum(-1, keepdims=True)
  if sinks is not None:
    total = total + jnp.exp(sinks[:, None] - floor)
  weights = weights / jnp.where(total > 0, total, 1.0)
  output = jnp.einsum(
    "bgrnk,bgknh->bgrnh",
    weights,
    values.astype(jnp.float32),
    precision="highest",
  )
  return output.astype(query.dtype)

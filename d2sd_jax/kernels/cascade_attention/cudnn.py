"""Cascade attention as one flash attention of cuDNN's, for many queries.

Prefix and local keys are laid end to end behind one mask, so nothing is left
to merge. That wastes work on the keys a node may not see, and saves writing
scores to memory: it pays where a row has hundreds of nodes, as in prefill and
in training. It has a gradient.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

from d2sd_jax.errors import require
from d2sd_jax.kernels.device import target_device

DTYPES = ("bfloat16", "float16")
_cudnn_attention = functools.partial(
  jax.nn.dot_product_attention, implementation="cudnn"
)


def is_available() -> bool:
  """Whether the default device is an NVIDIA GPU that cuDNN's flash runs on."""
  capability = str(getattr(target_device(), "compute_capability", ""))
  # ROCm names architectures here, such as gfx942.
  return capability[:1].isdigit() and float(capability) >= 8


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
  attend=_cudnn_attention,
):
  """See `api.cascade_attention`; 16-bit operands, no sinks, NVIDIA only."""
  if attend is _cudnn_attention:
    name = "implementation='cudnn' with dtype"
    require(
      query.dtype.name in DTYPES, name, query.dtype.name, " or ".join(DTYPES)
    )
    require(is_available(), "implementation", "cudnn", "an NVIDIA GPU for it")
  require(sinks is None, "implementation='cudnn' with sinks", "...", "None")
  query_rows = rearrange(query, "b g r n h -> b (g r) n h")
  keys = _lay_out(prefix_keys, local_keys)
  values = _lay_out(prefix_values, local_values)
  whole = (*query.shape[:3], prefix_keys.shape[2])
  if isinstance(local_mask, str) and whole[1] == 1 and whole[3] == 0:
    # cuDNN skips what a causal mask hides, and reads no mask.
    output = attend(query_rows, keys, values, is_causal=True)
  else:
    mask = _mask(whole, prefix_end, prefix_start, local_mask)
    output = attend(query_rows, keys, values, mask=mask[:, None])
    # Where nothing is seen, all masked scores are equal, and none must count.
    output = jnp.where(mask.any(-1)[..., None, None], output, 0)
  return rearrange(output, "b (g r) n h -> b g r n h", g=query.shape[1])


def _lay_out(prefix, local):
  """All keys of a row: its prefix, then the nodes of group after group."""
  prefix = rearrange(prefix, "b j s h -> b s j h").astype(local.dtype)
  local = rearrange(local, "b g r j h -> b (g r) j h")
  return jnp.concatenate([prefix, local], axis=1)


def _mask(whole, prefix_end, prefix_start, local_mask):
  """`mask[b, i, k]`: node i, of whichever group, sees key k of `_lay_out`."""
  batch, groups, nodes, size = whole
  if isinstance(local_mask, str):
    local_mask = jnp.tri(nodes, dtype=bool)[None, None]
  if size == 0 and groups == 1:
    return local_mask[:, 0]
  row = jnp.arange(size)
  seen = row < prefix_end[:, :, None, None]
  if prefix_start is not None:
    seen = seen & (row >= prefix_start[..., None])
  seen = jnp.broadcast_to(seen, (batch, groups, nodes, size))
  same_group = jnp.eye(groups, dtype=bool)[:, None, :, None]
  local = jnp.broadcast_to(
    local_mask[:, :, :, None, :] & same_group,
    (batch, groups, nodes, groups, nodes),
  )
  parts = seen, rearrange(local, "b g r k s -> b g r (k s)")
  return rearrange(jnp.concatenate(parts, -1), "b g r k -> b (g r) k")

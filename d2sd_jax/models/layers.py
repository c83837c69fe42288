"""The transformer block that targets and drafters share."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange

from d2sd_jax.kernels.cascade_attention import LocalMask, cascade_attention
from d2sd_jax.kernels.dot import matmul
from d2sd_jax.models.experts import mix_experts
from d2sd_jax.models.rope import RopeScaling, rotate
from d2sd_jax.typing import Array, Float, Int


class BlockConfig(Protocol):
  """What a block must know; target and drafter configs both fit."""

  @property
  def head_dim(self) -> int: ...  # noqa: D102
  @property
  def rope_theta(self) -> float: ...  # noqa: D102
  @property
  def rope_scaling(self) -> RopeScaling | None: ...  # noqa: D102
  @property
  def rms_norm_eps(self) -> float: ...  # noqa: D102


def rms_norm(
  x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
  """RMSNorm in float32, returned in `x`'s dtype."""
  wide = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
  return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def _project(x, matrix, bias):
  """x W, and its bias where there is one."""
  out = matmul("...d,do->...o", x, matrix)
  return out if bias is None else out + bias


def _heads(x, projection, bias, head_dim):
  """Projects to heads of `head_dim`."""
  out = _project(x, projection, bias)
  return rearrange(out, "... (n h) -> ... n h", h=head_dim)


def _norm_and_rotate(x, norm, positions, config):
  """QK-norm where the block has one, then RoPE."""
  if norm is not None:
    x = rms_norm(x, norm, config.rms_norm_eps)
  return rotate(x, positions, config.rope_theta, config.rope_scaling)


def project_kv(
  weights: Any,
  x: Float[Array, "*positions D"],
  positions: Int[Array, "*positions"],
  config: BlockConfig,
) -> tuple[Float[Array, "*positions J H"], Float[Array, "*positions J H"]]:
  """Keys (normed and rotated) and values (neither) of one layer.

  A drafter calls this for its context features too: they take the same
  projections as the block's own slots, but not the layer's input norm.
  """
  keys = _heads(x, weights.k_proj, weights.k_bias, config.head_dim)
  values = _heads(x, weights.v_proj, weights.v_bias, config.head_dim)
  return _norm_and_rotate(keys, weights.k_norm, positions, config), values


def transformer_block(
  weights: Any,
  x: Float[Array, "B G R D"],
  positions: Int[Array, "B G R"],
  prefix: tuple[Float[Array, "B J S H"], Float[Array, "B J S H"]],
  prefix_end: Int[Array, "B"] | Int[Array, "B G"],
  local_mask: LocalMask,
  config: BlockConfig,
  implementation: str | None = None,
  prefix_start: Int[Array, "B G R"] | None = None,
) -> tuple[
  Float[Array, "B G R D"],
  tuple[Float[Array, "B G R J H"], Float[Array, "B G R J H"]],
]:
  """Pre-norm attention over prefix and tree, then SwiGLU or experts.

  Args:
    weights: one layer; any object with `input_norm, q_proj, k_proj, v_proj,
      o_proj, q_norm, k_norm, post_norm, gate_proj, up_proj, down_proj, q_bias,
      k_bias, v_bias, o_bias, sinks, experts`; matrices are `[in, out]`. Norms
      of queries and keys, biases, sinks and experts may be `None`; where there
      are experts, the three matrices of SwiGLU are not read.
    x: hidden states of G groups of R nodes.
    positions: absolute positions, for RoPE.
    prefix: keys and values of this layer's cache.
    prefix_end: see `cascade_attention`.
    local_mask: see `cascade_attention`.
    config: head size, RoPE and norm epsilon.
    implementation: see `cascade_attention`.
    prefix_start: see `cascade_attention`.

  Returns:
    The hidden states after the layer, and the nodes' own keys and values.
  """
  h = rms_norm(x, weights.input_norm, config.rms_norm_eps)
  query = _heads(h, weights.q_proj, weights.q_bias, config.head_dim)
  query = _norm_and_rotate(query, weights.q_norm, positions, config)
  keys, values = project_kv(weights, h, positions, config)
  attended = cascade_attention(
    query,
    *prefix,
    keys,
    values,
    prefix_end=prefix_end,
    prefix_start=prefix_start,
    local_mask=local_mask,
    sinks=weights.sinks,
    implementation=implementation,
  )
  attended = rearrange(attended, "... n h -> ... (n h)")
  x = x + _project(attended, weights.o_proj, weights.o_bias)
  h = rms_norm(x, weights.post_norm, config.rms_norm_eps)
  return x + _feed_forward(weights, h), (keys, values)


def _feed_forward(weights, x):
  """SwiGLU, or a mixture of experts where the layer has them."""
  if weights.experts is not None:
    return mix_experts(weights.experts, x)
  gate = jax.nn.silu(matmul("...d,dm->...m", x, weights.gate_proj))
  up = matmul("...d,dm->...m", x, weights.up_proj)
  return matmul("...m,md->...d", gate * up, weights.down_proj)

"""The transformer block that targets and drafters share."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange

from d2sd_jax.kernels.cascade_attention import LocalMask, cascade_attention
from d2sd_jax.kernels.dot import matmul
from d2sd_jax.typing import Array, Float, Int


class BlockConfig(Protocol):
  """What a block must know; target and drafter configs both fit."""

  @property
  def head_dim(self) -> int: ...  # noqa: D102
  @property
  def rope_theta(self) -> float: ...  # noqa: D102
  @property
  def rms_norm_eps(self) -> float: ...  # noqa: D102


def rms_norm(
  x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
  """RMSNorm in float32, returned in `x`'s dtype."""
  wide = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
  return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def rotate(
  x: Float[Array, "*positions heads H"],
  positions: Int[Array, "*positions"],
  theta: float,
) -> Float[Array, "*positions heads H"]:
  """Rotary embedding in its rotate-half form, angles in float32."""
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
  return rotated.astype(x.dtype)


def _heads(x, projection, head_dim):
  """Projects to heads of `head_dim`."""
  out = matmul("...d,do->...o", x, projection)
  return rearrange(out, "... (n h) -> ... n h", h=head_dim)


def _norm_and_rotate(x, norm, positions, config):
  """QK-norm where the block has one, then RoPE."""
  if norm is not None:
    x = rms_norm(x, norm, config.rms_norm_eps)
  return rotate(x, positions, config.rope_theta)


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
  keys = _heads(x, weights.k_proj, config.head_dim)
  values = _heads(x, weights.v_proj, config.head_dim)
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
) -> tuple[
  Float[Array, "B G R D"],
  tuple[Float[Array, "B G R J H"], Float[Array, "B G R J H"]],
]:
  """Pre-norm attention over prefix and tree, then SwiGLU.

  Args:
    weights: one layer; any object with `input_norm, q_proj, k_proj, v_proj,
      o_proj, q_norm, k_norm, post_norm, gate_proj, up_proj, down_proj`
      (matrices `[in, out]`, `q_norm` and `k_norm` may be `None`).
    x: hidden states of G groups of R nodes.
    positions: absolute positions, for RoPE.
    prefix: keys and values of this layer's cache.
    prefix_end: see `cascade_attention`.
    local_mask: see `cascade_attention`.
    config: head size, RoPE theta and norm epsilon.
    implementation: see `cascade_attention`.

  Returns:
    The hidden states after the layer, and the nodes' own keys and values.
  """
  h = rms_norm(x, weights.input_norm, config.rms_norm_eps)
  query = _heads(h, weights.q_proj, config.head_dim)
  query = _norm_and_rotate(query, weights.q_norm, positions, config)
  keys, values = project_kv(weights, h, positions, config)
  attended = cascade_attention(
    query,
    *prefix,
    keys,
    values,
    prefix_end=prefix_end,
    local_mask=local_mask,
    implementation=implementation,
  )
  attended = rearrange(attended, "... n h -> ... (n h)")
  x = x + matmul("...o,od->...d", attended, weights.o_proj)

  h = rms_norm(x, weights.post_norm, config.rms_norm_eps)
  gate = jax.nn.silu(matmul("...d,dm->...m", h, weights.gate_proj))
  up = matmul("...d,dm->...m", h, weights.up_proj)
  return x + matmul("...m,md->...d", gate * up, weights.down_proj), (
    keys,
    values,
  )

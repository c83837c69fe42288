"""The transformer block that targets and drafters share."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from einops import rearrange

from d2sd_jax.kernels import rotary
from d2sd_jax.kernels.cascade_attention import (
  Heads,
  LocalMask,
  cascade_attention,
)
from d2sd_jax.kernels.device import runs_tpu_kernels
from d2sd_jax.kernels.linear import linear
from d2sd_jax.kernels.rms_norm import rms_norm
from d2sd_jax.kernels.transposed import Transposed
from d2sd_jax.models.experts import Experts, mix_experts
from d2sd_jax.models.rope import RopeScaling, cos_sin, rotate
from d2sd_jax.tensor_parallel import sum_parts
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWeights:
  """One layer; matrices are `[in, out]` or `Transposed`, `None` is not there.

  What is multiplied with the same input lies in one matrix, for a product of
  a few rows costs as much as the read of its weights and a launch.

  Attributes:
    qkv_proj: columns of all query heads, then of the keys', then the values'.
    gate_up_proj: columns of the gate, then of what it gates.
    sinks: see `cascade_attention`.
    experts: in the place of `gate_up_proj` and `down_proj`.
  """

  input_norm: Float[Array, " D"]
  qkv_proj: Float[Array, "D heads"] | Transposed
  o_proj: Float[Array, "NH D"] | Transposed
  q_norm: Float[Array, " H"] | None
  k_norm: Float[Array, " H"] | None
  post_norm: Float[Array, " D"]
  gate_up_proj: Float[Array, "D both"] | Transposed | None
  down_proj: Float[Array, "M D"] | Transposed | None
  qkv_bias: Float[Array, " heads"] | None = None
  o_bias: Float[Array, " D"] | None = None
  sinks: Float[Array, " N"] | None = None
  experts: Experts | None = None


def norm_and_rotate(
  x: Float[Array, "*positions heads H"],
  norm: Float[Array, "#heads H"] | Float[Array, " H"] | None,
  positions: Int[Array, "*positions"],
  config: BlockConfig,
) -> Float[Array, "*positions heads H"]:
  """QK-norm where the block has one, then RoPE."""
  if norm is not None:
    x = rms_norm(x, norm, config.rms_norm_eps)
  return rotate(x, positions, config.rope_theta, config.rope_scaling)


def split_heads(
  x: Float[Array, "*positions heads"], config: BlockConfig
) -> Float[Array, "*positions n H"]:
  """A product with the columns of several heads, head by head."""
  if runs_tpu_kernels():
    # XLA would make the split part of the product, and lay the matrix out anew
    # for it whenever the program is called.
    x = jax.lax.optimization_barrier(x)
  return rearrange(x, "... (n h) -> ... n h", h=config.head_dim)


def transformer_block(
  weights: LayerWeights,
  x: Float[Array, "B G R D"],
  positions: Int[Array, "B G R"],
  prefix: tuple[Float[Array, "B J S H"], Float[Array, "B J S H"]],
  prefix_end: Int[Array, "B"] | Int[Array, "B G"],
  local_mask: LocalMask,
  config: BlockConfig,
  implementation: str | None = None,
  prefix_start: Int[Array, "B G R"] | None = None,
  axis: str | None = None,
) -> tuple[
  Float[Array, "B G R D"],
  tuple[Float[Array, "B G R J H"], Float[Array, "B G R J H"]],
]:
  """Pre-norm attention over prefix and tree, then SwiGLU or experts.

  Args:
    weights: one layer.
    x: hidden states of G groups of R nodes.
    positions: absolute positions, for RoPE.
    prefix: keys and values of this layer's cache.
    prefix_end: see `cascade_attention`.
    local_mask: see `cascade_attention`.
    config: head size, RoPE and norm epsilon.
    implementation: see `cascade_attention`.
    prefix_start: see `cascade_attention`.
    axis: of a mesh, over whose devices the layer is split: heads and inner
      width are the device's own, and two sums make the states whole.

  Returns:
    The hidden states after the layer, and the nodes' own keys and values.
  """
  query, keys, values = _attention_inputs(
    weights, x, positions, prefix[0].shape[1], config
  )
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
  x = _add_product(x, attended, weights.o_proj, weights.o_bias, axis)
  x = _add_feed_forward(weights, x, config, axis)
  return x, (keys.taken(), values.taken())


def _add_product(x, y, matrix, bias, axis):
  """x + y @ matrix + bias, of a product that each device has a part of."""
  if axis is None and bias is None:
    return linear(y, matrix, residual=x)
  return x + _add_bias(sum_parts(linear(y, matrix), axis), bias)


def _add_bias(x, bias):
  """x and its bias, where there is one."""
  return x if bias is None else x + bias


def _attention_inputs(weights, x, positions, num_kv_heads, config):
  """Queries, keys and values of one product; values have no norm, no RoPE."""
  norm, eps = weights.input_norm, config.rms_norm_eps
  heads = linear(x, weights.qkv_proj, norm=norm, eps=eps)
  heads = split_heads(_add_bias(heads, weights.qkv_bias), config)
  num_rotated = heads.shape[-2] - num_kv_heads
  num_heads = num_rotated - num_kv_heads
  # Queries and keys in one go: each step is a launch. A drafter in training is
  # not transposed, and needs a gradient.
  if isinstance(weights.qkv_proj, Transposed) and rotary.fits(heads):
    theta, scaling = config.rope_theta, config.rope_scaling
    rotated = rotary.queries_and_keys(
      heads,
      *cos_sin(positions, heads.shape[-1], theta, scaling),
      None if weights.q_norm is None else (weights.q_norm, weights.k_norm),
      config.rms_norm_eps,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
    )
  else:
    norms = _norms_of_heads(weights, num_heads, num_rotated)
    rotated = heads[..., :num_rotated, :]
    rotated = norm_and_rotate(rotated, norms, positions, config)
  return (
    Heads(array=rotated, first=0, count=num_heads),
    Heads(array=rotated, first=num_heads, count=num_kv_heads),
    Heads(array=heads, first=num_rotated, count=num_kv_heads),
  )


def _norms_of_heads(weights, num_heads, num_rotated):
  """The norm of each query head, then of each key head; `None` is none."""
  if weights.q_norm is None:
    return None
  is_key = jnp.arange(num_rotated) >= num_heads
  return jnp.where(is_key[:, None], weights.k_norm, weights.q_norm)


def _add_feed_forward(weights, x, config, axis):
  """x and SwiGLU of it, or a mixture of experts where the layer has them."""
  norm, eps = weights.post_norm, config.rms_norm_eps
  if weights.experts is not None:
    return x + mix_experts(weights.experts, rms_norm(x, norm, eps), axis)
  hidden = linear(x, weights.gate_up_proj, norm=norm, eps=eps, gated=True)
  return _add_product(x, hidden, weights.down_proj, None, axis)

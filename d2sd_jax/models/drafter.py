"""The block-diffusion drafter: one architecture, two sets of weights.

A small Qwen3-style transformer without embedding or head (it borrows the
target's). Its context is not text but the target's tapped hidden states,
projected once and injected as keys and values into every layer.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from d2sd_jax.config import DrafterConfig
from d2sd_jax.kernels.dot import matmul
from d2sd_jax.kernels.quantized import quantize
from d2sd_jax.models.cache import KVCache
from d2sd_jax.models.layers import (
  project_kv,
  rms_norm,
  transformer_block,
)
from d2sd_jax.typing import Array, Float, Int

INIT_STD = 0.02


class DrafterLayer(nnx.Module):
  """Weights of one layer, named as `transformer_block` reads them."""

  q_bias = k_bias = v_bias = o_bias = sinks = experts = None

  def __init__(
    self,
    config: DrafterConfig,
    rngs: nnx.Rngs,
    dtype: jax.typing.DTypeLike,
  ):
    """Random matrices of standard deviation 0.02; norms of one."""
    c = config
    width, mlp = c.hidden_size, c.intermediate_size
    query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    matrix = lambda *shape: nnx.Param(
      INIT_STD * jax.random.normal(rngs.params(), shape, dtype)
    )
    ones = lambda size: nnx.Param(jnp.ones((size,), dtype))
    self.input_norm = ones(width)
    self.q_proj = matrix(width, query)
    self.k_proj = matrix(width, key)
    self.v_proj = matrix(width, key)
    self.o_proj = matrix(query, width)
    self.q_norm = ones(c.head_dim)
    self.k_norm = ones(c.head_dim)
    self.post_norm = ones(width)
    self.gate_proj = matrix(width, mlp)
    self.up_proj = matrix(width, mlp)
    self.down_proj = matrix(mlp, width)


class Drafter(nnx.Module):
  """Drafter 1 (DFlash) or drafter 2 (variable prefix), by its weights.

  The module is a pytree: pass it to jitted functions as it is.
  """

  def __init__(
    self,
    config: DrafterConfig,
    *,
    rngs: nnx.Rngs,
    dtype: jax.typing.DTypeLike = jnp.float32,
  ):
    """Random weights, to be trained or replaced."""
    self.config = config
    taps, width = len(config.target_layer_ids), config.hidden_size
    matrix = jax.random.normal(rngs.params(), (taps * width, width), dtype)
    self.fc = nnx.Param(INIT_STD * matrix)
    self.hidden_norm = nnx.Param(jnp.ones((width,), dtype))
    self.norm = nnx.Param(jnp.ones((width,), dtype))
    self.layers = nnx.List(
      [DrafterLayer(config, rngs, dtype) for _ in range(config.num_layers)]
    )

  @property
  def dtype(self) -> jnp.dtype:
    """Of activations and caches; matrices may be int8."""
    return self.norm.dtype

  def init_cache(self, batch_size: int, capacity: int) -> KVCache:
    """A cache of zeros for the context of `capacity` tokens per row."""
    config = self.config
    shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
    return KVCache.zeros(config.num_layers, shape, self.dtype)

  def context_kv(
    self,
    features: Float[Array, "B T taps D"],
    positions: Int[Array, "B T"],
  ) -> KVCache:
    """Keys and values of context tokens, for every layer (KV injection).

    Args:
      features: the target's hidden states after `target_layer_ids`, in order.
      positions: absolute positions of those tokens.

    Returns:
      T new rows per layer, to be appended to this drafter's cache.
    """
    config = self.config
    features = rearrange(features, "b t taps d -> b t (taps d)")
    context = matmul("btf,fd->btd", features.astype(self.dtype), self.fc)
    context = rms_norm(context, self.hidden_norm[...], config.rms_norm_eps)
    return KVCache.from_layers(
      project_kv(layer, context, positions, config) for layer in self.layers
    )

  def __call__(
    self,
    embeddings: Float[Array, "B G block D"],
    positions: Int[Array, "B G block"],
    context: KVCache,
    context_end: Int[Array, "B"] | Int[Array, "B G"],
    implementation: str | None = None,
  ) -> Float[Array, "B G block D"]:
    """Denoises G blocks per row in one pass; ready for the target's head.

    Slots of a block attend to each other both ways and to the context before
    `context_end`, which is the block's anchor; nothing of other blocks. The
    keys and values of the slots themselves are dropped.

    Args:
      embeddings: the target's embeddings of each slot's token or of the mask.
      positions: absolute positions of the slots.
      context: this drafter's cache.
      context_end: context tokens to be seen, per row or per block.
      implementation: see `cascade_attention`.

    Returns:
      Hidden states after the final norm.
    """
    x = embeddings.astype(self.dtype)
    for i, layer in enumerate(self.layers):
      x, _ = transformer_block(
        layer,
        x,
        positions,
        context.layer(i),
        context_end,
        None,
        self.config,
        implementation,
      )
    return rms_norm(x, self.norm[...], self.config.rms_norm_eps)


def quantize_drafter(drafter: Drafter) -> Drafter:
  """The drafter with all matrices in int8; its norms are shared."""
  # Mapping makes new modules, and leaves the drafter that was given alone.
  new = jax.tree.map(lambda x: x, drafter)
  for module in (new, *new.layers):
    for name, value in list(vars(module).items()):
      if isinstance(value, nnx.Param) and value.ndim == 2:
        setattr(module, name, nnx.data(quantize(value[...], summed=0)))
  return new


def fill_masked(
  tokens: Int[Array, "*groups block"],
  num_visible: Int[Array, "*groups"] | int,
  mask_token_id: int,
) -> Int[Array, "*groups block"]:
  """A block as a drafter sees it: its first tokens, then masks.

  Args:
    tokens: the anchor and whatever follows.
    num_visible: tokens to keep, the anchor included.
    mask_token_id: id that stands for a slot to be filled.
  """
  slots = jnp.arange(tokens.shape[-1])
  visible = slots < jnp.asarray(num_visible)[..., None]
  return jnp.where(visible, tokens, mask_token_id).astype(jnp.int32)

"""The block-diffusion drafter: one architecture, two sets of weights.

A small Qwen3-style transformer without embedding or head (it borrows the
target's). Its context is not text but the target's tapped hidden states,
projected once and injected as keys and values into every layer.

`Drafter` holds the parameters as they are trained and published, one matrix a
projection. `FusedDrafter` computes, on matrices laid side by side.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from d2sd_jax.config import DrafterConfig
from d2sd_jax.kernels.linear import linear
from d2sd_jax.kernels.quantized import quantize
from d2sd_jax.kernels.rms_norm import rms_norm
from d2sd_jax.kernels.transposed import Transposed, as_stored
from d2sd_jax.models.cache import KVCache
from d2sd_jax.models.layers import (
  LayerWeights,
  norm_and_rotate,
  split_heads,
  transformer_block,
)
from d2sd_jax.tensor_parallel import num_key_heads
from d2sd_jax.typing import Array, Float, Int

INIT_STD = 0.02


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedDrafter:
  """A drafter as the decode loop runs it; see `Drafter.fuse`.

  Matrices are `[in, out]`, or `Transposed`.

  Attributes:
    fc: projects a token's tap features.
    context_proj: keys and values of a context token for all layers, the
      columns of one layer after another's: its keys, then its values.
    layers: the blocks, `qkv_proj` for the slots alone.
    axis: of a mesh, over whose devices the weights are split; as of a target.
  """

  fc: Float[Array, "F D"] | Transposed
  hidden_norm: Float[Array, " D"]
  context_proj: Float[Array, "D all"] | Transposed
  layers: tuple[LayerWeights, ...]
  norm: Float[Array, " D"]
  config: DrafterConfig = dataclasses.field(metadata={"static": True})
  axis: str | None = dataclasses.field(default=None, metadata={"static": True})

  @property
  def dtype(self) -> jnp.dtype:
    """Of activations and caches; matrices may be int8."""
    return self.norm.dtype

  def init_cache(self, batch_size: int, capacity: int) -> KVCache:
    """A cache of zeros for the context of `capacity` tokens per row."""
    config = self.config
    heads = num_key_heads(config, self.axis)
    shape = (batch_size, heads, capacity, config.head_dim)
    return KVCache.zeros(config.num_layers, shape, self.dtype)

  def context_kv(
    self,
    features: Float[Array, "B T taps D"],
    positions: Int[Array, "B T"],
  ) -> KVCache:
    """Keys and values of context tokens, for every layer (KV injection).

    They take the same projections as a block's own slots, but no layer's input
    norm; values have no norm and no RoPE.

    Args:
      features: the target's hidden states after `target_layer_ids`, in order.
      positions: absolute positions of those tokens.

    Returns:
      T new rows per layer, to be appended to this drafter's cache.
    """
    config = self.config
    features = rearrange(features, "b t taps d -> b t (taps d)")
    context = linear(features.astype(self.dtype), self.fc)
    norm, eps = self.hidden_norm, config.rms_norm_eps
    context = linear(context, self.context_proj, norm=norm, eps=eps)
    heads = rearrange(
      split_heads(context, config),
      "b t (layers two j) h -> b t two layers j h",
      layers=config.num_layers,
      two=2,
    )
    norms = jnp.stack([jnp.asarray(layer.k_norm) for layer in self.layers])
    keys = norm_and_rotate(
      heads[:, :, 0], norms[:, None], positions[..., None], config
    )
    values = heads[:, :, 1]
    return KVCache.from_layers(
      (keys[:, :, i], values[:, :, i]) for i in range(config.num_layers)
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
        axis=self.axis,
      )
    return rms_norm(x, self.norm, self.config.rms_norm_eps)

  def as_stored(self) -> "FusedDrafter":
    """The drafter with all matrices in the order that suits the device."""
    return self._with_matrices(as_stored)

  def quantize(self) -> "FusedDrafter":
    """The drafter with all matrices in int8; its norms are shared."""
    return self._with_matrices(functools.partial(quantize, summed=0))

  def _with_matrices(self, change: Callable[[Any], Any]) -> "FusedDrafter":
    """The drafter with each matrix changed; all else are vectors."""
    turned = lambda x: isinstance(x, Transposed)
    return jax.tree.map(
      lambda x: change(x) if turned(x) or x.ndim == 2 else x,
      self,
      is_leaf=turned,
    )


class DrafterLayer(nnx.Module):
  """Parameters of one layer, under the names of the published format."""

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

  def fuse(self) -> LayerWeights:
    """The layer as `transformer_block` reads it."""
    kept = ("input_norm", "o_proj", "q_norm", "k_norm", "post_norm")
    return LayerWeights(
      qkv_proj=_side_by_side(self.q_proj, self.k_proj, self.v_proj),
      gate_up_proj=_side_by_side(self.gate_proj, self.up_proj),
      down_proj=self.down_proj[...],
      **{name: getattr(self, name)[...] for name in kept},
    )


class Drafter(nnx.Module):
  """Drafter 1 (DFlash) or drafter 2 (variable prefix), by its weights.

  The module is a pytree: pass it to jitted functions as it is. Where a drafter
  is called in several places, or again and again, fuse it once before.
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

  def fuse(self) -> FusedDrafter:
    """The same weights as the decode loop wants them.

    What computes is the fused form alone; under `jit` the copies this makes are
    small beside a training step, and for decoding they are made once.
    """
    context = [p for layer in self.layers for p in (layer.k_proj, layer.v_proj)]
    return FusedDrafter(
      fc=self.fc[...],
      hidden_norm=self.hidden_norm[...],
      context_proj=_side_by_side(*context),
      layers=tuple(layer.fuse() for layer in self.layers),
      norm=self.norm[...],
      config=self.config,
    )

  def init_cache(self, batch_size: int, capacity: int) -> KVCache:
    """See `FusedDrafter.init_cache`."""
    return self.fuse().init_cache(batch_size, capacity)

  def context_kv(
    self,
    features: Float[Array, "B T taps D"],
    positions: Int[Array, "B T"],
  ) -> KVCache:
    """See `FusedDrafter.context_kv`."""
    return self.fuse().context_kv(features, positions)

  def __call__(self, *args: Any, **kwargs: Any) -> Float[Array, "B G block D"]:
    """See `FusedDrafter.__call__`."""
    return self.fuse()(*args, **kwargs)


def _side_by_side(*matrices: nnx.Param) -> Float[Array, "D all"]:
  """Matrices of one input as a single one."""
  return jnp.concatenate([matrix[...] for matrix in matrices], axis=1)


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

"""The target: what the decode loop needs of one, and the one model we have.

A family (Llama, Qwen3, GPT-OSS) is a `TargetConfig`, not a second model.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from d2sd_jax.config import TargetConfig
from d2sd_jax.kernels.cascade_attention import CAUSAL, LocalMask
from d2sd_jax.kernels.dot import dot_float32
from d2sd_jax.kernels.rms_norm import rms_norm
from d2sd_jax.models.cache import KVCache
from d2sd_jax.models.layers import (
  LayerWeights,
  transformer_block,
)
from d2sd_jax.tensor_parallel import bar_padding, look_up, num_key_heads
from d2sd_jax.tree import PrefixTree, ancestor_mask
from d2sd_jax.typing import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetOutput:
  """What one pass of the target yields.

  Attributes:
    logits: float32; of every node (`score_tree`, `[B, R, V]`) or of each row's
      last real token (`prefill`, `[B, V]`).
    features: outputs of the tapped layers, in the order of the taps.
    kv: keys and values of the tokens that went in; nothing is written yet.
  """

  logits: Float[Array, "*rows V"]
  features: Float[Array, "B R taps D"]
  kv: KVCache


class Target(Protocol):
  """Any target the decode loop can drive: a pytree with these methods.

  `decode_cycle` and `generate` ask for nothing else, so a target of your own
  needs no subclass. A target without keys and values returns a `KVCache` of
  no layers; a drafter also needs `hidden_size` and `vocab_size` to match.
  """

  def init_cache(self, batch_size: int, capacity: int) -> KVCache:
    """A cache of zeros for `capacity` tokens per row."""
    ...

  def embed(self, tokens: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    """Input embeddings; the drafters share them."""
    ...

  def head(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
    """Float32 logits of already normed hidden states; shared as well."""
    ...

  def prefill(
    self,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    taps: tuple[int, ...],
  ) -> TargetOutput:
    """Runs prompts padded to T; logits are those of each last real token."""
    ...

  def score_tree(
    self,
    tree: PrefixTree,
    cache: KVCache,
    lengths: Int[Array, " B"],
    taps: tuple[int, ...],
  ) -> TargetOutput:
    """Scores every node; node j sees the cache and its ancestors-or-self."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaTarget:
  """A decoder-only transformer; implements `Target`.

  Attributes:
    embedding: also the head where `lm_head` is `None` (tied).
    lm_head: `[V, D]`.
    implementation: of `cascade_attention`.
    axis: of a mesh, over whose devices the weights are split; its methods then
      run inside of a `shard_map`. See `d2sd_jax.tensor_parallel`.
  """

  embedding: Float[Array, "V D"]
  layers: tuple[LayerWeights, ...]
  norm: Float[Array, " D"]
  lm_head: Float[Array, "V D"] | None
  config: TargetConfig = dataclasses.field(metadata={"static": True})
  implementation: str | None = dataclasses.field(
    default=None, metadata={"static": True}
  )
  axis: str | None = dataclasses.field(default=None, metadata={"static": True})

  @property
  def head_weight(self) -> Float[Array, "V D"]:
    """The head's matrix."""
    return self.embedding if self.lm_head is None else self.lm_head

  def init_cache(self, batch_size: int, capacity: int) -> KVCache:
    """See `Target.init_cache`."""
    config = self.config
    heads = num_key_heads(config, self.axis)
    shape = (batch_size, heads, capacity, config.head_dim)
    return KVCache.zeros(config.num_layers, shape, self.embedding.dtype)

  def embed(self, tokens: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    """See `Target.embed`."""
    return look_up(self.embedding, tokens, self.axis)

  def head(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
    """See `Target.head`; of a split head the device's own tokens."""
    weight = self.head_weight
    logits = dot_float32("...d,vd->...v", hidden.astype(weight.dtype), weight)
    return bar_padding(logits, self.config.vocab_size, self.axis)

  def prefill(
    self,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    taps: tuple[int, ...],
  ) -> TargetOutput:
    """See `Target.prefill`."""
    batch, size = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(size), tokens.shape)
    hidden, features, kv = self._forward(
      tokens,
      positions,
      cache=self.init_cache(batch, 0),
      lengths=jnp.zeros((batch,), jnp.int32),
      mask=CAUSAL,
      taps=taps,
    )
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    return TargetOutput(
      logits=self.logits(last[:, 0]), features=features, kv=kv
    )

  def score_tree(
    self,
    tree: PrefixTree,
    cache: KVCache,
    lengths: Int[Array, " B"],
    taps: tuple[int, ...],
  ) -> TargetOutput:
    """See `Target.score_tree`; positions are `lengths + depth`."""
    hidden, features, kv = self._forward(
      tree.tokens,
      lengths[:, None] + tree.depths,
      cache=cache,
      lengths=lengths,
      mask=ancestor_mask(tree.parents)[:, None],
      taps=taps,
    )
    return TargetOutput(logits=self.logits(hidden), features=features, kv=kv)

  def logits(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
    """Float32 logits of the last layer's output: final norm, then head."""
    return self.head(rms_norm(hidden, self.norm, self.config.rms_norm_eps))

  def _forward(
    self,
    tokens: Int[Array, "B R"],
    positions: Int[Array, "B R"],
    *,
    cache: KVCache,
    lengths: Int[Array, " B"],
    mask: LocalMask,
    taps: tuple[int, ...],
  ) -> tuple[Float[Array, "B R D"], Float[Array, "B R taps D"], KVCache]:
    """All layers over one group of nodes behind the cached prefix."""
    x = self.embed(tokens)[:, None]
    seen = {
      window: _visible(mask, positions, window)
      for window in set(map(self.config.window, range(len(self.layers))))
    }
    new_kv, tapped = [], {}
    for i, weights in enumerate(self.layers):
      near, start = seen[self.config.window(i)]
      x, kv = transformer_block(
        weights,
        x,
        positions[:, None],
        cache.layer(i),
        lengths,
        near,
        self.config,
        self.implementation,
        start,
        self.axis,
      )
      new_kv.append((kv[0][:, 0], kv[1][:, 0]))
      if i in taps:
        tapped[i] = x[:, 0]
    features = (
      jnp.stack([tapped[i] for i in taps], axis=2)
      if taps
      else jnp.zeros((*tokens.shape, 0, x.shape[-1]), x.dtype)
    )
    return x[:, 0], features, KVCache.from_layers(new_kv)


def _visible(
  mask: LocalMask, positions: Int[Array, "B R"], window: int | None
) -> tuple[LocalMask, Int[Array, "B 1 R"] | None]:
  """What a layer's nodes see: the mask among them, and where prefixes start.

  A node sees the `window` tokens that end with itself, whether they lie in the
  prefix or above it in the tree.

  Args:
    mask: what a node would see without a window.
    positions: absolute positions of the nodes.
    window: tokens, the node's own included; `None` is all.
  """
  if window is None:
    return mask, None
  start = jnp.maximum(positions - window + 1, 0)[:, None]
  if positions.shape[1] <= window:
    return mask, start
  if isinstance(mask, str):
    mask = jnp.tri(positions.shape[1], dtype=bool)[None, None]
  near = positions[:, :, None] - positions[:, None, :] < window
  return near[:, None] if mask is None else mask & near[:, None], start

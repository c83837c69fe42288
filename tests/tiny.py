"""Tiny random models of pairwise distinct sizes, and drafters that plant."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from d2sd_jax import Drafter, DrafterConfig, Sampling, TargetConfig, prefill
from d2sd_jax.models.target import LAYER_TENSORS, target_from_tensors

TARGET = TargetConfig(
  vocab_size=61,
  hidden_size=24,
  intermediate_size=40,
  num_layers=3,
  num_heads=6,
  num_kv_heads=2,
  head_dim=8,
  rope_theta=500.0,
  rms_norm_eps=1e-5,
  max_length=128,
  tied_head=False,
  qk_norm=True,
)
DFLASH = DrafterConfig(
  vocab_size=TARGET.vocab_size,
  hidden_size=TARGET.hidden_size,
  intermediate_size=28,
  num_layers=2,
  num_heads=4,
  num_kv_heads=1,
  head_dim=10,
  rope_theta=700.0,
  rms_norm_eps=1e-6,
  max_length=128,
  block_size=5,
  mask_token_id=17,
  target_layer_ids=(1,),
  num_target_layers=TARGET.num_layers,
)
# Its own taps, mask id and depth: the two must never be confused.
VP = dataclasses.replace(
  DFLASH,
  num_layers=1,
  mask_token_id=23,
  target_layer_ids=(0, 2),
  training_mode="vp_drafter",
)
jit_prefill = jax.jit(prefill, static_argnames="capacity")


def target_tensors(config, seed):
  """Random weights under Hugging Face names; rows of the head equally long."""
  rng = np.random.default_rng(seed)
  c = config
  query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  width, mlp = c.hidden_size, c.intermediate_size
  shapes = {
    "q_proj": (query, width),
    "k_proj": (key, width),
    "v_proj": (key, width),
    "o_proj": (width, query),
    "gate_proj": (mlp, width),
    "up_proj": (mlp, width),
    "down_proj": (width, mlp),
    "q_norm": (c.head_dim,),
    "k_norm": (c.head_dim,),
  }

  def draw(shape):
    noise = rng.standard_normal(shape)
    value = 0.35 * noise if len(shape) == 2 else 1 + 0.3 * noise
    return value.astype(np.float32)

  tensors = {
    "model.embed_tokens.weight": 3 * draw((c.vocab_size, width)),
    "model.norm.weight": draw((width,)),
  }
  for i in range(c.num_layers):
    for field, name in LAYER_TENSORS.items():
      if field in ("q_norm", "k_norm") and not c.qk_norm:
        continue
      shape = shapes.get(field, (width,))
      tensors[f"model.layers.{i}.{name}.weight"] = draw(shape)
  if not c.tied_head:
    head = draw((c.vocab_size, width))
    head *= 4 / np.linalg.norm(head, axis=1, keepdims=True)
    tensors["lm_head.weight"] = head
  return tensors


@functools.cache
def target(seed=0, config=TARGET):
  return target_from_tensors(config, target_tensors(config, seed), jnp.float32)


@functools.cache
def drafter(config=DFLASH, seed=0):
  """Random weights large enough that every input matters."""
  rng = np.random.default_rng(seed)

  def draw(leaf):
    noise = rng.standard_normal(leaf.shape)
    value = 0.3 * noise if leaf.ndim == 2 else 1 + 0.3 * noise
    return jnp.asarray(value, jnp.float32)

  shapes = nnx.eval_shape(lambda: Drafter(config, rngs=nnx.Rngs(0)))
  return jax.tree.map(draw, shapes)


def drafter_tensors(module):
  """A drafter's weights as the format names and lays them out."""
  named = {"fc": module.fc, "hidden_norm": module.hidden_norm}
  named["norm"] = module.norm
  for i, layer in enumerate(module.layers):
    for field, name in LAYER_TENSORS.items():
      named[f"layers.{i}.{name}"] = getattr(layer, field)
  return {f"{k}.weight": np.asarray(p[...]).T for k, p in named.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedDrafter:
  """Drafts what it was told to, position by position, through the real loop.

  Its context cache is the real drafter's. Its hidden states are head rows, so
  that the target's head reads the planted token back off them.

  Attributes:
    inner: the drafter whose context cache is kept.
    tokens: token to plant at each absolute position of each row.
    wrong: where to plant another token instead.
    sharpness: how sure the draft looks there.
    directions: one vector per token, all equally long.
  """

  inner: Drafter
  tokens: jax.Array
  wrong: jax.Array
  sharpness: jax.Array
  directions: jax.Array

  @property
  def config(self):
    return self.inner.config

  def init_cache(self, batch_size, capacity):
    return self.inner.init_cache(batch_size, capacity)

  def context_kv(self, features, positions):
    return self.inner.context_kv(features, positions)

  def __call__(self, embeddings, positions, context, context_end):
    del embeddings, context, context_end
    rows = jnp.arange(positions.shape[0])[:, None, None]
    tokens = self.tokens[rows, positions] + self.wrong[rows, positions]
    unit = self.directions[tokens % self.directions.shape[0]]
    return unit * self.sharpness[rows, positions][..., None]


def start(
  models,
  prompts,
  *,
  max_new=20,
  stops=(-1,),
  sampling=None,
  sequence_ids=None,
  pad_to=9,
  capacity=48,
):
  """`prefill` of lists of ids; `max_new` may differ by row."""
  tokens = np.zeros((len(prompts), pad_to), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  ids = range(len(prompts)) if sequence_ids is None else sequence_ids
  return jit_prefill(
    models,
    jnp.asarray(tokens),
    jnp.asarray([len(p) for p in prompts], jnp.int32),
    jnp.asarray(np.broadcast_to(max_new, len(prompts)), jnp.int32),
    jnp.asarray(list(ids), jnp.int32),
    jnp.asarray(stops, jnp.int32),
    Sampling.create() if sampling is None else sampling,
    capacity=capacity,
  )


def answers(state, prompts):
  """New tokens of every row."""
  tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
  return [
    tokens[b, len(p) : lengths[b] + 1].tolist() for b, p in enumerate(prompts)
  ]

"""Tiny random models of pairwise distinct sizes, and drafters that plant."""

import dataclasses
import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gguf import quants
from tokenizers import pre_tokenizers

from d2sd_jax import Drafter, DrafterConfig, Sampling, TargetConfig, prefill
from d2sd_jax.io import hf_names
from d2sd_jax.io.gguf_tokenizer import DEFAULT_SYSTEM
from d2sd_jax.io.hf_names import LAYER_TENSORS
from d2sd_jax.io.hf_tensors import target_from_tensors
from d2sd_jax.models.rope import YarnScaling, yarn_attention_factor

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
# Windows shorter than any block, so that a tree reaches past them.
GPT_OSS = dataclasses.replace(
  TARGET,
  intermediate_size=14,
  qk_norm=False,
  rope_scaling=YarnScaling(
    factor=4.0,
    original_length=32,
    attention_factor=yarn_attention_factor(4.0),
    beta_fast=6.0,
    beta_slow=0.5,
    truncate=False,
  ),
  attention_bias=True,
  sinks=True,
  windows=(3, None, 2),
  # Three rows' choices are gathered, a tree's are not.
  num_experts=19,
  experts_per_token=2,
  swiglu_limit=3.0,
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
  shapes = hf_names.target_tensors(config)

  def draw(name):
    noise = rng.standard_normal(shapes[name])
    if name.endswith(("norm.weight", "layernorm.weight")):
      return (1 + 0.3 * noise).astype(np.float32)
    return (0.35 * noise).astype(np.float32)

  embedding, norm, head = hf_names.EMBEDDING, hf_names.NORM, hf_names.HEAD
  tensors = {embedding: 3 * draw(embedding), norm: draw(norm)}
  names = [
    f"model.layers.{i}.{name}.weight"
    for i in range(config.num_layers)
    for name in LAYER_TENSORS.values()
  ]
  # What only some targets have comes last, and leaves the others as they were.
  names = [*filter(shapes.__contains__, names)]
  names += [n for n in shapes if n not in (*names, *tensors, head)]
  for name in names:
    tensors[name] = draw(name)
  if head in shapes:
    rows = draw(head)
    tensors[head] = 4 * rows / np.linalg.norm(rows, axis=1, keepdims=True)
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


# Byte-level BPE of a single merge, and the marks of a conversation.
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENS = (*MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he")
# A target in a file: sizes of its own, rows of whole quantisation blocks.
GGUF_TARGET = TargetConfig(
  vocab_size=37,
  hidden_size=64,
  intermediate_size=96,
  num_layers=2,
  num_heads=6,
  num_kv_heads=3,
  head_dim=8,
  rope_theta=12_345.0,
  rms_norm_eps=1e-5,
  max_length=77,
  tied_head=True,
)


def gguf_metadata(config):
  arch = "qwen3" if config.qk_norm else "llama"
  return {
    "general.architecture": arch,
    f"{arch}.block_count": config.num_layers,
    f"{arch}.context_length": config.max_length,
    f"{arch}.embedding_length": config.hidden_size,
    f"{arch}.feed_forward_length": config.intermediate_size,
    f"{arch}.attention.head_count": config.num_heads,
    f"{arch}.attention.head_count_kv": config.num_kv_heads,
    f"{arch}.attention.key_length": config.head_dim,
    f"{arch}.attention.value_length": config.head_dim,
    f"{arch}.rope.freq_base": config.rope_theta,
    f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
  }


def tokenizer_metadata():
  """As a file of `TOKENS` has it."""
  marks = len(MARKS)
  return {
    "tokenizer.chat_template": f"<|im_start|>system {DEFAULT_SYSTEM}",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": list(TOKENS),
    "tokenizer.ggml.token_type": [3] * marks + [1] * (len(TOKENS) - marks),
    "tokenizer.ggml.merges": ["h e"],
  }


def gguf_tensors(config, seed=0):
  """Random float32 tensors, written out by hand under their GGUF names."""
  width, mlp = config.hidden_size, config.intermediate_size
  shapes = {
    "token_embd.weight": (config.vocab_size, width),
    "output_norm.weight": (width,),
  }
  if not config.tied_head:
    shapes["output.weight"] = (config.vocab_size, width)
  for i in range(config.num_layers):
    layer = {
      "attn_norm": (width,),
      "attn_q": (48, width),
      "attn_k": (24, width),
      "attn_v": (24, width),
      "attn_output": (width, 48),
      "ffn_norm": (width,),
      "ffn_gate": (mlp, width),
      "ffn_up": (mlp, width),
      "ffn_down": (width, mlp),
    }
    if config.qk_norm:
      layer |= {"attn_q_norm": (8,), "attn_k_norm": (8,)}
    shapes |= {f"blk.{i}.{k}.weight": v for k, v in layer.items()}
  rng = np.random.default_rng(seed)
  return {
    name: rng.standard_normal(shape, np.float32)
    for name, shape in shapes.items()
  }


def write_gguf(path, metadata, tensors, kinds=None, raw_kinds=None):
  """Writes a GGUF file with the reference writer, quantising by `kinds`.

  Tensors in `raw_kinds` are written as they are, bytes of that type by row.
  """
  kinds, raw_kinds = kinds or {}, raw_kinds or {}
  writer = gguf.GGUFWriter(path, metadata.get("general.architecture", "none"))
  for key, value in metadata.items():
    if key == "general.architecture":
      continue
    add = {int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    add[type(value)](key, value)
  for name, value in tensors.items():
    kind = kinds.get(name)
    raw = value if kind is None else quants.quantize(value, kind)
    writer.add_tensor(name, raw, raw_dtype=raw_kinds.get(name, kind))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path

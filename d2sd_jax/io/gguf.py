"""GGUF files in: shape and float32 weights of Llama-family targets."""

import math
import mmap
import os
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf import quants

from d2sd_jax.config import TargetConfig
from d2sd_jax.errors import UsageError
from d2sd_jax.io.gguf_header import Header, map_file, read_header

# Architecture -> has RMS norms on queries and keys.
_ARCHITECTURES = {"llama": False, "qwen3": True}
# gguf dequantises 16 rows at a time; longer rows cost fewer Python calls.
_ROWS_JOINED = 16


def target_metadata(path: str | os.PathLike[str]) -> TargetConfig:
  """The target's shape, from the header alone.

  Raises:
    UsageError: as `read_header`; or the architecture is not `llama` or
      `qwen3`, or uses something those targets do not have here.
  """
  return _target_config(read_header(path))


def load_gguf(
  path: str | os.PathLike[str],
) -> tuple[TargetConfig, dict[str, np.ndarray]]:
  """Reads a Llama or Qwen3 target from a GGUF file.

  Returns:
    Its shape, and its weights: float32 under their Hugging Face names,
    matrices as [out, in], queries and keys ordered for rotate-half RoPE.

  Raises:
    UsageError: as `target_metadata`; or a tensor is missing, unknown, of the
      wrong shape, of a type that cannot be dequantised, or truncated.
  """
  header = read_header(path)
  config = _target_config(header)
  # Before any name is made: a damaged header may ask for billions of layers.
  if config.num_layers > len(header.tensors):
    raise UsageError(
      f"{header.path}: block_count={config.num_layers}: expected at most the"
      f" file's {len(header.tensors)} tensors"
    )
  table = _tensor_table(config)
  _check_tensors(header, {name: shape for name, (_, shape) in table.items()})
  data = map_file(header.path)
  weights = {}
  for name, (hf_name, _) in table.items():
    weight = _dequantize(header, name, data)
    # Llama files alone store the pairs of interleaved RoPE side by side.
    if not config.qk_norm and name.endswith(("attn_q.weight", "attn_k.weight")):
      weight = rotate_half_rows(weight, config.head_dim)
    weights[hf_name] = weight
  return config, weights


def rotate_half_rows(weight: np.ndarray, head_dim: int) -> np.ndarray:
  """Reorders rows [heads * H, in] from interleaved to rotate-half RoPE.

  Interleaved RoPE turns the rows (2i, 2i+1) of a head together, rotate-half
  RoPE the rows (i, i + H/2).
  """
  pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
  return pairs.swapaxes(1, 2).reshape(weight.shape)


def _target_config(header: Header) -> TargetConfig:
  """The metadata as a `TargetConfig`; refuses what the model cannot do."""
  fields = _Fields(header)
  _refuse_unsupported(fields)
  num_heads = fields.integer("attention.head_count")
  num_kv_heads = fields.integer("attention.head_count_kv", num_heads)
  hidden_size = fields.integer("embedding_length")
  head_dim = fields.integer("attention.key_length", hidden_size // num_heads)
  fields.expect(
    "attention.head_count_kv",
    num_heads % num_kv_heads == 0,
    f"a divisor of the {num_heads} heads",
  )
  for name in ("attention.value_length", "rope.dimension_count"):
    same = fields.integer(name, head_dim) == head_dim
    fields.expect(name, same, f"the head size {head_dim}")
  fields.expect("attention.key_length", head_dim % 2 == 0, "an even head size")
  return TargetConfig(
    vocab_size=_vocab_size(header),
    hidden_size=hidden_size,
    intermediate_size=fields.integer("feed_forward_length"),
    num_layers=fields.integer("block_count"),
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    # llama.cpp's own default; converters leave the key out.
    rope_theta=fields.real("rope.freq_base", 10_000.0),
    rms_norm_eps=fields.real("attention.layer_norm_rms_epsilon"),
    max_length=fields.integer("context_length"),
    tied_head="output.weight" not in header.tensors,
    qk_norm=_ARCHITECTURES[fields.architecture],
  )


class _Fields:
  """The metadata of one architecture, type-checked on the way out."""

  def __init__(self, header: Header):
    self._path, self._metadata = header.path, header.metadata
    self.architecture = header.metadata.get("general.architecture", "")
    if self.architecture not in tuple(_ARCHITECTURES):
      raise UsageError(
        f"{header.path}: general.architecture={self.architecture!r}: expected"
        f" one of {', '.join(_ARCHITECTURES)}"
      )

  def get(self, name: str, default: Any = None) -> Any:
    return self._metadata.get(f"{self.architecture}.{name}", default)

  def expect(self, name: str, condition: bool, expected: str) -> None:
    if not condition:
      raise UsageError(
        f"{self._path}: {self.architecture}.{name}={self.get(name)!r}:"
        f" expected {expected}"
      )

  def integer(self, name: str, default: int | None = None) -> int:
    value = self.get(name, default)
    self.expect(name, type(value) is int and value > 0, "a positive integer")
    return value

  def real(self, name: str, default: float | None = None) -> float:
    """A float32's shortest decimal: 1e-5, not 9.999999747378752e-06."""
    value = self.get(name, default)
    right = isinstance(value, float) and 0 < value < float("inf")
    self.expect(name, right, "a positive number")
    return float(str(np.float32(value)))


def _refuse_unsupported(fields: _Fields) -> None:
  """Mixtures of experts and scaled RoPE would load, and answer nonsense."""
  experts = fields.get("expert_count", 0)
  fields.expect("expert_count", experts == 0, "a dense model")
  scaling = fields.get("rope.scaling.type", "none")
  fields.expect("rope.scaling.type", scaling == "none", "RoPE without scaling")


def _vocab_size(header: Header) -> int:
  """Rows of the embedding; the metadata's count is optional."""
  embedding = header.tensors.get("token_embd.weight")
  if embedding is None or len(embedding.shape) != 2:
    raise UsageError(
      f"{header.path}: tensor 'token_embd.weight' is missing or no matrix"
    )
  return embedding.shape[0]


def _tensor_table(
  config: TargetConfig,
) -> dict[str, tuple[str, tuple[int, ...]]]:
  """GGUF name -> (Hugging Face name, shape) of every tensor there must be."""
  width, mlp = config.hidden_size, config.intermediate_size
  queries = config.num_heads * config.head_dim
  keys = config.num_kv_heads * config.head_dim
  layer: dict[str, tuple[str, tuple[int, ...]]] = {
    "attn_norm": ("input_layernorm", (width,)),
    "attn_q": ("self_attn.q_proj", (queries, width)),
    "attn_k": ("self_attn.k_proj", (keys, width)),
    "attn_v": ("self_attn.v_proj", (keys, width)),
    "attn_output": ("self_attn.o_proj", (width, queries)),
    "ffn_norm": ("post_attention_layernorm", (width,)),
    "ffn_gate": ("mlp.gate_proj", (mlp, width)),
    "ffn_up": ("mlp.up_proj", (mlp, width)),
    "ffn_down": ("mlp.down_proj", (width, mlp)),
  }
  if config.qk_norm:
    layer["attn_q_norm"] = ("self_attn.q_norm", (config.head_dim,))
    layer["attn_k_norm"] = ("self_attn.k_norm", (config.head_dim,))
  vocabulary = (config.vocab_size, width)
  table = {
    "token_embd.weight": ("model.embed_tokens.weight", vocabulary),
    "output_norm.weight": ("model.norm.weight", (width,)),
  }
  if not config.tied_head:
    table["output.weight"] = ("lm_head.weight", vocabulary)
  for i in range(config.num_layers):
    for name, (hf_name, shape) in layer.items():
      hf_name = f"model.layers.{i}.{hf_name}.weight"
      table[f"blk.{i}.{name}.weight"] = (hf_name, shape)
  return table


def _check_tensors(
  header: Header, shapes: Mapping[str, tuple[int, ...]]
) -> None:
  """Raises `UsageError` unless the file has just these tensors."""
  for name, shape in shapes.items():
    if name not in header.tensors:
      raise UsageError(f"{header.path}: tensor {name!r} is missing")
    found = header.tensors[name].shape
    if found != shape:
      raise UsageError(
        f"{header.path}: tensor {name!r} has shape {found}: expected {shape}"
      )
  extra = sorted(header.tensors.keys() - shapes.keys())
  if extra:
    architecture = header.metadata["general.architecture"]
    raise UsageError(
      f"{header.path}: tensor {extra[0]!r} has no place in a plain"
      f" {architecture} model"
    )


def _dequantize(header: Header, name: str, data: mmap.mmap) -> np.ndarray:
  """The tensor as a float32 array."""
  info = header.tensors[name]
  block, _ = gguf.GGML_QUANT_SIZES[info.kind]
  if info.shape[-1] % block:
    raise UsageError(
      f"{header.path}: tensor {name!r} of type {info.kind.name} has rows of"
      f" {info.shape[-1]}: expected a multiple of {block}"
    )
  shape = quants.quant_shape_to_byte_shape(info.shape, info.kind)
  raw = _tensor_bytes(header, name, data, math.prod(shape))
  joined = math.gcd(_ROWS_JOINED, math.prod(shape[:-1]))
  rows = raw.reshape(-1, shape[-1] * joined)
  try:
    return quants.dequantize(rows, info.kind).reshape(info.shape)
  except NotImplementedError as error:
    raise UsageError(
      f"{header.path}: tensor {name!r} of type {info.kind.name} cannot be"
      f" dequantised: {error}"
    ) from error


def _tensor_bytes(
  header: Header, name: str, data: mmap.mmap, count: int
) -> np.ndarray:
  """The tensor's bytes, copied: the file may change, weights may not."""
  start = header.tensors[name].start
  if start + count > len(data):
    raise UsageError(
      f"{header.path}: truncated: tensor {name!r} ends at byte"
      f" {start + count}, the file at {len(data)}"
    )
  return np.frombuffer(data, np.uint8, count, start).copy()

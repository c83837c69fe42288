"""GGUF files in: shape and float32 weights of Llama-family targets.

Weights are dequantised by the `gguf` package, a piece of one tensor at a time.
"""

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy as np
from gguf import quants

from d2sd_jax.config import TargetConfig
from d2sd_jax.errors import UsageError
from d2sd_jax.io.gguf_header import Header, map_file, read_header
from d2sd_jax.models.rope import FrequencyFactors, LinearScaling, RopeScaling

# Architecture -> has RMS norms on queries and keys.
_ARCHITECTURES = {"llama": False, "qwen3": True}
# Frequency divisors of stretched RoPE, for all layers of Llama 3.
ROPE_FACTORS = "rope_freqs.weight"
# Dequantised at a time: whole blocks of every type, and few Python calls.
_CHUNK = 2**18


def target_metadata(path: str | os.PathLike[str]) -> TargetConfig:
  """The target's shape, from the header (and RoPE's few divisors) alone.

  Raises:
    UsageError: as `read_header`; or the architecture is not `llama` or
      `qwen3`, or uses something those targets do not have here.
  """
  return _target_config(read_header(path))


def load_gguf(
  path: str | os.PathLike[str],
) -> tuple[TargetConfig, Mapping[str, np.ndarray]]:
  """Opens a Llama or Qwen3 target in a GGUF file.

  Returns:
    Its shape, and its weights: float32 under their Hugging Face names,
    matrices as [out, in], queries and keys ordered for rotate-half RoPE. Each
    is read whenever it is asked for, and kept by nobody else; one that holds
    a NaN or an infinity raises `UsageError` then.

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
  table = tensor_table(config)
  _check_tensors(header, {name: shape for name, (_, shape) in table.items()})
  return config, _Tensors(header, config, table)


class _Tensors(Mapping[str, np.ndarray]):
  """Weights by their Hugging Face names, each read when asked for."""

  def __init__(
    self,
    header: Header,
    config: TargetConfig,
    table: Mapping[str, tuple[str, tuple[int, ...]]],
  ):
    self._header, self._config = header, config
    self._names = {hf_name: name for name, (hf_name, _) in table.items()}
    self._data = map_file(header.path)
    for name in table:
      check_stored(header, name, self._data)

  def __getitem__(self, hf_name: str) -> np.ndarray:
    name = self._names[hf_name]
    weight = _dequantize(self._header, name, self._data)
    # Llama files alone store the pairs of interleaved RoPE side by side.
    interleaved = not self._config.qk_norm
    if interleaved and name.endswith(("attn_q.weight", "attn_k.weight")):
      return rotate_half_rows(weight, self._config.head_dim)
    return weight

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


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
    rope_scaling=_rope_scaling(fields, header, head_dim),
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
  """What would load, and answer nonsense."""
  for name, neutral, expected in (
    ("expert_count", 0, "a dense model"),
    ("attention.sliding_window", 0, "layers that see everything"),
    ("attention.scale", 0.0, "the scale of the head size"),
    ("rope.scaling.attn_factor", 1.0, "1.0"),
  ):
    fields.expect(name, fields.get(name, neutral) == neutral, expected)


def _rope_scaling(
  fields: _Fields, header: Header, head_dim: int
) -> RopeScaling | None:
  """How RoPE is stretched: llama.cpp divides each frequency, or all alike.

  Llama 3's files hold one divisor per pair of dimensions, `rope_freqs.weight`;
  position interpolation is a type and a factor, of which the type may be left
  out.
  """
  key = "rope.scaling.type"
  kind = fields.get(key, "linear")
  fields.expect(key, kind in ("none", "linear"), "none or linear")
  old = "rope.scale_linear"
  factor = fields.real("rope.scaling.factor", fields.real(old, 1.0))
  stretched = kind == "linear" and factor != 1
  if fields.architecture != "llama" or ROPE_FACTORS not in header.tensors:
    return LinearScaling(factor=factor) if stretched else None
  where = f"{header.path}: tensor {ROPE_FACTORS!r}"
  if stretched:
    raise UsageError(f"{where}: expected no rope.scaling.factor beside it")
  _check_shape(header, ROPE_FACTORS, (head_dim // 2,))
  data = map_file(header.path)
  check_stored(header, ROPE_FACTORS, data)
  divisors = _dequantize(header, ROPE_FACTORS, data)
  if divisors.min() <= 0:
    raise UsageError(f"{where}: expected divisors above 0")
  return FrequencyFactors(divisors=tuple(divisors.tolist()))


def _vocab_size(header: Header) -> int:
  """Rows of the embedding; the metadata's count is optional."""
  embedding = header.tensors.get("token_embd.weight")
  if embedding is None or len(embedding.shape) != 2:
    raise UsageError(
      f"{header.path}: tensor 'token_embd.weight' is missing or no matrix"
    )
  return embedding.shape[0]


def tensor_table(
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
    _check_shape(header, name, shape)
  architecture = header.metadata["general.architecture"]
  read = {ROPE_FACTORS} if architecture == "llama" else set()
  extra = sorted(header.tensors.keys() - shapes.keys() - read)
  if extra:
    raise UsageError(
      f"{header.path}: tensor {extra[0]!r} has no place in a plain"
      f" {architecture} model"
    )


def _check_shape(header: Header, name: str, shape: tuple[int, ...]) -> None:
  """Raises `UsageError` unless there is such a tensor."""
  if name not in header.tensors:
    raise UsageError(f"{header.path}: tensor {name!r} is missing")
  found = header.tensors[name].shape
  if found != shape:
    raise UsageError(
      f"{header.path}: tensor {name!r} has shape {found}: expected {shape}"
    )


def check_stored(header: Header, name: str, data: mmap.mmap) -> None:
  """Raises `UsageError` unless the file holds all of it, in a known type."""
  info = header.tensors[name]
  where = f"{header.path}: tensor {name!r}"
  if not info.shape:
    raise UsageError(f"{where} has no dimensions: expected one or more")
  block, size = gguf.GGML_QUANT_SIZES[info.kind]
  if info.shape[-1] % block:
    raise UsageError(
      f"{where} of type {info.kind.name} has rows of {info.shape[-1]}:"
      f" expected a multiple of {block}"
    )
  try:
    quants.dequantize(np.zeros((1, size), np.uint8), info.kind)
  except NotImplementedError as error:
    raise UsageError(
      f"{where} of type {info.kind.name} cannot be dequantised: {error}"
    ) from error
  end = info.start + math.prod(info.shape) // block * size
  if end > len(data):
    raise UsageError(
      f"{header.path}: truncated: tensor {name!r} ends at byte {end}, the file"
      f" at {len(data)}"
    )


def _dequantize(header: Header, name: str, data: mmap.mmap) -> np.ndarray:
  """The tensor as a float32 array of its own: the file may change."""
  info = header.tensors[name]
  block, size = gguf.GGML_QUANT_SIZES[info.kind]
  weight = np.empty(math.prod(info.shape), np.float32)
  # Blocks of a type do not depend on each other, nor on the rows' ends.
  for begin in range(0, weight.size, _CHUNK):
    part = weight[begin : begin + _CHUNK]
    start = info.start + begin // block * size
    raw = np.frombuffer(data, np.uint8, part.size // block * size, start)
    with np.errstate(invalid="ignore", over="ignore"):  # told below
      part[:] = quants.dequantize(raw[None], info.kind)[0]
    if not np.isfinite(part).all():
      raise UsageError(
        f"{header.path}: tensor {name!r} has a NaN or an infinity: expected"
        " numbers"
      )
  return weight.reshape(info.shape)

"""What a target's or a drafter's folder holds, by headers and small files."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from d2sd_jax.config import DrafterConfig, TargetConfig
from d2sd_jax.errors import UsageError
from d2sd_jax.io.drafter_format import (
  ARCHITECTURE,
  drafter_tensors,
  read_drafter_config,
)
from d2sd_jax.io.gguf import (
  ROPE_FACTORS,
  check_stored,
  target_metadata,
  tensor_table,
)
from d2sd_jax.io.gguf_header import Header, map_file, read_header
from d2sd_jax.io.hf_config import MAX_LAYERS, target_config_from_hf
from d2sd_jax.io.hf_folder import (
  CONFIG_FILE,
  INDEX_FILE,
  WEIGHTS_FILE,
  TensorFolder,
  read_json,
)
from d2sd_jax.io.hf_names import target_tensors
from d2sd_jax.io.models import DEFAULT_TARGET, target_path
from d2sd_jax.io.paths import find_checkpoint, user_path

# What a folder's text needs, beside its weights.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_TEMPLATE_FILE, _TEMPLATE_KEY = "chat_template.jinja", "chat_template"
_GENERATION_FILE, _STOP_KEY = "generation_config.json", "eos_token_id"
_GGUF_KEYS = ("tokenizer.ggml.tokens", "tokenizer.chat_template")
# Of each kind of problem; the others are counted.
_MOST_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor as a file holds it."""

  dtype: str
  shape: tuple[int, ...]
  num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holding:
  """What one folder or file holds.

  Attributes:
    name: as the user wrote it.
    title: what it is, in a few words.
    config: its shape.
    expected: name and shape of every tensor that belongs to such a model.
    stored: the tensors that are there.
    missing_files: files, and settings in them, that are not there.
  """

  name: str
  title: str
  config: TargetConfig | DrafterConfig
  expected: Mapping[str, tuple[int, ...]]
  stored: Mapping[str, Stored]
  missing_files: tuple[str, ...]

  @property
  def num_weights(self) -> int:
    """Numbers in all tensors, MXFP4's two codes to a byte."""
    pack = {"_blocks": 2, "_scales": 0}
    return sum(
      math.prod(shape) * pack.get(name[-7:], 1)
      for name, shape in self.expected.items()
    )

  @property
  def cache_row(self) -> int:
    """Numbers that the cache keeps of one token."""
    c = self.config
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim

  @property
  def missing(self) -> list[str]:
    """A line for each thing that is not there."""
    names = sorted(self.expected.keys() - self.stored.keys())
    lines = [f"tensor {name}" for name in names] if self.stored else []
    return [*self.missing_files, *_shortened(lines)]

  @property
  def wrong(self) -> list[str]:
    """A line for each tensor that is there and should be another, or not be."""
    lines = []
    for name, tensor in sorted(self.stored.items()):
      shape = self.expected.get(name)
      codes = name.endswith(("_blocks", "_scales"))
      if shape is None:
        lines.append(f"tensor {name}: not part of such a model")
      elif tensor.shape != shape:
        lines.append(f"tensor {name}: shape {tensor.shape}, expected {shape}")
      elif (tensor.dtype == "U8") != codes:
        lines.append(f"tensor {name}: dtype {tensor.dtype}")
    return list(_shortened(lines))


def read_holding(name: str) -> Holding:
  """What a folder or file holds, from headers and small files alone.

  Args:
    name: a Hugging Face folder of a target or a drafter, a GGUF file or its
      folder, or the name of a shipped drafter or of the default target.

  Raises:
    UsageError: it is neither, it is damaged, or it asks for what the models
      here do not have.
  """
  path = _find(name)
  if not path.is_dir():
    return _read_gguf(name, path)
  raw = read_json(path / CONFIG_FILE)
  is_drafter = raw.get("architectures") == [ARCHITECTURE]
  if is_drafter or "dflash_config" in raw:
    return _read_drafter(name, path)
  return _read_target(name, path, raw)


def _find(name: str) -> Path:
  """A folder with a config, or a GGUF file."""
  if name == DEFAULT_TARGET:
    return target_path(name)
  path = user_path(name)
  path = path if path.exists() else find_checkpoint(name, "folder")
  if path.name == CONFIG_FILE:
    path = path.parent
  return path if (path / CONFIG_FILE).is_file() else target_path(path)


def _read_gguf(name: str, path: Path) -> Holding:
  """A target in one file."""
  header = read_header(path)
  config = target_metadata(path)
  _check_layers(config, path)
  data = map_file(path)
  for tensor in header.tensors:
    check_stored(header, tensor, data)
  family = header.metadata["general.architecture"]
  expected = {k: shape for k, (_, shape) in tensor_table(config).items()}
  stored = _stored_in_gguf(header)
  if family == "llama" and ROPE_FACTORS in stored:
    expected[ROPE_FACTORS] = (config.head_dim // 2,)
  return Holding(
    name=name,
    title=f"target, {family}, a GGUF file",
    config=config,
    expected=expected,
    stored=stored,
    missing_files=tuple(
      f"metadata {key}" for key in _GGUF_KEYS if key not in header.metadata
    ),
  )


def _stored_in_gguf(header: Header) -> dict[str, Stored]:
  """The tensors of a GGUF file."""
  stored = {}
  for name, info in header.tensors.items():
    block, size = gguf.GGML_QUANT_SIZES[info.kind]
    num_bytes = math.prod(info.shape) // block * size
    stored[name] = Stored(info.kind.name, info.shape, num_bytes)
  return stored


def _read_target(name: str, path: Path, raw: Mapping[str, Any]) -> Holding:
  """A target in a Hugging Face folder."""
  config = target_config_from_hf(raw, str(path / CONFIG_FILE))
  stored, missing = _stored_in_folder(path)
  return Holding(
    name=name,
    title=f"target, {raw['model_type']}, a Hugging Face folder",
    config=config,
    expected=target_tensors(config),
    stored=stored,
    missing_files=(*missing, *_missing_text_files(path, raw)),
  )


def _read_drafter(name: str, path: Path) -> Holding:
  """A drafter in a Hugging Face folder."""
  config = read_drafter_config(path)
  _check_layers(config, path / CONFIG_FILE)
  stored, missing = _stored_in_folder(path)
  place = "drafter" if config.training_mode == "dflash" else "vp_drafter"
  return Holding(
    name=name,
    title=f"drafter, {config.training_mode}, for --{place}",
    config=config,
    expected=drafter_tensors(config),
    stored=stored,
    missing_files=missing,
  )


def _stored_in_folder(path: Path) -> tuple[dict[str, Stored], tuple[str, ...]]:
  """The tensors of a Hugging Face folder, and files that are not there."""
  index = path / INDEX_FILE
  shards = [WEIGHTS_FILE]
  if index.is_file():
    named = read_json(index).get("weight_map")
    values = named.values() if isinstance(named, dict) else ()
    shards = sorted({v for v in values if isinstance(v, str)})
  absent = [s for s in shards if not (path / s).is_file()]
  if absent and all(Path(shard).name == shard for shard in shards):
    return {}, _shortened(absent)
  # What else is amiss with the shards is an error.
  tensors = TensorFolder(path).tensors
  stored = {
    name: Stored(t.dtype, t.shape, t.num_bytes) for name, t in tensors.items()
  }
  return stored, ()


def _missing_text_files(path: Path, raw: Mapping[str, Any]) -> list[str]:
  """What a target's text needs and the folder does not have."""
  settings = {
    name: read_json(path / name) if (path / name).is_file() else {}
    for name in (_TOKENIZER_FILES[1], _GENERATION_FILE)
  }
  missing = [n for n in _TOKENIZER_FILES if not (path / n).is_file()]
  templates = settings[_TOKENIZER_FILES[1]].get(_TEMPLATE_KEY)
  if not templates and not (path / _TEMPLATE_FILE).is_file():
    missing.append(f"{_TEMPLATE_FILE} or {_TEMPLATE_KEY} of the tokenizer")
  stops = (settings[_GENERATION_FILE].get(_STOP_KEY), raw.get(_STOP_KEY))
  if all(stop is None for stop in stops):
    missing.append(f"{_STOP_KEY} of {_GENERATION_FILE}")
  return missing


def _check_layers(config: TargetConfig | DrafterConfig, path: Path) -> None:
  """Names are made for every layer: a damaged file may ask for billions."""
  if config.num_layers > MAX_LAYERS:
    raise UsageError(
      f"{path}: {config.num_layers} layers: expected at most {MAX_LAYERS}"
    )


def _shortened(lines: Sequence[str]) -> tuple[str, ...]:
  """The first few, and how many more there are."""
  if len(lines) <= _MOST_SHOWN:
    return tuple(lines)
  more = len(lines) - _MOST_SHOWN
  return (*lines[:_MOST_SHOWN], f"and {more} more, the last {lines[-1]}")

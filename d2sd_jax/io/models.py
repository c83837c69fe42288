"""Targets and drafters by name, folder or file."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from d2sd_jax.config import TargetConfig
from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.drafter_format import load_drafter_folder
from d2sd_jax.io.fetch import SMOLLM2_135M, fetch_default_target
from d2sd_jax.io.gguf import load_gguf, target_metadata
from d2sd_jax.io.gguf_tokenizer import gguf_tokenizer
from d2sd_jax.io.hf_config import target_config_from_hf
from d2sd_jax.io.hf_folder import CONFIG_FILE, TensorFolder, read_json
from d2sd_jax.io.hf_tensors import target_from_tensors
from d2sd_jax.io.hub import FILES, fetch_folder, is_hub_id
from d2sd_jax.io.paths import find_checkpoint, user_path
from d2sd_jax.io.template_tokenizer import hf_tokenizer
from d2sd_jax.io.tokenizer import ChatTokenizer
from d2sd_jax.models.drafter import Drafter
from d2sd_jax.models.target import LlamaTarget

DEFAULT_TARGET = "smollm2-135m"


def target_path(name: str | Path) -> Path:
  """Where a target is: a GGUF file, or a Hugging Face folder.

  Args:
    name: `smollm2-135m`, fetched on first use; the path of a GGUF file or of
      its folder; a folder with `config.json`; or, where there is no such
      path, a hub id `owner/model`, which the hub's client fetches.

  Raises:
    UsageError: no such file, or it could not be fetched.
  """
  if str(name) == DEFAULT_TARGET:
    return fetch_default_target()
  path = user_path(name)
  if not path.exists() and is_hub_id(str(name)):
    return fetch_folder(str(name), "target")
  if (path / CONFIG_FILE).is_file():
    return path
  files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
  require(
    len(files) == 1 and files[0].is_file(),
    "target",
    str(name),
    f"{DEFAULT_TARGET}, a GGUF file, a folder with exactly one, or a folder"
    f" with {CONFIG_FILE}",
  )
  return files[0]


def read_target_config(name: str | Path) -> TargetConfig:
  """A target's shape, without reading any weights."""
  if str(name) == DEFAULT_TARGET:
    return SMOLLM2_135M
  path = target_path(name)
  if not path.is_dir():
    return target_metadata(path)
  where = path / CONFIG_FILE
  return target_config_from_hf(read_json(where), str(where))


def load_target(
  name: str | Path = DEFAULT_TARGET,
  dtype: jax.typing.DTypeLike = jnp.float32,
  implementation: str | None = None,
  mesh: Mesh | None = None,
) -> LlamaTarget:
  """Loads a target onto the default device, one tensor after the other.

  Args:
    name: see `target_path`.
    dtype: of weights, caches and activations.
    implementation: of `cascade_attention`.
    mesh: devices that share it instead; see `target_from_tensors`.

  Raises:
    UsageError: a file is missing, damaged or of an unknown architecture.
  """
  path = target_path(name)
  config: TargetConfig
  tensors: Mapping[str, np.ndarray]
  if path.is_dir():
    config, tensors = read_target_config(path), TensorFolder(path)
  else:
    config, tensors = load_gguf(path)
  return target_from_tensors(config, tensors, dtype, implementation, mesh)


def load_tokenizer(name: str | Path = DEFAULT_TARGET) -> ChatTokenizer:
  """The tokenizer and chat format of a target.

  Args:
    name: see `target_path`.

  Raises:
    UsageError: a file is missing, damaged, or of a kind that is not known.
  """
  path = target_path(name)
  if not path.is_dir():
    return gguf_tokenizer(path)
  tokenizer, config = hf_tokenizer(path), read_target_config(path)
  if tokenizer.vocab_size > config.vocab_size:
    raise UsageError(
      f"{path}: tokenizer of {tokenizer.vocab_size} ids: expected at most the"
      f" embedding's {config.vocab_size}"
    )
  return tokenizer


def target_sha256(name: str | Path) -> str:
  """Of a target's file; of a folder, of its files' names and checksums."""
  path = target_path(name)
  if not path.is_dir():
    return file_sha256(path)
  files = sorted(p for pattern in FILES for p in path.glob(pattern))
  parts = [f"{file_sha256(p)} {p.name}" for p in files]
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def file_sha256(path: Path) -> str:
  """Checksum of a file, in hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def load_drafter(
  name: str | Path,
  target: TargetConfig | None = None,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> Drafter:
  """Loads a drafter folder, or a shipped one by its name.

  Args:
    name: a folder, or a folder's name under `checkpoints/`.
    target: config of the target it is to serve; checked if given.
    dtype: of the weights.

  Raises:
    UsageError: the folder is missing, damaged, unsupported, or does not fit.
  """
  return load_drafter_folder(find_checkpoint(name), target, dtype)

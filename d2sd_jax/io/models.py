"""Targets and drafters by name, folder or file."""

from pathlib import Path

import jax
import jax.numpy as jnp

from d2sd_jax.config import TargetConfig
from d2sd_jax.errors import require
from d2sd_jax.io.drafter_format import load_drafter_folder
from d2sd_jax.io.fetch import SMOLLM2_135M, fetch_default_target
from d2sd_jax.io.gguf import load_gguf, target_metadata
from d2sd_jax.io.hf_tensors import target_from_tensors
from d2sd_jax.io.paths import find_checkpoint, user_path
from d2sd_jax.models.drafter import Drafter
from d2sd_jax.models.target import LlamaTarget

DEFAULT_TARGET = "smollm2-135m"


def target_path(name: str | Path) -> Path:
  """The GGUF file of a target; the default one is fetched on first use.

  Args:
    name: `smollm2-135m`, or the path of a GGUF file or of its folder.

  Raises:
    UsageError: no such file, or it could not be fetched.
  """
  if str(name) == DEFAULT_TARGET:
    return fetch_default_target()
  path = user_path(name)
  files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
  require(
    len(files) == 1 and files[0].is_file(),
    "target",
    str(name),
    f"{DEFAULT_TARGET}, a GGUF file, or a folder with exactly one",
  )
  return files[0]


def read_target_config(name: str | Path) -> TargetConfig:
  """A target's shape, without fetching or reading any weights."""
  if str(name) == DEFAULT_TARGET:
    return SMOLLM2_135M
  return target_metadata(target_path(name))


def load_target(
  name: str | Path = DEFAULT_TARGET,
  dtype: jax.typing.DTypeLike = jnp.float32,
  implementation: str | None = None,
) -> LlamaTarget:
  """Loads a target onto the default device.

  Args:
    name: see `target_path`.
    dtype: of weights, caches and activations.
    implementation: of `cascade_attention`.

  Raises:
    UsageError: the file is missing, damaged or of an unknown architecture.
  """
  config, tensors = load_gguf(target_path(name))
  return target_from_tensors(config, tensors, dtype, implementation)


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

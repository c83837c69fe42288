"""The drafter checkpoint: one Hugging Face folder that others serve too.

`config.json` and `model.safetensors`, laid out as published DFlash drafters
are. Strict both ways: a tensor that is missing, left over or of another shape
is an error that names it, and so is any setting that would change the
computation and is not supported here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from d2sd_jax.config import DTYPES, DrafterConfig, TargetConfig
from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.hf_folder import TensorFolder, read_json
from d2sd_jax.io.hf_names import LAYER_TENSORS, layer_tensors
from d2sd_jax.io.paths import atomic_write
from d2sd_jax.models.drafter import Drafter

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
ARCHITECTURE = "DFlashDraftModel"
# As safetensors spells them.
_DTYPES = ("BF16", "F16", "F32")

# Settings that would change the computation, and the values that do not.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  "architectures": ([ARCHITECTURE], None),
  "attention_bias": (False, None),
  "attention_dropout": (0, None),
  "causal": (False, None),
  "conv_group_size": (None,),
  "conv_kernel_size": (None,),
  "final_logit_softcapping": (None, 0),
  "hidden_act": ("silu", None),
  "input_embedding_scale": (1, None),
  "is_causal": (False, None),
  "mlp_bias": (False, None),
  "model_type": ("qwen3", None),
  "output_multiplier": (1, None),
  "partial_rotary_factor": (1, None),
  "projector_type": (None, "linear"),
  "selector_rank": (None, 0),
  "selector_top_k": (None, 0),
  "sliding_window": (None,),
  "use_sliding_window": (False, None),
  "use_swa": (False, None),
}


def save_drafter(
  drafter: Drafter, folder: str | Path, dtype: str = "bfloat16"
) -> None:
  """Writes `drafter` as a checkpoint folder.

  The same weights give the same bytes. Each file appears whole or not at all.

  Args:
    drafter: what to write.
    folder: made if missing; files of these two names in it are replaced.
    dtype: of the weights in the file, `bfloat16` as servers expect, or
      `float32`.

  Raises:
    UsageError: another dtype.
  """
  require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {
    name: np.ascontiguousarray(value.astype(jnp.dtype(dtype)))
    for name, value in _tensors_of(drafter).items()
  }
  with atomic_write(folder / WEIGHTS_FILE) as path:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only the owner reads
  text = json.dumps(_to_json(drafter.config, dtype), indent=2, sort_keys=True)
  with atomic_write(folder / CONFIG_FILE) as path:
    path.write_text(text + "\n", encoding="utf-8")


def load_drafter_folder(
  folder: str | Path,
  target: TargetConfig | None = None,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> Drafter:
  """Reads a checkpoint folder.

  Args:
    folder: holds `config.json` and `model.safetensors`.
    target: the target it is meant for, checked if given.
    dtype: of the weights in memory.

  Raises:
    UsageError: a file is missing, damaged, unsupported, or does not fit.
  """
  folder = Path(folder)
  config = read_drafter_config(folder, target)
  path = folder / WEIGHTS_FILE
  require(
    path.is_file(), "drafter", str(folder), f"a folder with {WEIGHTS_FILE}"
  )
  tensors = TensorFolder(folder)
  check_tensors(config, tensors, path)
  return _fill(config, tensors, path, dtype)


def drafter_tensors(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
  """Name and shape of every tensor that such a drafter is published as."""
  width, taps = config.hidden_size, len(config.target_layer_ids)
  layer = layer_tensors(config)
  tensors: dict[str, tuple[int, ...]] = {
    "fc.weight": (width, taps * width),
    "hidden_norm.weight": (width,),
    "norm.weight": (width,),
  }
  for i in range(config.num_layers):
    tensors |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
  return tensors


def read_drafter_config(
  folder: str | Path,
  target: TargetConfig | None = None,
  field: str = "drafter",
) -> DrafterConfig:
  """Reads and checks `config.json` alone; see `load_drafter_folder`.

  Args:
    folder: as there.
    target: as there.
    field: what an error calls the folder, e.g. the flag it came from.
  """
  path = Path(folder) / CONFIG_FILE
  require(path.is_file(), field, str(folder), f"a folder with {CONFIG_FILE}")
  raw = read_json(path)
  if not isinstance(raw.get("dflash_config", {}), dict):
    raise UsageError(f"{path}: expected a JSON object of a drafter's config")
  try:
    config = _from_json(raw)
    if target is not None:
      config.check_fits(target)
  except (UsageError, TypeError, AttributeError) as error:
    raise UsageError(f"{path}: {_one_line(error)}") from error
  return config


def _to_json(config: DrafterConfig, dtype: str) -> dict[str, Any]:
  """`config.json`, with both spellings of what loaders disagree on."""
  dflash: dict[str, Any] = {
    "mask_token_id": config.mask_token_id,
    "target_layer_ids": list(config.target_layer_ids),
    "block_size": config.block_size,
  }
  if config.training_mode == "vp_drafter":
    dflash["training_mode"] = config.training_mode
    dflash["prefix_weight_base"] = config.prefix_weight_base
  rope = {"rope_type": "default", "rope_theta": config.rope_theta}
  return {
    "architectures": [ARCHITECTURE],
    "attention_bias": False,
    "block_size": config.block_size,
    "dflash_config": dflash,
    "dtype": dtype,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "layer_types": ["full_attention"] * config.num_layers,
    "max_position_embeddings": config.max_length,
    "model_type": "qwen3",
    "num_attention_heads": config.num_heads,
    "num_hidden_layers": config.num_layers,
    "num_key_value_heads": config.num_kv_heads,
    "num_target_layers": config.num_target_layers,
    "rms_norm_eps": config.rms_norm_eps,
    "rope_parameters": rope,
    "rope_theta": config.rope_theta,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "vocab_size": config.vocab_size,
  }


def _from_json(raw: Mapping[str, Any]) -> DrafterConfig:
  """The config, or a `UsageError` that names the key."""
  dflash = raw.get("dflash_config", {})
  for settings in (raw, dflash):
    _refuse_unsupported(settings)
  # Loaders look for these in either place.
  for key in ("block_size", "mask_token_id", "target_layer_ids"):
    values = [s[key] for s in (raw, dflash) if key in s]
    alike = all(value == values[0] for value in values)
    require(alike, key, values, "the same value in both places")
  own = {**raw, **dflash}

  def integer(source: Mapping[str, Any], key: str) -> int:
    value = source.get(key)
    right = type(value) is int and abs(value) < 2**31
    require(right, key, value, "a whole number below 2^31")
    return value  # type: ignore[return-value]

  def real(source: Mapping[str, Any], key: str) -> float:
    value = source.get(key)
    require(_is_number(value), key, value, "a number below 1e30")
    return float(value)  # type: ignore[arg-type]

  ids = own.get("target_layer_ids")
  whole = isinstance(ids, list) and all(type(i) is int for i in ids)
  require(whole, "target_layer_ids", ids, "a list of layer numbers")
  return DrafterConfig(
    vocab_size=integer(raw, "vocab_size"),
    hidden_size=integer(raw, "hidden_size"),
    intermediate_size=integer(raw, "intermediate_size"),
    num_layers=integer(raw, "num_hidden_layers"),
    num_heads=integer(raw, "num_attention_heads"),
    num_kv_heads=integer(raw, "num_key_value_heads"),
    head_dim=integer(raw, "head_dim"),
    rope_theta=_rope_theta(raw),
    rms_norm_eps=real(raw, "rms_norm_eps"),
    max_length=integer(raw, "max_position_embeddings"),
    block_size=integer(own, "block_size"),
    mask_token_id=integer(own, "mask_token_id"),
    target_layer_ids=tuple(ids or ()),
    num_target_layers=integer(raw, "num_target_layers"),
    training_mode=dflash.get("training_mode", "dflash"),
    prefix_weight_base=real(
      {"prefix_weight_base": 0.9, **dflash}, "prefix_weight_base"
    ),
  )


def _refuse_unsupported(settings: Mapping[str, Any]) -> None:
  """Refuses by name whatever would change the computation."""
  for key, neutral in _NEUTRAL.items():
    value = settings.get(key)
    expected = f"{neutral[0]!r} (others are not supported)"
    require(value in neutral, key, value, expected)
  kinds = settings.get("layer_types") or []
  require(isinstance(kinds, list), "layer_types", kinds, "a list")
  for value in kinds:
    expected = "'full_attention' (others are not supported)"
    require(value == "full_attention", "layer_types", value, expected)
  vocabulary = settings.get("draft_vocab_size")
  fits = vocabulary in (None, settings.get("vocab_size"))
  require(fits, "draft_vocab_size", vocabulary, "the target's, or none")


def _rope_theta(raw: Mapping[str, Any]) -> float:
  """RoPE's base, stated once or alike wherever it is; scaling is refused."""
  thetas = [raw.get("rope_theta")]
  for key in ("rope_scaling", "rope_parameters"):
    rope = raw.get(key) or {}
    require(isinstance(rope, dict), key, rope, "an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind == "default", f"{key} type", kind, "'default'")
    partial = rope.get("partial_rotary_factor", 1)
    require(partial == 1, "partial_rotary_factor", partial, "1")
    thetas.append(rope.get("rope_theta"))
  stated = [theta for theta in thetas if theta is not None]
  numbers = all(map(_is_number, stated))
  alike = numbers and len(set(stated)) == 1
  require(alike, "rope_theta", stated, "one number, stated")
  return float(stated[0])


def _is_number(value: Any) -> bool:
  """Whether it is one, and of a size that floating point holds."""
  return type(value) in (int, float) and abs(value) < 1e30


def _parameters(drafter: Drafter) -> dict[str, nnx.Param]:
  """The drafter's parameters under the names of the format."""
  named = {
    "fc.weight": drafter.fc,
    "hidden_norm.weight": drafter.hidden_norm,
    "norm.weight": drafter.norm,
  }
  for i, layer in enumerate(drafter.layers):
    for field, name in LAYER_TENSORS.items():
      named[f"layers.{i}.{name}.weight"] = getattr(layer, field)
  return named


def _tensors_of(drafter: Drafter) -> dict[str, np.ndarray]:
  """Parameters as the format holds them: matrices `[out, in]`."""
  # Transposing a vector does nothing.
  return {k: np.asarray(p[...]).T for k, p in _parameters(drafter).items()}


def check_tensors(
  config: DrafterConfig, found: TensorFolder, path: Path
) -> None:
  """Raises `UsageError` unless the headers hold just the drafter's tensors.

  Args:
    config: what the tensors must fit.
    found: the tensors that are there; none of them is read.
    path: what errors call the file.
  """
  # Before any name is made: a damaged config may ask for billions of layers.
  last = f"layers.{config.num_layers - 1}.input_layernorm.weight"
  if last not in found:
    raise UsageError(f"{path}: tensor {last} is missing")
  shapes = drafter_tensors(config)
  for name in sorted(shapes.keys() | found.keys()):
    if name not in found:
      raise UsageError(f"{path}: tensor {name} is missing")
    if name not in shapes:
      raise UsageError(f"{path}: tensor {name} is not part of a drafter")
    tensor = found.tensors[name]
    if tensor.shape != shapes[name]:
      raise UsageError(
        f"{path}: tensor {name} has shape {tensor.shape}, "
        f"expected {shapes[name]}"
      )
    if tensor.dtype not in _DTYPES:
      raise UsageError(
        f"{path}: tensor {name} has dtype {tensor.dtype}, expected one of "
        f"{', '.join(_DTYPES)}"
      )


def _fill(
  config: DrafterConfig,
  tensors: Mapping[str, np.ndarray],
  path: Path,
  dtype: jax.typing.DTypeLike,
) -> Drafter:
  """A drafter of these tensors, which are read one at a time."""
  make = lambda: Drafter(config, rngs=nnx.Rngs(0), dtype=dtype)
  drafter = nnx.eval_shape(make)
  for name, parameter in _parameters(drafter).items():
    value = tensors[name]
    if not np.isfinite(value).all():
      raise UsageError(
        f"{path}: tensor {name} has a NaN or an infinity, expected numbers"
      )
    parameter.set_value(jnp.array(value.T, dtype))
  return drafter


def _one_line(error: Exception) -> str:
  """The first line of an error's message."""
  return (str(error) or type(error).__name__).splitlines()[0]

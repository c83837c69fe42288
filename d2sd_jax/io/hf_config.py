"""A target's shape from the `config.json` of a Hugging Face folder.

The family is `model_type`'s. A key that would change the computation in a way
the model here does not have is refused, by name and value.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from d2sd_jax.config import TargetConfig
from d2sd_jax.errors import UsageError
from d2sd_jax.io import mxfp4
from d2sd_jax.models.experts import ALPHA
from d2sd_jax.models.rope import (
  LinearScaling,
  Llama3Scaling,
  RopeScaling,
  YarnScaling,
  yarn_attention_factor,
)

FAMILIES = ("llama", "qwen3", "gpt_oss")
# More is a damaged file: names are made for every layer before any is read.
MAX_LAYERS = 1024

# Keys that would change the computation, and the values that do not.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  "hidden_act": ("silu",),
  "mlp_bias": (False,),
  "partial_rotary_factor": (1,),
  "rope_interleaved": (False,),
  "swiglu_alpha": (ALPHA,),
}
# What each kind of RoPE may be told; anything else is refused.
_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
  "default": (),
  "linear": ("factor",),
  "llama3": (
    *("factor", "low_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings",
  ),
  "yarn": (
    *("factor", "original_max_position_embeddings", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
  ),
}


def target_config_from_hf(raw: Mapping[str, Any], where: str) -> TargetConfig:
  """The shape of a published target.

  Args:
    raw: the object in `config.json`; older and newer spellings of RoPE's
      settings are both read.
    where: what errors call the file.

  Raises:
    UsageError: the family is unknown, a key is missing or malformed, or it
      asks for what the model here does not have.
  """
  keys = _Keys(raw, where)
  family = raw.get("model_type")
  keys.expect("model_type", family in FAMILIES, f"one of {', '.join(FAMILIES)}")
  for key, neutral in _NEUTRAL.items():
    value = raw.get(key)
    expected = f"{neutral[0]!r} (others are not supported)"
    keys.expect(key, value is None or value in neutral, expected)
  is_gpt_oss = family == "gpt_oss"
  shape = _shape(keys)
  num_layers = shape["num_layers"]
  theta, scaling = _rope(keys, 150_000.0 if is_gpt_oss else 10_000.0)
  return TargetConfig(
    **shape,
    rope_theta=theta,
    rope_scaling=scaling,
    rms_norm_eps=keys.real("rms_norm_eps"),
    tied_head=keys.flag("tie_word_embeddings", False),
    qk_norm=family == "qwen3",
    attention_bias=keys.flag("attention_bias", is_gpt_oss),
    sinks=is_gpt_oss,
    windows=_windows(keys, num_layers),
    **_experts(keys, shape) if is_gpt_oss else _no_experts(keys),
  )


class _Keys:
  """Type-checked reads of one mapping; a failure names key, value and file."""

  def __init__(self, raw: Mapping[str, Any], where: str):
    self.raw, self.where = raw, where

  def expect(self, key: str, condition: bool, expected: str) -> None:
    if not condition:
      value = self.raw.get(key)
      shown = repr(value)
      shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
      raise UsageError(f"{self.where}: {key}={shown}: expected {expected}")

  def get(self, key: str, default: Any) -> Any:
    """The value; the default stands for an absent key and for null."""
    value = self.raw.get(key)
    return default if value is None else value

  def integer(self, key: str, default: int | None = None) -> int:
    value = self.get(key, default)
    right = type(value) is int and 0 < value < 2**31
    self.expect(key, right, "a positive whole number")
    return value

  def real(self, key: str, default: float | None = None) -> float:
    value = self.get(key, default)
    right = type(value) in (int, float) and 0 < value < 1e30
    self.expect(key, right, "a positive number")
    return float(value)

  def flag(self, key: str, default: bool) -> bool:
    value = self.get(key, default)
    self.expect(key, type(value) is bool, "true or false")
    return value


def _shape(keys: _Keys) -> dict[str, Any]:
  """The sizes all families have."""
  num_heads = keys.integer("num_attention_heads")
  num_kv_heads = keys.integer("num_key_value_heads", num_heads)
  keys.expect(
    "num_key_value_heads",
    num_heads % num_kv_heads == 0,
    f"a divisor of the {num_heads} heads",
  )
  width = keys.integer("hidden_size")
  head_dim = keys.integer("head_dim", max(width // num_heads, 1))
  keys.expect("head_dim", head_dim % 2 == 0, "an even head size")
  num_layers = keys.integer("num_hidden_layers")
  few = num_layers <= MAX_LAYERS
  keys.expect("num_hidden_layers", few, f"at most {MAX_LAYERS}")
  return {
    "vocab_size": keys.integer("vocab_size"),
    "hidden_size": width,
    "intermediate_size": keys.integer("intermediate_size"),
    "num_layers": num_layers,
    "num_heads": num_heads,
    "num_kv_heads": num_kv_heads,
    "head_dim": head_dim,
    "max_length": keys.integer("max_position_embeddings"),
  }


def _rope(
  keys: _Keys, default_theta: float
) -> tuple[float, RopeScaling | None]:
  """RoPE's base and scaling, from either spelling or from both alike."""
  found = []
  for key in ("rope_scaling", "rope_parameters"):
    rope = keys.get(key, {})
    keys.expect(key, isinstance(rope, Mapping), "an object or null")
    if rope:
      found.append(_rope_settings(_Keys(rope, f"{keys.where}: {key}")))
  kinds = [scaling for _, scaling in found]
  same = all(kind == kinds[0] for kind in kinds)
  keys.expect("rope_parameters", same, "the same settings as rope_scaling")
  thetas = {theta for theta, _ in found if theta is not None}
  if keys.raw.get("rope_theta") is not None:
    thetas.add(_theta(keys))
  keys.expect("rope_theta", len(thetas) <= 1, "one value wherever it is stated")
  return thetas.pop() if thetas else default_theta, kinds[0] if kinds else None


def _rope_settings(keys: _Keys) -> tuple[float | None, RopeScaling | None]:
  """Base and scaling of one object of RoPE settings."""
  kind_key = "rope_type" if "rope_type" in keys.raw else "type"
  kind = keys.get(kind_key, "default")
  known = isinstance(kind, str) and kind in _ROPE_KEYS
  keys.expect(kind_key, known, f"one of {', '.join(_ROPE_KEYS)}")
  partial = keys.get("partial_rotary_factor", 1)
  keys.expect("partial_rotary_factor", partial == 1, "1")
  fixed = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
  for key in keys.raw:
    allowed = key in fixed or key in _ROPE_KEYS[kind]
    keys.expect(key, allowed, f"no such key for RoPE of type {kind!r}")
  stated = keys.raw.get("rope_theta") is not None
  return _theta(keys) if stated else None, _scaling(keys, kind)


def _theta(keys: _Keys) -> float:
  """RoPE's base; with 1 all pairs of dimensions would turn alike."""
  theta = keys.real("rope_theta")
  keys.expect("rope_theta", theta > 1, "more than 1")
  return theta


def _scaling(keys: _Keys, kind: str) -> RopeScaling | None:
  """The scaling of a kind of RoPE."""
  if kind == "default":
    return None
  factor = keys.real("factor")
  keys.expect("factor", factor >= 1, "1 or more")
  if kind == "linear":
    return LinearScaling(factor=factor)
  original = keys.integer("original_max_position_embeddings")
  if kind == "llama3":
    low, high = keys.real("low_freq_factor"), keys.real("high_freq_factor")
    keys.expect("high_freq_factor", low < high, "more than low_freq_factor")
    return Llama3Scaling(
      factor=factor,
      low_freq_factor=low,
      high_freq_factor=high,
      original_length=original,
    )
  fast, slow = keys.real("beta_fast", 32), keys.real("beta_slow", 1)
  keys.expect("beta_fast", slow < fast, "more than beta_slow")
  return YarnScaling(
    factor=factor,
    original_length=original,
    attention_factor=_yarn_attention_factor(keys, factor),
    beta_fast=fast,
    beta_slow=slow,
    truncate=keys.flag("truncate", True),
  )


def _yarn_attention_factor(keys: _Keys, factor: float) -> float:
  """As stated, or a ratio of two temperatures, or YaRN's own."""
  if keys.raw.get("attention_factor") is not None:
    return keys.real("attention_factor")
  scales = [keys.raw.get(key) for key in ("mscale", "mscale_all_dim")]
  if not all(scales):
    return yarn_attention_factor(factor)
  above, below = (
    yarn_attention_factor(factor, keys.real(key))
    for key in ("mscale", "mscale_all_dim")
  )
  return above / below


def _windows(keys: _Keys, num_layers: int) -> tuple[int | None, ...]:
  """The window of each layer; empty where every layer sees everything."""
  kinds = _layer_kinds(keys, num_layers)
  if "sliding_attention" not in kinds:
    return ()
  if keys.raw["model_type"] == "qwen3":
    slides = keys.flag("use_sliding_window", False)
    keys.expect("use_sliding_window", slides, "true where layers slide")
  window = keys.integer("sliding_window")
  return tuple(window if k == "sliding_attention" else None for k in kinds)


def _layer_kinds(keys: _Keys, num_layers: int) -> Sequence[str]:
  """`layer_types`, or what a family means by leaving it out."""
  known: tuple[str, ...] = ("full_attention", "sliding_attention")
  kinds = keys.raw.get("layer_types")
  family = keys.raw["model_type"]
  slides = keys.flag("use_sliding_window", False)
  if family == "llama":
    known = known[:1]
    keys.expect("use_sliding_window", not slides, "false")
    plain = keys.raw.get("sliding_window") is None
    keys.expect("sliding_window", plain, "null in a llama model")
  if kinds is not None:
    right = (
      isinstance(kinds, Sequence)
      and len(kinds) == num_layers
      and all(kind in known for kind in kinds)
    )
    expected = f"one of {' or '.join(known)} for each of {num_layers} layers"
    keys.expect("layer_types", right, expected)
    return kinds
  first = num_layers
  if family == "qwen3" and slides:
    first = keys.get("max_window_layers", 28)
    whole = type(first) is int and first >= 0
    keys.expect("max_window_layers", whole, "a number of layers")
  if family == "gpt_oss":
    return [known[(i + 1) % 2] for i in range(num_layers)]
  return [known[i >= first] for i in range(num_layers)]


def _experts(keys: _Keys, shape: Mapping[str, int]) -> dict[str, Any]:
  """Those of GPT-OSS, and whether their weights are quantised."""
  key = (
    "num_local_experts" if "num_local_experts" in keys.raw else "num_experts"
  )
  count = keys.integer(key)
  per_token = keys.integer("num_experts_per_tok")
  expected = f"at most {key} = {count}"
  keys.expect("num_experts_per_tok", per_token <= count, expected)
  quantised = _is_mxfp4(keys)
  for size in ("hidden_size", "intermediate_size") if quantised else ():
    whole = shape[size] % mxfp4.BLOCK == 0
    keys.expect(size, whole, f"a multiple of {mxfp4.BLOCK} for MXFP4")
  return {
    "num_experts": count,
    "experts_per_token": per_token,
    "swiglu_limit": keys.real("swiglu_limit", 7.0),
    "mxfp4": quantised,
  }


def _no_experts(keys: _Keys) -> dict[str, Any]:
  """A dense model, in floating point."""
  for key in ("num_local_experts", "num_experts", "quantization_config"):
    keys.expect(key, keys.raw.get(key) is None, "none in a dense model")
  return {}


def _is_mxfp4(keys: _Keys) -> bool:
  """Whether the experts are stored as MXFP4; other kinds are refused."""
  key = "quantization_config"
  settings = keys.get(key, {})
  keys.expect(key, isinstance(settings, Mapping), "an object or null")
  if not settings:
    return False
  inner = _Keys(settings, f"{keys.where}: {key}")
  method = settings.get("quant_method")
  inner.expect("quant_method", method == "mxfp4", "'mxfp4'")
  return True

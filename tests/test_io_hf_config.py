"""config.json read, and refused; a target's published tensors, and its own."""

import copy
import dataclasses
import math
import runpy
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from published import (
  GPT_OSS_20B,
  GPT_OSS_20B_BYTES,
  GPT_OSS_20B_LAYERS,
  GPT_OSS_20B_TENSORS,
  LLAMA_2_7B,
  LLAMA_31_8B,
  QWEN3_8B,
  QWEN3_8B_BYTES,
  QWEN3_8B_LAYERS,
  QWEN3_8B_TENSORS,
  SMOLLM2_135M,
)

from d2sd_jax import TargetConfig, UsageError
from d2sd_jax.config import from_mapping
from d2sd_jax.decoding.decode_config import DecodeConfig
from d2sd_jax.io import fetch
from d2sd_jax.io.hf_config import target_config_from_hf
from d2sd_jax.io.hf_names import target_tensors
from d2sd_jax.io.hf_tensors import target_from_tensors
from d2sd_jax.models.rope import LinearScaling, Llama3Scaling, YarnScaling


def _read(raw, **changes):
  """The config with some keys changed; `...` removes one."""
  raw = {k: v for k, v in {**raw, **changes}.items() if v is not ...}
  return target_config_from_hf(raw, "config.json")


def test_qwen3_8b():
  assert _read(QWEN3_8B) == TargetConfig(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    max_length=40960,
    tied_head=False,
    qk_norm=True,
  )


def test_gpt_oss_20b():
  assert _read(GPT_OSS_20B) == TargetConfig(
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    num_layers=24,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    rope_theta=150000.0,
    rms_norm_eps=1e-5,
    max_length=131072,
    tied_head=False,
    rope_scaling=YarnScaling(
      factor=32.0,
      original_length=4096,
      attention_factor=0.1 * math.log(32) + 1,
      beta_fast=32.0,
      beta_slow=1.0,
      truncate=False,
    ),
    attention_bias=True,
    sinks=True,
    windows=(128, None) * 12,
    num_experts=32,
    experts_per_token=4,
    swiglu_limit=7.0,
    mxfp4=True,
  )
  # Where the layers' kinds are not stated, they alternate, sliding first.
  assert _read(GPT_OSS_20B, layer_types=...) == _read(GPT_OSS_20B)
  assert not _read(GPT_OSS_20B, quantization_config=...).mxfp4


def test_llamas_of_three_generations():
  assert _read(SMOLLM2_135M) == fetch.SMOLLM2_135M
  oldest = _read(LLAMA_2_7B)
  assert (oldest.rope_theta, oldest.num_kv_heads) == (10_000.0, 32)
  assert oldest.head_dim == 128
  scaled = _read(LLAMA_31_8B)
  assert scaled.rope_theta == 500_000.0
  assert scaled.rope_scaling == Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192
  )
  assert hash(scaled)


def test_both_spellings_of_rope_are_one():
  for raw in (QWEN3_8B, LLAMA_31_8B, GPT_OSS_20B):
    scaling = raw["rope_scaling"] or {"rope_type": "default"}
    newer = {**scaling, "rope_theta": raw["rope_theta"]}
    expected = _read(raw)
    only = _read(raw, rope_scaling=..., rope_theta=..., rope_parameters=newer)
    assert only == expected
    if raw["rope_scaling"]:
      assert _read(raw, rope_parameters=newer) == expected
      older = {("type" if k == "rope_type" else k): v for k, v in newer.items()}
      assert _read(raw, rope_scaling=older) == expected


def test_other_scalings():
  linear = {"type": "linear", "factor": 4}
  config = _read(LLAMA_2_7B, rope_scaling=linear)
  assert config.rope_scaling == LinearScaling(factor=4.0)
  yarn = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
  }
  scaling = _read(QWEN3_8B, rope_scaling=yarn).rope_scaling
  assert scaling.truncate
  assert (scaling.beta_fast, scaling.beta_slow) == (32, 1)
  assert scaling.attention_factor == 0.1 * math.log(4) + 1
  for settings, expected in (
    ({"attention_factor": 0.75}, 0.75),
    ({"mscale": 2.0, "mscale_all_dim": 2.0}, 1.0),
    (
      {"mscale": 1.0, "mscale_all_dim": 0.5},
      (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
    ),
    ({"mscale": 3.0, "mscale_all_dim": 0}, 0.1 * math.log(4) + 1),
  ):
    scaling = _read(QWEN3_8B, rope_scaling={**yarn, **settings}).rope_scaling
    assert scaling.attention_factor == pytest.approx(expected, rel=1e-12)


def test_qwen3_may_slide_from_some_layer_on():
  config = _read(
    QWEN3_8B, use_sliding_window=True, sliding_window=64, max_window_layers=34
  )
  assert config.windows == (None,) * 34 + (64,) * 2
  assert _read(QWEN3_8B, sliding_window=64).windows == ()


_YARN = GPT_OSS_20B["rope_scaling"]


@pytest.mark.parametrize(
  ("raw", "changes", "message"),
  [
    (QWEN3_8B, {"model_type": "qwen3_moe"}, "model_type='qwen3_moe'"),
    (QWEN3_8B, {"model_type": ...}, "model_type=None"),
    (QWEN3_8B, {"model_type": ["qwen3"]}, "model_type="),
    (QWEN3_8B, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    (QWEN3_8B, {"hidden_size": ...}, "hidden_size=None"),
    (QWEN3_8B, {"hidden_size": True}, "hidden_size=True"),
    (QWEN3_8B, {"vocab_size": -1}, "vocab_size=-1"),
    (QWEN3_8B, {"head_dim": 127}, "head_dim=127"),
    (QWEN3_8B, {"num_key_value_heads": 5}, "num_key_value_heads=5"),
    (QWEN3_8B, {"num_hidden_layers": 10**9}, "num_hidden_layers=10000"),
    (QWEN3_8B, {"rms_norm_eps": "small"}, "rms_norm_eps='small'"),
    (QWEN3_8B, {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    (QWEN3_8B, {"rope_theta": 0}, "rope_theta=0"),
    (QWEN3_8B, {"tie_word_embeddings": 1}, "tie_word_embeddings=1"),
    (QWEN3_8B, {"rope_scaling": {"type": "dynamic"}}, "type='dynamic'"),
    (QWEN3_8B, {"rope_scaling": [1]}, "rope_scaling="),
    (QWEN3_8B, {"rope_parameters": {"rope_theta": 5}}, "rope_theta=1000000"),
    (
      QWEN3_8B,
      {"rope_parameters": {"sliding_attention": {}}},
      "rope_parameters: sliding_attention=",
    ),
    (QWEN3_8B, {"layer_types": ["full_attention"]}, "layer_types="),
    (
      QWEN3_8B,
      {"use_sliding_window": True, "max_window_layers": 3},
      "sliding_window=None",
    ),
    (
      QWEN3_8B,
      {"layer_types": ["sliding_attention"] * 36, "sliding_window": 9},
      "use_sliding_window=False",
    ),
    (QWEN3_8B, {"quantization_config": {"a": 1}}, "quantization_config="),
    (QWEN3_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (QWEN3_8B, {"num_experts": 8}, "num_experts=8"),
    (LLAMA_31_8B, {"mlp_bias": True}, "mlp_bias=True"),
    (LLAMA_31_8B, {"sliding_window": 9}, "sliding_window=9"),
    (SMOLLM2_135M, {"rope_interleaved": True}, "rope_interleaved=True"),
    (
      LLAMA_31_8B,
      {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
      "rope_scaling: original_max_position_embeddings=None",
    ),
    (
      LLAMA_31_8B,
      {"rope_scaling": {**LLAMA_31_8B["rope_scaling"], "beta_fast": 3}},
      "rope_scaling: beta_fast=3",
    ),
    (GPT_OSS_20B, {"swiglu_alpha": 1.5}, "swiglu_alpha=1.5"),
    (GPT_OSS_20B, {"num_experts_per_tok": 33}, "num_experts_per_tok=33"),
    (GPT_OSS_20B, {"num_local_experts": ...}, "num_experts=None"),
    (GPT_OSS_20B, {"sliding_window": None}, "sliding_window=None"),
    (GPT_OSS_20B, {"hidden_size": 2900}, "hidden_size=2900"),
    (
      GPT_OSS_20B,
      {"quantization_config": {"quant_method": "gptq"}},
      "quantization_config: quant_method='gptq'",
    ),
    (
      GPT_OSS_20B,
      {"rope_scaling": {**_YARN, "truncate": 0}},
      "rope_scaling: truncate=0",
    ),
    (
      GPT_OSS_20B,
      {"rope_scaling": {**_YARN, "factor": 0.5}},
      "rope_scaling: factor=0.5",
    ),
  ],
)
def test_what_is_refused_and_how_it_is_named(raw, changes, message):
  with pytest.raises(UsageError) as error:
    _read(copy.deepcopy(raw), **changes)
  text = str(error.value)
  assert text.startswith("config.json: ")
  assert message in text
  assert "expected" in text
  assert "\n" not in text


_PUBLISHED = pytest.mark.parametrize(
  ("raw", "patterns", "num_layers", "num_bytes"),
  [
    (QWEN3_8B, QWEN3_8B_TENSORS, QWEN3_8B_LAYERS, QWEN3_8B_BYTES),
    (GPT_OSS_20B, GPT_OSS_20B_TENSORS, GPT_OSS_20B_LAYERS, GPT_OSS_20B_BYTES),
  ],
  ids=["qwen3_8b", "gpt_oss_20b"],
)


@_PUBLISHED
def test_full_sizes_have_the_published_tensors(
  raw, patterns, num_layers, num_bytes
):
  expected = {
    name.format(i): shape
    for name, shape in patterns.items()
    for i in range(num_layers)
  }
  config = _read(raw)
  tensors = target_tensors(config)
  assert tensors == expected
  codes = lambda name: name.endswith(("_blocks", "_scales"))
  sizes = {n: math.prod(s) * (1 if codes(n) else 2) for n, s in tensors.items()}
  assert sum(sizes.values()) == num_bytes

  # And the model is made of nothing but them.
  shapes = {
    name: jax.ShapeDtypeStruct(s, jnp.uint8 if codes(name) else jnp.bfloat16)
    for name, s in tensors.items()
  }
  build = lambda t: target_from_tensors(config, t, jnp.bfloat16)
  target = jax.eval_shape(build, shapes)
  leaves = jax.tree.leaves(target)
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
  # Two codes a byte; scales are in them.
  values = sum(
    math.prod(shape) * (2 if name.endswith("_blocks") else 1)
    for name, shape in tensors.items()
    if not name.endswith("_scales")
  )
  assert sum(leaf.size for leaf in leaves) == values

  # It runs, on one row of a prompt.
  prefill = lambda t, ids, n: t.prefill(ids, n, (1, num_layers - 3))
  ids = jax.ShapeDtypeStruct((3, 160), jnp.int32)
  rows = jax.ShapeDtypeStruct((3,), jnp.int32)
  output = jax.eval_shape(prefill, target, ids, rows)
  assert output.logits.shape == (3, config.vocab_size)
  assert output.features.shape == (3, 160, 2, config.hidden_size)


def test_a_qwen3_8b_layer_holds_what_it_should():
  config = _read(QWEN3_8B)
  build = lambda t: target_from_tensors(config, t, jnp.bfloat16)
  shapes = {
    name: jax.ShapeDtypeStruct(shape, jnp.float16)
    for name, shape in target_tensors(config).items()
  }
  layer = jax.eval_shape(build, shapes).layers[35]
  assert layer.qkv_proj.shape == (4096, 4096 + 2 * 1024)
  assert layer.gate_up_proj.shape == (4096, 2 * 12288)
  assert layer.down_proj.shape == (12288, 4096)
  assert layer.experts is layer.sinks is layer.qkv_bias is None


@pytest.mark.parametrize("name", ["qwen3_8b", "gpt_oss_20b"])
def test_the_papers_targets_have_configs(name):
  path = Path(__file__).parents[1] / "configs" / f"{name}.py"
  values = runpy.run_path(str(path))["get_config"]().to_dict()
  config = from_mapping(DecodeConfig, values)
  assert config.target.lower().endswith(name.replace("_", "-"))
  assert config.drafter.startswith("z-lab/")


class _Lazy(dict):
  """Makes tensors when asked; counts how often, and those not let go of."""

  def __init__(self, tensors):
    super().__init__(dict.fromkeys(tensors, 0))
    self._tensors, self._given, self.kept = tensors, [], 0

  def __getitem__(self, name):
    self.kept = max(self.kept, sum(ref() is not None for ref in self._given))
    self[name] = super().__getitem__(name) + 1
    value = self._tensors[name].copy()
    self._given.append(weakref.ref(value))
    return value


@pytest.mark.parametrize("config", [tiny.TARGET, tiny.GPT_OSS])
def test_each_tensor_is_read_once_and_let_go_before_the_next(config):
  tensors = tiny.target_tensors(config, 0)
  jax.devices()  # A plugin that fails to start would hold on to its caller.
  lazy = _Lazy(tensors)
  target = target_from_tensors(config, lazy, jnp.float32)
  assert set(lazy.values()) == {1}
  assert lazy.kept == 0
  expected = tiny.target(0, config)
  for a, b in zip(*map(jax.tree.leaves, (target, expected)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_nothing_is_read_where_a_name_is_wrong():
  tensors = tiny.target_tensors(tiny.TARGET, 0)
  lazy = _Lazy({**tensors, "model.layers.9.mlp.up_proj.weight": np.zeros(3)})
  with pytest.raises(UsageError, match=r"layers\.9\.mlp\.up_proj"):
    target_from_tensors(tiny.TARGET, lazy, jnp.float32)
  assert set(lazy.values()) == {0}


def _quantised():
  config = dataclasses.replace(
    tiny.GPT_OSS, hidden_size=64, intermediate_size=32, mxfp4=True
  )
  rng = np.random.default_rng(0)
  codes = lambda s: rng.integers(120, 126, s, dtype=np.uint8)
  floats = lambda s: rng.standard_normal(s, np.float32)
  return config, {
    name: (codes if name.endswith(("_blocks", "_scales")) else floats)(shape)
    for name, shape in target_tensors(config).items()
  }


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("mlp.experts.down_proj_scales", lambda x: x[:, :-1], "shape"),
    ("mlp.experts.down_proj_scales", lambda x: 0 * x + 255, "a NaN scale"),
    ("mlp.experts.down_proj_scales", lambda x: 0 * x + 254, "too large"),
    ("mlp.experts.gate_up_proj_blocks", np.float32, "dtype float32"),
    ("mlp.experts.gate_up_proj_bias", np.int64, "dtype int64"),
    ("self_attn.sinks", lambda x: x[:-1], "shape"),
    ("self_attn.q_proj.bias", lambda x: x[:-1], "shape"),
    ("mlp.router.weight", lambda x: x.T, "shape"),
  ],
)
def test_wrong_experts_are_refused_by_name(name, change, message):
  config, tensors = _quantised()
  name = f"model.layers.2.{name}"
  tensors[name] = change(tensors[name])
  with pytest.raises(UsageError, match=f"{name}: {message}"):
    target_from_tensors(config, tensors, jnp.float32)

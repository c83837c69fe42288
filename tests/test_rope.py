"""RoPE and its scalings: recorded from transformers, and by definition."""

import json
import math

import goldens
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from d2sd_jax.io.hf_config import target_config_from_hf
from d2sd_jax.models.rope import (
  LinearScaling,
  Llama3Scaling,
  YarnScaling,
  rotate,
  yarn_attention_factor,
)

_NAMES = (
  *("gpt_oss_20b", "llama_31_8b", "llama_32_1b", "llama_2_linear"),
  *("qwen3_yarn", "qwen3_mscale"),
)


def _frequencies(theta, half, scaling):
  """Read off a rotation by one position: the angle of each pair."""
  x = jnp.concatenate([jnp.ones(half), jnp.zeros(half)])[None]
  turned = np.asarray(rotate(x, jnp.int32(1), theta, scaling)[0], np.float64)
  cos, sin = np.split(turned, 2)
  return np.arctan2(sin, cos), np.hypot(cos, sin)


@pytest.mark.parametrize("name", _NAMES)
def test_frequencies_of_published_configs_are_transformers(name):
  golden = goldens.load("rope")
  raw = json.loads(str(golden[f"{name}_config"]))
  config = target_config_from_hf(raw, name)
  expected = golden[f"{name}_frequencies"]
  half = config.head_dim // 2
  assert expected.shape == (half,)
  found, length = _frequencies(config.rope_theta, half, config.rope_scaling)
  np.testing.assert_allclose(found, expected, rtol=2e-6)
  np.testing.assert_allclose(length, golden[f"{name}_factor"], rtol=1e-6)
  own = oracles.frequencies(config.rope_theta, half, config.rope_scaling)
  np.testing.assert_allclose(own, expected, rtol=2e-6)


def test_llama3_by_hand():
  # Theta 4, four pairs: frequencies 1, 4^-1/4, 1/2, 4^-3/4.
  scaling = Llama3Scaling(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=2.0,
    original_length=3 * math.pi,
  )
  found, _ = _frequencies(4.0, 4, scaling)
  # They turn 1.5, 1.06, 0.75 and 0.53 times: one half, 6 % and none is kept.
  turns = 1.5 * 4 ** (-1 / 4) - 1
  expected = [
    0.5 + 0.5 / 8,
    4 ** (-1 / 4) * (turns + (1 - turns) / 8),
    0.5 / 8,
    4 ** (-3 / 4) / 8,
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_yarn_by_hand():
  # Theta e^4, four pairs: pair i turns e^(2.5 - i) times in that length.
  scaling = YarnScaling(
    factor=5.0,
    original_length=2 * math.pi * math.exp(2.5),
    attention_factor=yarn_attention_factor(5.0),
    beta_fast=math.exp(2.0),
    beta_slow=1.0,
    truncate=False,
  )
  # The ramp is from pair 0.5 to pair 2.5.
  found, length = _frequencies(math.exp(4), 4, scaling)
  kept = [1.0, 0.75, 0.25, 0.0]
  expected = [math.exp(-i) * (k + (1 - k) / 5) for i, k in enumerate(kept)]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  np.testing.assert_allclose(length, 0.1 * math.log(5) + 1, rtol=1e-6)


@pytest.mark.parametrize(
  "scaling", [None, LinearScaling(factor=4.0), LinearScaling(factor=1.0)]
)
def test_rotation_is_that_of_the_oracle(scaling):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((7, 3, 10)).astype(np.float32)
  positions = np.array([0, 1, 2, 5, 40, 900, 901])
  np.testing.assert_allclose(
    rotate(jnp.asarray(x), jnp.asarray(positions), 700.0, scaling),
    oracles.rotate(x.astype(np.float64), positions, 700.0, scaling),
    atol=3e-4,
  )


def test_no_stretching_needs_no_temperature():
  assert yarn_attention_factor(1.0) == yarn_attention_factor(0.5) == 1.0

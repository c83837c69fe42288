"""The mixture of experts against loops over tokens and experts in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny

from d2sd_jax.models import experts
from d2sd_jax.models.experts import mix_experts, route

pytestmark = pytest.mark.usefixtures("quick_compilation")

_CONFIG = tiny.GPT_OSS


def _layer(seed=0):
  return tiny.target(seed, _CONFIG).layers[1].experts


def _rows(count, scale=1.0):
  rng = np.random.default_rng(1)
  return (scale * rng.standard_normal((count, 24))).astype(np.float32)


def _expected(rows, seed=0):
  tensors = tiny.target_tensors(_CONFIG, seed)
  model = oracles.Transformer(tensors, _CONFIG, "model.")
  return model.experts("layers.1.mlp.", rows.astype(np.float64))


# 3 rows gather, 4 read all; 20 go through in slices of 10, 21 do not.
@pytest.mark.parametrize("count", [1, 3, 4, 20, 21])
@pytest.mark.parametrize("scale", [0.5, 8.0])
def test_outputs(count, scale, monkeypatch):
  monkeypatch.setattr(experts, "MAX_ROWS", 10)
  rows = _rows(count, scale)
  mix = jax.jit(mix_experts)
  got = mix(_layer(), rows)
  np.testing.assert_allclose(got, _expected(rows), rtol=1e-4, atol=1e-4)
  # The leading axes are the caller's.
  shaped = mix(_layer(), rows[None, :, None])
  np.testing.assert_allclose(shaped[0, :, 0], got, rtol=1e-4, atol=1e-4)


def test_which_path_is_taken(monkeypatch):
  taken = []
  for name in ("_mix_chosen", "_mix_all"):
    monkeypatch.setattr(
      experts, name, lambda e, x, axis, name=name: taken.append(name) or x
    )
  for count in (1, 3, 4):
    mix_experts(_layer(), _rows(count))
  assert taken == ["_mix_chosen", "_mix_chosen", "_mix_all"]


def test_limits_clamp_gate_from_above_and_up_from_both_sides():
  one = lambda *shape: jnp.ones(shape)
  layer = experts.Experts(
    router=one(1, 1),
    router_bias=one(1),
    gate_proj=one(1, 1, 1),
    gate_bias=jnp.zeros((1, 1)),
    up_proj=-one(1, 1, 1),
    up_bias=jnp.zeros((1, 1)),
    down_proj=one(1, 1, 1),
    down_bias=jnp.zeros((1, 1)),
    top_k=1,
    limit=7.0,
  )
  sigmoid = lambda x: 1 / (1 + np.exp(-1.702 * x))
  for x, gate, up in ((9.0, 7.0, -7.0), (-9.0, -9.0, 7.0), (2.0, 2.0, -2.0)):
    got = float(mix_experts(layer, jnp.full((1, 1), x))[0, 0])
    assert got == pytest.approx((up + 1) * gate * sigmoid(gate), rel=1e-5)


def test_shares_are_a_softmax_over_the_chosen_alone():
  layer = dataclasses.replace(
    _layer(),
    router=jnp.zeros((24, 19)),
    router_bias=jnp.zeros(19).at[jnp.array([4, 17])].set(jnp.array([1.0, 3.0])),
  )
  chosen, shares = route(layer, _rows(2))
  assert chosen.tolist() == [[17, 4]] * 2
  expected = [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))]
  np.testing.assert_allclose(shares, [expected] * 2, rtol=1e-6)
  assert shares.dtype == jnp.float32


def test_bfloat16_stays_bfloat16():
  layer = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _layer())
  for count in (1, 9):
    got = jax.jit(mix_experts)(layer, jnp.asarray(_rows(count), jnp.bfloat16))
    assert got.dtype == jnp.bfloat16

"""Matrices in int8: rounding, products, and drafting with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from d2sd_jax import Models
from d2sd_jax.kernels.dot import matmul
from d2sd_jax.kernels.quantized import QuantizedMatrix, quantize

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _oracle(matrix, summed):
  """Values and scales in float64."""
  scales = np.abs(matrix).max(summed) / 127
  scales[scales == 0] = 1
  wide = np.expand_dims(scales, summed)
  return np.clip(np.rint(matrix / wide), -127, 127), scales


@pytest.mark.parametrize("summed", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rounding_against_an_oracle(summed, dtype):
  rng = np.random.default_rng(summed)
  drawn = rng.standard_normal((37, 23)) * np.exp(rng.standard_normal((37, 23)))
  drawn[5], drawn[:, 7] = 0, 0
  matrix = jnp.asarray(drawn, dtype)
  exact = np.asarray(matrix, np.float64)
  got = quantize(matrix, summed=summed)
  values, scales = _oracle(exact, summed)
  assert got.values.dtype == jnp.int8
  assert got.scales.dtype == jnp.float32
  np.testing.assert_allclose(got.scales, scales, rtol=1e-6)
  # A weight halfway between two steps may go either way.
  assert np.abs(got.values - values).max() <= 1
  assert (got.values == values).mean() > 0.99
  wide = np.expand_dims(scales, summed)
  error = np.abs(np.asarray(got.values) * wide - exact)
  assert (error <= wide * (0.5 + 1e-4)).all()
  assert np.abs(got.values).max(summed)[scales != 1].min() == 127


def test_rounding_by_hand():
  got = quantize(jnp.array([[127.0, 0.0], [-63.4, 0.0], [0.6, 0]]), summed=0)
  assert got.values.tolist() == [[127, 0], [-63, 0], [1, 0]]
  assert got.scales.tolist() == [1, 1]


@pytest.mark.parametrize(
  ("spec", "summed"), [("...d,do->...o", 0), ("...d,vd->...v", 1)]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_against_an_oracle(spec, summed, dtype):
  rng = np.random.default_rng(3)
  x = jnp.asarray(rng.standard_normal((2, 5, 48)), dtype)
  matrix = rng.standard_normal((48, 31) if summed == 0 else (31, 48))
  held = quantize(jnp.asarray(matrix, dtype), summed=summed)
  got = jax.jit(matmul, static_argnums=(0, 3))(spec, x, held, jnp.float32)
  weights = np.asarray(held.values, np.float64) * np.expand_dims(
    np.asarray(held.scales, np.float64), summed
  )
  expected = np.einsum(spec, np.asarray(x, np.float64), weights)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, expected, atol=2e-5)
  assert matmul(spec, x, held).dtype == dtype
  # Rounding itself: each weight by half a step at most, signs at random.
  exact = np.einsum(spec, np.asarray(x, np.float64), matrix)
  spread = np.sqrt(48 / 12) * np.asarray(held.scales).max()
  assert 0.01 * spread < np.abs(expected - exact).max() < 6 * spread


def test_a_drafter_is_quantised_and_the_given_one_left_alone():
  drafter = tiny.drafter(tiny.VP, 3).fuse()
  before = jax.tree.map(np.asarray, drafter)
  small = drafter.quantize()
  same = jax.tree.map(np.array_equal, before, drafter)
  assert all(jax.tree.leaves(same))
  kinds = [x.dtype.name for x in jax.tree.leaves(small)]
  # `fc`, the context's projection and four matrices of the one layer.
  assert kinds.count("int8") == 6
  assert isinstance(small.fc, QuantizedMatrix)
  assert isinstance(small.layers[0].down_proj, QuantizedMatrix)
  assert small.dtype == drafter.dtype == jnp.float32
  rng = np.random.default_rng(0)
  c = tiny.VP
  features = rng.standard_normal((2, 7, 2, c.hidden_size)).astype(np.float32)
  positions = np.broadcast_to(np.arange(7), (2, 7))
  blocks = rng.standard_normal((2, 3, 5, c.hidden_size)).astype(np.float32)
  slots = np.broadcast_to(7 + np.arange(5), (2, 3, 5))

  @jax.jit
  def run(drafter):
    context = drafter.context_kv(features, positions)
    return drafter(blocks, slots, context, jnp.array([7, 4]))

  exact, got = run(drafter), run(small)
  error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.05


def test_the_head_is_quantised_for_drafts_only():
  target = tiny.target(0)
  models = Models(target=target).with_int8_drafting()
  assert models.target is target
  hidden = np.random.default_rng(1).standard_normal((4, 3, 24))
  hidden = jnp.asarray(hidden, jnp.float32)
  exact = np.asarray(Models(target=target).draft_logits(hidden))
  np.testing.assert_array_equal(exact, target.head(hidden))
  got = np.asarray(models.draft_logits(hidden))
  error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.02
  assert got.dtype == np.float32


def test_a_target_of_your_own_drafts_through_its_own_head():
  class Other:
    def head(self, hidden):
      return 2 * hidden

  models = Models(target=Other()).with_int8_drafting()
  assert models.draft_head is None
  assert models.draft_logits(jnp.ones((1, 2))).tolist() == [[2, 2]]

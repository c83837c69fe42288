"""Eq. 3-5: confidence, posterior and the chosen prefixes."""

import jax.numpy as jnp
import numpy as np
import oracles
from hypothesis import given, settings
from hypothesis import strategies as st

from d2sd_jax import boundary_posterior, select_prefixes, token_confidence

_ROWS = st.lists(
  st.lists(st.floats(0.0, 1.0, width=32), min_size=7, max_size=7),
  min_size=3,
  max_size=3,
)


def test_confidence_is_the_argmaxs_probability_at_temperature_one():
  logits = jnp.log(jnp.array([[0.2, 0.7, 0.1], [0.5, 0.25, 0.25]])) + 40.0
  np.testing.assert_allclose(token_confidence(logits), [0.7, 0.5], rtol=1e-5)


def test_confidence_is_float32_and_finite_for_huge_logits():
  logits = jnp.array([[3e4, -3e4], [-3e4, -3e4]], jnp.bfloat16)
  confidence = token_confidence(logits)
  assert confidence.dtype == jnp.float32
  np.testing.assert_allclose(confidence, [1.0, 0.5])


def test_confidence_of_bfloat16_logits_is_summed_in_float32():
  # 300 equal logits: a bfloat16 sum would stop at 256.
  confidence = token_confidence(jnp.zeros((300,), jnp.bfloat16))
  np.testing.assert_allclose(confidence, 1 / 300, rtol=1e-5)


def test_posterior_by_hand():
  posterior = boundary_posterior(jnp.array([0.5, 0.8, 0.25, 1.0]))
  np.testing.assert_allclose(posterior, [0.5, 0.1, 0.3, 0.0], atol=1e-7)


def test_posterior_is_computed_in_float32():
  exact = boundary_posterior(jnp.array([0.99609375, 0.98828125]))
  half = boundary_posterior(jnp.array([0.99609375, 0.98828125], jnp.bfloat16))
  assert half.dtype == jnp.float32
  np.testing.assert_array_equal(exact, half)


@settings(deadline=None, max_examples=40)
@given(_ROWS)
def test_posterior_matches_the_definition_and_sums_to_one(rows):
  posterior = np.asarray(boundary_posterior(jnp.array(rows, jnp.float32)))
  for got, row in zip(posterior, rows, strict=True):
    np.testing.assert_allclose(
      got, oracles.boundary_posterior(row), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(got.sum() + np.prod(row), 1.0, atol=1e-5)


def test_ties_go_to_the_smaller_prefix():
  posterior = jnp.array([[0.1, 0.3, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])
  assert select_prefixes(posterior, 3).tolist() == [[1, 2, 3], [0, 1, 2]]


def test_no_branches():
  assert select_prefixes(jnp.ones((2, 4)), 0).shape == (2, 0)


@settings(deadline=None, max_examples=40)
@given(
  st.lists(
    st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5]), min_size=6, max_size=6),
    min_size=2,
    max_size=2,
  ),
  st.sampled_from([1, 3, 6]),
)
def test_selection_matches_the_definition(rows, num_branches):
  chosen = select_prefixes(jnp.array(rows, jnp.float32), num_branches)
  assert chosen.dtype == jnp.int32
  expected = [oracles.select_prefixes(row, num_branches) for row in rows]
  assert chosen.tolist() == expected

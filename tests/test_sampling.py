"""Noise that knows positions only, exact filters, exact distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2sd_jax import Sampling
from d2sd_jax.sampling import filter_logits, position_noise, sample

pytestmark = pytest.mark.usefixtures("quick_compilation")

_VOCAB = 37
_jit_noise = jax.jit(position_noise, static_argnames="width")
_jit_sample = jax.jit(sample)
_jit_filter = jax.jit(filter_logits)


def _noise(seed, ids, positions):
  return np.asarray(
    _jit_noise(jnp.uint32(seed), jnp.array(ids), jnp.array(positions), width=13)
  )


def test_noise_is_the_same_in_any_row_and_slot():
  alone = _noise(5, [7], [[3, 9]])[0]
  batch = _noise(5, [2, 4, 7], [[0, 1, 2], [3, 9, 4], [9, 8, 3]])
  np.testing.assert_array_equal(batch[2, 2], alone[0])
  np.testing.assert_array_equal(batch[2, 0], alone[1])


def test_noise_differs_by_seed_sequence_and_position():
  base = _noise(5, [7], [[3]])
  others = [
    _noise(6, [7], [[3]]),
    _noise(5, [8], [[3]]),
    _noise(5, [7], [[4]]),
    _noise(5, [3], [[7]]),
    _noise(7, [5], [[3]]),
  ]
  for other in others:
    assert not np.isclose(base, other).any()


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_noise_is_the_same_however_the_vocabulary_is_split(parts):
  seed, ids = jnp.uint32(3), jnp.array([5, 2**31 - 1])
  positions = jnp.array([[0, 7, 40_000], [1, 2, 3]])
  whole = _jit_noise(seed, ids, positions, width=4096)
  part = lambda _: position_noise(
    seed, ids, positions, 4096 // parts, axis="tensor"
  )
  split = jax.vmap(part, axis_name="tensor", out_axes=2)
  split = jax.jit(split)(jnp.arange(parts))
  np.testing.assert_array_equal(split.reshape(whole.shape), whole)


def test_every_seed_is_its_own():
  seeds = [0, 1, 2**31, 2**32 - 1]
  noise = [_noise(seed, [0], [[0]]).tobytes() for seed in seeds]
  assert len(set(noise)) == len(seeds)


def test_choice_is_the_same_in_any_row_and_slot():
  logits = jax.random.normal(jax.random.key(0), (2, 3, _VOCAB))
  sampling = Sampling.create(temperature=1.1, top_k=9, top_p=0.9, seed=3)
  positions = jnp.array([[4, 5, 6], [1, 2, 3]])
  chosen = _jit_sample(logits, positions, jnp.array([8, 2]), sampling)
  turned = _jit_sample(
    logits[::-1, ::-1], positions[::-1, ::-1], jnp.array([2, 8]), sampling
  )
  np.testing.assert_array_equal(chosen, turned[::-1, ::-1])


def test_temperature_zero_is_greedy_whatever_the_filters_and_the_seed():
  logits = jax.random.normal(jax.random.key(1), (2, 5, _VOCAB))
  positions = jnp.arange(10).reshape(2, 5)
  for seed in range(3):
    sampling = Sampling.create(top_k=3, top_p=0.2, seed=seed)
    chosen = _jit_sample(logits, positions, jnp.array([0, 1]), sampling)
    np.testing.assert_array_equal(chosen, logits.argmax(-1))
  assert chosen.dtype == jnp.int32


def test_top_1_is_greedy_at_any_temperature():
  logits = jax.random.normal(jax.random.key(1), (1, 50, _VOCAB))
  for changes in ({"top_k": 1}, {"top_p": 1e-6}):
    sampling = Sampling.create(temperature=3.0, **changes)
    chosen = _jit_sample(logits, jnp.arange(50)[None], jnp.array([0]), sampling)
    np.testing.assert_array_equal(chosen, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.7, 1.6])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (4, 0.8)])
def test_distribution_is_the_softmax(temperature, top_k, top_p):
  row = np.array([1.0, -0.5, 0.3, 2.0, 0.0], np.float32)
  draws = 40_000
  chosen = _jit_sample(
    jnp.broadcast_to(row, (2, draws // 2, 5)),
    jnp.arange(draws).reshape(2, -1),
    jnp.array([0, 1]),
    Sampling.create(temperature, top_k, top_p, seed=9),
  )
  logits = oracles.filter_logits(row / temperature, top_k, top_p)
  expected = np.exp(logits) / np.exp(logits).sum() * draws
  counts = np.bincount(np.ravel(chosen), minlength=5)
  assert not counts[expected == 0].any()
  seen = expected > 0
  chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
  assert chi_square < 23.5  # One in 10,000 with four degrees of freedom.


def _assert_filtered(rows, top_k, top_p):
  rows = np.asarray(rows, np.float32)
  got = _jit_filter(jnp.array(rows), jnp.int32(top_k), jnp.float32(top_p))
  expected = np.stack([oracles.filter_logits(r, top_k, top_p) for r in rows])
  np.testing.assert_array_equal(got, expected.astype(np.float32))


# Derandomised: sums in float32 and float64 may differ at the very edge.
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
  st.integers(0, 2**32 - 1),
  st.sampled_from([0, 1, 2, 7, _VOCAB - 1, _VOCAB, _VOCAB + 5, 10**6]),
  st.sampled_from([1e-6, 0.1234, 0.51, 0.9, 0.999, 1.0]),
)
def test_filters_match_sorting(seed, top_k, top_p):
  rng = np.random.default_rng(seed)
  _assert_filtered(3 * rng.standard_normal((3, _VOCAB)), top_k, top_p)


@pytest.mark.parametrize(
  ("top_k", "top_p", "kept"),
  [
    (0, 1.0, [0, 1, 2, 3, 4]),
    (1, 1.0, [1, 3]),  # equal at the edge: both stay
    (3, 1.0, [1, 3, 4]),
    (5, 1.0, [0, 1, 2, 3, 4]),
    (99, 1.0, [0, 1, 2, 3, 4]),
    (0, 0.5, [1, 3]),
    (0, 0.1, [1, 3]),
    (0, 0.85, [1, 3, 4]),
    (3, 0.85, [1, 3, 4]),
    (2, 0.9, [1, 3]),
    # Top-p of what top-k left: 0.4 of 0.8 is half of the mass.
    (2, 0.5, [1, 3]),
  ],
)
def test_filters_by_hand(top_k, top_p, kept):
  logits = jnp.log(jnp.array([0.03, 0.4, 0.02, 0.4, 0.15]))[None]
  got = _jit_filter(logits, jnp.int32(top_k), jnp.float32(top_p))[0]
  assert np.flatnonzero(np.isfinite(got)).tolist() == kept
  np.testing.assert_array_equal(got[np.array(kept)], logits[0, np.array(kept)])


def test_top_p_counts_only_what_top_k_left():
  # 0.3 / (0.3 + 0.25) = 0.545 reaches 0.5 alone; of the whole it would not.
  logits = jnp.log(jnp.array([[0.3, 0.25, 0.2, 0.15, 0.1]]))
  got = _jit_filter(logits, jnp.int32(2), jnp.float32(0.5))
  assert np.isfinite(got).tolist() == [[True, False, False, False, False]]


def test_temperature_comes_before_top_p():
  logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
  many = jnp.broadcast_to(logits, (1, 2000, 3))
  chosen = lambda temperature: set(
    np.ravel(
      _jit_sample(
        many,
        jnp.arange(2000)[None],
        jnp.array([0]),
        Sampling.create(temperature, top_p=0.75),
      )
    ).tolist()
  )
  assert chosen(1.0) == {0, 1}
  assert chosen(0.25) == {0}
  assert chosen(4.0) == {0, 1, 2}


def test_zeros_of_either_sign_are_equal():
  _assert_filtered([[0.0, -0.0, -1.0, -2.0]], 1, 1.0)


def test_no_setting_traces_again():
  traces = []

  @jax.jit
  def counted(logits, sampling):
    traces.append(1)
    ids = jnp.arange(2)
    return sample(logits, jnp.arange(6).reshape(2, 3), ids, sampling)

  logits = jnp.zeros((2, 3, _VOCAB))
  for settings_ in ((), (0.8,), (1.3, 5), (1.0, 0, 0.5, 2**32 - 1)):
    counted(logits, Sampling.create(*settings_))
  assert len(traces) == 1

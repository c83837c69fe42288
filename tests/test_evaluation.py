"""Measures of answers, against cases worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from d2sd_jax import Sampling
from d2sd_jax.evaluation import (
  acceptance_length,
  bootstrap_interval,
  choice_margin,
  cut_periodic_tail,
  cut_periodic_tails,
  first_difference,
  paired_interval,
)
from d2sd_jax.sampling import sampling_scores

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
  ("tokens", "kept"),
  [
    ([], 0),
    (list(range(40)), 40),
    # Period 1: of 25 equal tokens the last 24 repeat the one before.
    ([7, 8, *[9] * 25], 3),
    ([7, 8, *[9] * 24], 26),
    # Period 3: what is repeated stays, and 24 tokens go.
    ([5, *[1, 2, 3] * 9], 4),
    ([5, *[1, 2, 3] * 8, 1, 2], 27),
    # Period 13: 24 repeating tokens are not yet two periods, 26 are.
    ([50, *(list(range(13)) * 3)[: 13 + 24]], 38),
    ([50, *(list(range(13)) * 3)[: 13 + 26]], 14),
    # A tail that a last token breaks is none.
    ([*[9] * 40, 2], 41),
    # The longest tail wins: period 2 reaches further back than period 4.
    ([0, *[1, 2] * 20], 3),
  ],
)
def test_cut_periodic_tail(tokens, kept):
  assert cut_periodic_tail(tokens) == tokens[:kept]


_ROW = st.builds(
  lambda head, unit, times, tail: head + unit * times + tail,
  st.lists(st.integers(0, 2), max_size=9),
  st.lists(st.integers(0, 2), min_size=1, max_size=17),
  st.integers(0, 12),
  st.lists(st.integers(0, 2), max_size=2),
)


@given(st.lists(_ROW, min_size=1, max_size=5), st.integers(0, 2))
def test_cut_periodic_tails_of_a_ragged_batch(rows, padding):
  tokens = np.full((len(rows), max(map(len, rows)) + 3), padding, np.uint16)
  for padded, row in zip(tokens, rows, strict=True):
    padded[: len(row)] = row
  kept = cut_periodic_tails(tokens, np.array([len(row) for row in rows]))
  expected = [oracles.cut_periodic_tail(row) for row in rows]
  assert kept.tolist() == [len(row) for row in expected]
  assert [cut_periodic_tail(row) for row in rows] == expected


def test_acceptance_length_sums_over_the_set():
  rows = [
    {"tokens": list(range(7)), "accepted_per_cycle": [1, 3, 2]},
    {"tokens": list(range(5)), "accepted_per_cycle": [4]},
    {"tokens": [3], "accepted_per_cycle": []},
  ]
  assert acceptance_length(rows) == (6 + 4) / 4
  assert acceptance_length(rows, cut_tails=True) == (6 + 4) / 4
  assert math.isnan(acceptance_length(rows[2:]))


def test_acceptance_length_without_tails():
  # Tokens 0..3 are kept, 24 are dropped. The cycles begin at 1, 3, 5, 10, ...;
  # the second one commits token 3 and one token of the tail.
  row = {
    "tokens": [0, 1, 2, *[9] * 25],
    "accepted_per_cycle": [2, 2, 5, 5, 5, 5, 3],
  }
  assert sum(row["accepted_per_cycle"]) + 1 == len(row["tokens"])
  assert acceptance_length([row]) == 27 / 7
  assert acceptance_length([row], cut_tails=True) == (2 + 1) / 2


def test_bootstrap_interval():
  # All prompts alike: no doubt. And a single odd one out of many.
  assert bootstrap_interval([[[6, 3]] * 4]) == (2.0, 2.0)
  low, high = bootstrap_interval([[[2, 2]] * 49 + [[100, 50]]])
  assert low == 1.0
  assert 1.5 < high < 1.9
  assert bootstrap_interval([[[6, 2], [3, 3], [0, 0]]]) == (1.0, 3.0)
  # The mean over sets, each weighing the same.
  assert bootstrap_interval([[[6, 3]] * 4, [[9, 1]] * 2]) == (5.5, 5.5)
  assert math.isnan(bootstrap_interval([[[6, 3]], [[0, 0]]])[0])


def test_paired_interval():
  # Unlike prompts of equal cycles, a token a cycle better on each of them.
  counts, baseline = [[6, 2], [8, 4], [60, 2]], [[4, 2], [4, 4], [58, 2]]
  low, high = bootstrap_interval([counts])
  assert high - low > 20
  assert paired_interval(counts, baseline) == pytest.approx((1.0, 1.0))
  # The first prompt alone gives 3 - 2, the second 1.5 - 3.5, both 9/4 - 11/4.
  low, high = paired_interval([[6, 2], [3, 2]], [[4, 2], [7, 2]])
  assert (low, high) == (-2.0, 1.0)
  assert math.isnan(paired_interval([[6, 3]], [[0, 0]])[0])


@pytest.mark.parametrize(
  ("a", "b", "where"),
  [
    ([1, 2], [1, 2], None),
    ([1, 2], [1, 3], 1),
    ([1, 2], [1], 1),
    ([], [4], 0),
    ([], [], None),
  ],
)
def test_first_difference(a, b, where):
  assert first_difference(a, b) == where


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_choice_margin_is_that_of_the_scores(temperature):
  target, tokens = tiny.target(), [3, 14, 15, 9, 2]
  sampling = Sampling.create(temperature=temperature, top_k=9, seed=5)
  lengths, ids = jnp.asarray([len(tokens)]), jnp.asarray([6])
  prefill = jax.jit(lambda tokens: target.prefill(tokens, lengths, ()))
  logits = prefill(jnp.asarray([tokens])).logits[:, None]
  # The token to be chosen stands at the position after the last one.
  noisy = jax.jit(sampling_scores)(logits, lengths[:, None], ids, sampling)
  scores = np.sort(np.asarray(noisy if temperature else logits).ravel())
  margin = choice_margin(target, tokens, 6, sampling, pad_to=8)
  np.testing.assert_allclose(margin, scores[-1] - scores[-2], atol=1e-4)

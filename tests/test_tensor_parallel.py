"""A vocabulary over several devices: what they find is what one would.

`vmap` with a named axis plays the devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from d2sd_jax import Models, Sampling, token_confidence
from d2sd_jax.sampling import draft_samples, filter_logits, sample
from d2sd_jax.tensor_parallel import (
  bar_padding,
  best_token,
  largest_score,
  look_up,
  token_ids,
  two_best,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

_AXIS, _DEVICES = "tensor", 3
# 61 tokens on three devices: two are there to fill the last share up.
_VOCAB, _WIDTH = 61, 21


def _split(table, axis):
  """Shares of a vocabulary, first; filled up with zeros."""
  table = np.moveaxis(np.asarray(table), axis, 0)
  filled = np.concatenate(
    [table, np.zeros((_DEVICES * _WIDTH - _VOCAB, *table.shape[1:]))]
  )
  shares = filled.reshape(_DEVICES, _WIDTH, *table.shape[1:])
  return jnp.asarray(np.moveaxis(shares, 1, axis + 1), jnp.float32)


def _on_devices(function, *shares):
  """What each device gives; they must agree."""
  given = jax.jit(jax.vmap(function, axis_name=_AXIS))(*shares)
  for leaf in jax.tree.leaves(given):
    np.testing.assert_array_equal(leaf[0], leaf[1])
    np.testing.assert_array_equal(leaf[0], leaf[2])
  return jax.tree.map(lambda x: np.asarray(x[0]), given)


def _logits(seed=0, shape=(4, 5)):
  rng = np.random.default_rng(seed)
  # All below 0, the score of what only fills a share up.
  return (rng.standard_normal((*shape, _VOCAB)) - 9).astype(np.float32)


def _barred(logits):
  return bar_padding(logits, _VOCAB, _AXIS)


def test_the_best_token_and_the_first_of_equals():
  logits = _logits()
  logits[0, 0, [7, 30, 60]] = 5
  logits[0, 1, [44, 60]] = -1
  best = lambda x: best_token(_barred(x), _AXIS)
  got = _on_devices(best, _split(logits, 2))
  assert got.dtype == np.int32
  np.testing.assert_array_equal(got, logits.argmax(-1))
  assert got[0, :2].tolist() == [7, 44]


def test_scores_of_the_whole_vocabulary():
  logits = _logits(1)
  shares = _split(logits, 2)
  largest = _on_devices(lambda x: largest_score(_barred(x), _AXIS), shares)
  np.testing.assert_array_equal(largest, logits.max(-1))
  two = _on_devices(
    lambda x: two_best(_barred(x)[0, 0], _AXIS), _split(logits, 2)
  )
  np.testing.assert_array_equal(two, np.sort(logits[0, 0])[:-3:-1])
  sure = _on_devices(lambda x: token_confidence(_barred(x), _AXIS), shares)
  np.testing.assert_allclose(sure, token_confidence(logits), rtol=1e-6)


def test_ids_and_rows_of_a_table():
  ids = jax.vmap(lambda _: token_ids(_WIDTH, _AXIS), axis_name=_AXIS)(
    jnp.arange(_DEVICES)
  )
  assert ids.reshape(-1).tolist() == list(range(63))
  table = np.random.default_rng(2).standard_normal((_VOCAB, 8))
  tokens = jnp.asarray([[0, 20, 21], [41, 42, 60]])
  got = _on_devices(lambda x: look_up(x, tokens, _AXIS), _split(table, 0))
  np.testing.assert_array_equal(got, table.astype(np.float32)[tokens])


@pytest.mark.parametrize(
  "filters", [{}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 30, "top_p": 0.9}]
)
def test_the_same_token_is_sampled(filters):
  logits = _logits(3)
  positions = np.arange(20).reshape(4, 5)
  sampling = Sampling.create(0.9, seed=8, **filters)
  draw = functools.partial(
    sample,
    positions=positions,
    sequence_ids=np.arange(4) + 2,
    sampling=sampling,
  )
  got = _on_devices(lambda x: draw(_barred(x), axis=_AXIS), _split(logits, 2))
  expected = np.asarray(jax.jit(draw)(logits))
  np.testing.assert_array_equal(got, expected)
  # Noise matters, or nothing was shown.
  assert (expected != logits.argmax(-1)).mean() > 0.3


def test_what_filters_keep():
  logits = _logits(4, (6,))
  keep = lambda x, axis=None: filter_logits(
    x, jnp.int32(11), jnp.float32(0.8), axis
  )
  shares = jax.jit(
    jax.vmap(lambda x: keep(_barred(x), _AXIS), axis_name=_AXIS)
  )(_split(logits, 1))
  got = np.moveaxis(np.asarray(shares), 0, 1).reshape(6, -1)
  np.testing.assert_array_equal(got[:, :_VOCAB], jax.jit(keep)(logits))
  assert np.isneginf(got[:, _VOCAB:]).all()


def test_drafts_that_are_drawn():
  logits = _logits(5)
  key = jax.random.key_data(jax.random.key(3))
  draw = lambda x, axis=None: draft_samples(
    x, np.arange(20).reshape(4, 5), np.arange(4), key, 3, axis
  )
  got = _on_devices(lambda x: draw(_barred(x), _AXIS), _split(logits, 2))
  np.testing.assert_array_equal(got, jax.jit(draw)(logits))
  assert len({tuple(row) for row in got[0]}) == 3


@pytest.mark.parametrize("int8", [False, True])
def test_padding_is_never_drafted(int8):
  target = tiny.target()
  hidden = np.random.default_rng(6).standard_normal((2, 24))
  # Every real token scores below 0.
  head = -np.abs(np.asarray(target.lm_head))
  hidden = jnp.asarray(np.abs(hidden), jnp.float32)

  def draft(share):
    split = dataclasses.replace(target, lm_head=share, axis=_AXIS)
    models = Models(target=split)
    if int8:
      models = models.with_int8_drafting()
    return best_token(models.draft_logits(hidden), _AXIS)

  got = _on_devices(draft, _split(head, 0))
  assert (got < _VOCAB).all()

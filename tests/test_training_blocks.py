"""Blocks, weights and losses of training, and that they leak nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from d2sd_jax.decoding.policies import denoise
from d2sd_jax.decoding.state import Models
from d2sd_jax.errors import UsageError
from d2sd_jax.training import losses as losses_module
from d2sd_jax.training.blocks import (
  Conversations,
  is_anchor,
  make_blocks,
  pace_weights,
  sample_anchors,
  sample_prefix_lengths,
  slot_weights,
)
from d2sd_jax.training.losses import (
  Teacher,
  accepted_lengths,
  block_loss,
  default_loss_decay,
  token_losses,
)
from d2sd_jax.training.step import (
  block_hidden,
  failing_prefixes,
  target_features,
  teacher_of,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

_MASK = 99


def _conversations(tokens, prompt_lengths, lengths):
  ints = lambda x: jnp.asarray(x, jnp.int32)
  return Conversations(
    tokens=ints(tokens),
    prompt_lengths=ints(prompt_lengths),
    lengths=ints(lengths),
  )


def _two_rows():
  """Prompts of 2 and 3, answers up to 8 and 6; token = position + 10 row."""
  tokens = np.arange(9) + np.array([[10], [20]])
  return _conversations(tokens, [2, 3], [8, 6])


def _cut(anchors, prefix_lengths, valid=True, block_size=4):
  anchors = jnp.asarray(anchors, jnp.int32)
  return make_blocks(
    _two_rows(),
    anchors,
    jnp.broadcast_to(jnp.asarray(valid), anchors.shape),
    jnp.asarray(prefix_lengths, jnp.int32),
    block_size,
    _MASK,
  )


def test_blocks_by_hand():
  blocks = _cut([[2, 4, 6], [4, 3, 3]], [[0, 2, 1], [0, 1, 2]])
  assert blocks.inputs.tolist() == [
    [[12, _MASK, _MASK, _MASK], [14, 15, 16, _MASK], [16, 17, _MASK, _MASK]],
    [[24, _MASK, _MASK, _MASK], [23, 24, _MASK, _MASK], [23, 24, 25, _MASK]],
  ]
  # The label of a slot is the token at its own position, not the next one;
  # past the last position it is that of the last, which never counts.
  assert blocks.labels.tolist() == [
    [[12, 13, 14, 15], [14, 15, 16, 17], [16, 17, 18, 18]],
    [[24, 25, 26, 27], [23, 24, 25, 26], [23, 24, 25, 26]],
  ]
  assert blocks.positions[0].tolist() == [
    [2, 3, 4, 5],
    [4, 5, 6, 7],
    [6, 7, 8, 9],
  ]
  # Slot 0 and visible slots never count, nor what lies past 8 or 6 tokens.
  assert blocks.supervised.astype(int).tolist() == [
    [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]],
    [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
  ]


def test_an_invalid_anchor_counts_nothing():
  blocks = _cut([[2, 3], [3, 4]], 2 * [[0, 0]], [[True, False], [False, True]])
  assert blocks.supervised.any(-1).tolist() == [[True, False], [False, True]]
  weights = slot_weights(blocks, 3.0)
  assert weights[0, 1].tolist() == weights[1, 0].tolist() == [0] * 4


def test_anchors_stand_in_the_answer_and_have_a_successor():
  assert [np.flatnonzero(r).tolist() for r in is_anchor(_two_rows())] == [
    [2, 3, 4, 5, 6],
    [3, 4],
  ]


def test_sample_anchors_draws_distinct_ones_uniformly():
  draw = jax.vmap(lambda key: sample_anchors(key, _two_rows(), 4))
  anchors, valid = map(
    np.asarray, draw(jax.random.split(jax.random.key(3), 500))
  )
  assert valid[:, 0].all()
  assert valid[:, 1].sum(-1).tolist() == [2] * 500
  assert all(len(set(row)) == 4 for row in anchors.reshape(-1, 4))
  counts = np.bincount(anchors[:, 0].ravel(), minlength=9)
  assert counts[[0, 1, 7, 8]].tolist() == [0] * 4
  # 400 each; the standard deviation is 9.
  np.testing.assert_allclose(counts[2:7], 400, atol=45)
  assert set(anchors[:, 1][valid[:, 1]]) == {3, 4}


@pytest.mark.parametrize("min_length", [0, 1])
def test_prefix_lengths_decay_by_beta(min_length):
  draws = sample_prefix_lengths(
    jax.random.key(5), (40, 500), 6, 0.6, min_length=min_length
  )
  assert draws.dtype == jnp.int32
  expected = 0.6 ** np.arange(5) * (np.arange(5) >= min_length)
  got = np.bincount(np.ravel(draws), minlength=5) / draws.size
  assert np.flatnonzero(got).tolist() == list(range(min_length, 5))
  np.testing.assert_allclose(got, expected / expected.sum(), atol=0.015)


def test_slot_weights_by_hand():
  blocks = _cut([[2, 2], [3, 3]], [[0, 2], [0, 2]], block_size=5)
  e = np.exp(-1 / 3)
  expected = [
    [[0, 1, e, e**2, e**3], [0, 0, 0, 1, e]],
    [[0, 1, e, 0, 0], [0, 0, 0, 0, 0]],
  ]
  np.testing.assert_allclose(slot_weights(blocks, 3.0), expected, rtol=1e-6)


def test_pace_weights_by_hand():
  supervised = np.array([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
  probability = np.array([[0.2, 0.6, 1.0, 0.5]] * 3, np.float32)
  # q is 0.6, 0.8, 1, 0.75; the products of row 0 are 0.6, 0.48, 0.48.
  expected = [[1.56, 0.96, 0.48, 0], [0, 0, 1.75, 0.75], [0, 0, 0, 0]]
  got = pace_weights(jnp.asarray(supervised), jnp.asarray(probability))
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_default_loss_decay():
  assert [default_loss_decay(n) for n in (8, 10, 16)] == [4, 5, 7]
  assert default_loss_decay(13) == 6


@pytest.mark.parametrize("normalizer", ["batch", "example"])
def test_block_loss_is_the_weighted_mean(normalizer):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 2, 4, 7)).astype(np.float32)
  labels = rng.integers(0, 7, (3, 2, 4))
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(
    logits, labels
  )
  weights = rng.uniform(0.1, 1, (3, 2, 4)).astype(np.float32)
  weights[0] = 0  # A sequence without a block is no example.
  weights[1, 0] = 0
  total = np.exp(logits).sum(-1)
  chosen = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
  loss = np.log(total) - chosen
  ratio = lambda i: (loss[i] * weights[i]).sum() / weights[i].sum()
  expected = {
    "batch": (loss * weights).sum() / weights.sum(),
    "example": (ratio(1) + ratio(2)) / 2,
  }
  assert abs(expected["batch"] - expected["example"]) > 0.01
  got = block_loss(losses, weights, normalizer)
  np.testing.assert_allclose(got, expected[normalizer], rtol=1e-5)
  assert block_loss(losses, 0 * weights, normalizer) == 0


def test_an_unknown_normalizer_is_refused():
  zeros = jnp.zeros((1, 1, 2))
  with pytest.raises(UsageError, match="loss_normalizer='row'"):
    block_loss(zeros, zeros, "row")


@pytest.mark.parametrize("most", [5, 8, 100])
def test_token_losses_are_those_of_all_logits_at_once(monkeypatch, most):
  # 24 rows in parts of 5 (with filling), 8, and all of them.
  monkeypatch.setattr(losses_module, "MAX_ROWS", most)
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(3, 2, 4, 5)).astype(np.float32)
  table = rng.normal(size=(5, 7)).astype(np.float32)
  labels = rng.integers(0, 7, (3, 2, 4))
  weights = rng.normal(size=(3, 2, 4)).astype(np.float32)
  head = lambda rows: rows @ table

  def mine(hidden):
    loss, _, correct = token_losses(head, hidden, labels)
    return (loss * weights).sum(), (loss, correct)

  def plain(hidden):
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(
      head(hidden), labels
    )
    return (loss * weights).sum(), (loss, head(hidden).argmax(-1) == labels)

  got, slope = jax.jit(jax.grad(mine, has_aux=True))(hidden)[::-1]
  expected, expected_slope = jax.grad(plain, has_aux=True)(hidden)[::-1]
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
  np.testing.assert_array_equal(got[1], expected[1])
  assert 0 < got[1].sum() < labels.size
  np.testing.assert_allclose(slope, expected_slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most", [5, 100])
def test_distillation_is_the_divergence_from_the_teacher(monkeypatch, most):
  monkeypatch.setattr(losses_module, "MAX_ROWS", most)
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  hidden, taught, weights = draw(3, 4, 5), draw(3, 4, 6), draw(3, 4)
  table, other = draw(5, 7), draw(6, 7)
  labels = rng.integers(0, 7, (3, 4))
  head, teach = lambda rows: rows @ table, lambda rows: rows @ other

  def mine(hidden):
    loss, label_loss, _ = token_losses(
      head, hidden, labels, teacher=Teacher(teach, taught)
    )
    return (loss * weights).sum(), (loss, label_loss)

  def plain(hidden):
    q = jax.nn.log_softmax(head(hidden))
    p = jax.nn.log_softmax(teach(taught))
    loss = (jnp.exp(p) * (p - q)).sum(-1)
    picked = jnp.take_along_axis(q, labels[..., None], -1)[..., 0]
    return (loss * weights).sum(), (loss, -picked)

  slope, got = jax.jit(jax.grad(mine, has_aux=True))(hidden)
  expected_slope, expected = jax.grad(plain, has_aux=True)(hidden)
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(got[1], expected[1], rtol=1e-5)
  np.testing.assert_allclose(slope, expected_slope, rtol=1e-4, atol=1e-5)
  # Nothing is left to learn from a teacher that says the same.
  same = token_losses(head, hidden, labels, teacher=Teacher(head, hidden))
  np.testing.assert_allclose(same[0], 0, atol=1e-5)


def test_a_label_far_from_the_best_keeps_the_loss_finite():
  logits = jnp.array([[300.0, 0.0], [300.0, 0.0]])
  head = lambda rows: rows
  loss, _, correct = token_losses(head, logits, jnp.array([0, 1]))
  assert loss.tolist() == [0, 80]
  assert correct.tolist() == [True, False]


def test_accepted_lengths_by_hand():
  cases = [
    # correct, supervised, accepted
    ([1, 1, 0, 1], [1, 1, 1, 1], 2),
    ([1, 1, 1, 1], [1, 1, 1, 1], 4),
    ([0, 1, 1, 1], [1, 1, 1, 1], 0),
    ([0, 0, 1, 1], [0, 0, 1, 1], 2),  # visible slots are stepped over
    ([1, 1, 0, 1], [0, 0, 1, 1], 0),  # and are not counted
    ([1, 1, 1, 1], [0, 1, 1, 0], 2),  # the answer ends
    ([1, 1, 1, 1], [0, 0, 0, 0], 0),
  ]
  correct, supervised, accepted = zip(*cases, strict=True)
  got = accepted_lengths(jnp.array(correct, bool), jnp.array(supervised, bool))
  assert got.tolist() == list(accepted)


_TOKENS = np.random.default_rng(7).integers(0, 61, (2, 15))
_PROMPTS, _LENGTHS = [4, 3], [15, 13]
_ANCHORS = np.array([[5, 7, 10], [3, 6, 8]])
_ROLES = {
  "drafter 1": (tiny.DFLASH, np.zeros((2, 3), int)),
  "vp drafter": (tiny.VP, np.array([[2, 0, 3], [1, 3, 2]])),
}


@jax.jit
def _run(drafter, target, tokens, prefix_lengths):
  config = drafter.config
  batch = _conversations(tokens, _PROMPTS, _LENGTHS)
  blocks = make_blocks(
    batch,
    jnp.asarray(_ANCHORS),
    jnp.ones((2, 3), bool),
    prefix_lengths,
    config.block_size,
    config.mask_token_id,
  )
  features = target_features(target, batch, config)
  return target.head(block_hidden(drafter.fuse(), target, features, blocks))


def _logits(tokens, prefixes, config):
  drafter, target = tiny.drafter(config), tiny.target()
  return np.asarray(_run(drafter, target, tokens, prefixes))


@pytest.mark.parametrize("role", _ROLES)
def test_a_block_sees_its_visible_prefix_and_no_more(role):
  config, prefixes = _ROLES[role]
  before = _logits(_TOKENS, prefixes, config)
  assert before.shape == (2, 3, 4, 61)
  last_seen = _ANCHORS + prefixes
  for position in range(_TOKENS.shape[1]):
    tokens = _TOKENS.copy()
    tokens[:, position] = (tokens[:, position] + 5) % 61
    after = _logits(tokens, prefixes, config)
    changed = np.abs(after - before).max((2, 3))
    np.testing.assert_array_equal(changed > 1e-4, last_seen >= position)
    np.testing.assert_array_equal(changed == 0, last_seen < position)


@pytest.mark.parametrize("role", _ROLES)
def test_training_and_decoding_agree(role):
  config, prefixes = _ROLES[role]
  trained = _logits(_TOKENS, prefixes, config)
  # The other drafter is there too, so that taps must be told apart.
  models = Models(
    target=tiny.target(),
    drafters=(tiny.drafter(tiny.DFLASH), tiny.drafter(tiny.VP)),
  )
  index = 0 if config is tiny.DFLASH else 1
  rows, columns = np.indices(_ANCHORS.shape).reshape(2, -1)
  anchors, shown = _ANCHORS[rows, columns], prefixes[rows, columns]
  prompts = [
    _TOKENS[r, :a].tolist() for r, a in zip(rows, anchors, strict=True)
  ]
  state = tiny.start(models, prompts, pad_to=11)
  state = dataclasses.replace(state, lengths=jnp.asarray(anchors, jnp.int32))
  block = np.full((6, 1, config.block_size), config.mask_token_id)
  for i, (row, anchor, n) in enumerate(zip(rows, anchors, shown, strict=True)):
    block[i, 0, : n + 1] = _TOKENS[row, anchor : anchor + n + 1]
  draft = jax.jit(denoise, static_argnums=2)
  decoded = draft(models, state, index, jnp.asarray(block))[:, 0]
  np.testing.assert_allclose(
    trained[rows, columns], decoded, rtol=2e-4, atol=2e-4
  )


@pytest.mark.parametrize("role", _ROLES)
def test_the_teacher_speaks_of_each_slots_own_token(role):
  """At slot k it is the target behind the tokens up to a + k - 1."""
  config, prefix_lengths = _ROLES[role]
  target = tiny.target()
  batch = _conversations(_TOKENS, _PROMPTS, _LENGTHS)
  blocks = make_blocks(
    batch,
    jnp.asarray(_ANCHORS),
    jnp.ones((2, 3), bool),
    jnp.asarray(prefix_lengths),
    config.block_size,
    config.mask_token_id,
  )

  @jax.jit
  def taught(target, blocks):
    features = target_features(target, batch, config, distill=True)
    teacher = teacher_of(target, features, blocks)
    return teacher.head(teacher.hidden)

  logits = taught(target, blocks)
  assert logits.shape == (2, 3, config.block_size - 1, 61)
  for row, block, slot in ((0, 0, 1), (0, 2, 3), (1, 1, 4), (1, 0, 2)):
    position = int(_ANCHORS[row, block]) + slot
    before = jnp.asarray(_TOKENS[row : row + 1, :position], jnp.int32)
    prefill = jax.jit(type(target).prefill, static_argnums=3)
    expected = prefill(target, before, jnp.array([position]), ()).logits[0]
    np.testing.assert_allclose(
      logits[row, block, slot - 1], expected, rtol=1e-4, atol=1e-4
    )


def test_a_prefix_ends_where_drafter_1_first_fails():
  config, _ = _ROLES["drafter 1"]
  drafter, target = tiny.drafter(config), tiny.target()
  nothing = jnp.zeros(_ANCHORS.shape, jnp.int32)
  drafted = np.array(_run(drafter, target, _TOKENS, nothing).argmax(-1))
  # Of each row the last block, whose tokens no other block's draft reads:
  # right for two slots; right to the end of the answer.
  tokens = np.array(_TOKENS)
  tokens[0, 11:13] = drafted[0, 2, :2]
  tokens[0, 13] = (drafted[0, 2, 2] + 1) % 61
  tokens[1, 9:13] = drafted[1, 2, :4]
  batch = _conversations(tokens, _PROMPTS, _LENGTHS)
  blocks = make_blocks(
    batch,
    jnp.asarray(_ANCHORS),
    jnp.ones(_ANCHORS.shape, bool),
    nothing,
    config.block_size,
    config.mask_token_id,
  )

  @jax.jit
  def failing(drafter, target, blocks):
    features = target_features(target, batch, config)
    return failing_prefixes(drafter.fuse(), target, features, blocks)

  found = failing(drafter, target, blocks)
  assert found[:, 2].tolist() == [2, config.block_size - 1]
  # And all blocks, against the drafts themselves.
  drafted = np.array(_run(drafter, target, tokens, nothing).argmax(-1))
  for row, block in np.ndindex(2, 3):
    first = int(_ANCHORS[row, block]) + 1
    truth = tokens[
      row, first : min(first + config.block_size - 1, _LENGTHS[row])
    ]
    wrong = np.flatnonzero(drafted[row, block, : len(truth)] != truth)
    expected = wrong[0] if len(wrong) else config.block_size - 1
    assert found[row, block] == expected

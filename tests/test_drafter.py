"""The drafters: what a block sees, what it borrows, what its cache keeps.

Numbers in the names of tests are those of the mistakes that others made with
such drafters: a leaking context mask (1), a wrong mask id (3), a head or an
embedding that is not the target's (4), a cache that keeps what it must not
(5), positions that restart (6).
"""

import dataclasses

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny

from d2sd_jax import (
  POLICIES,
  DrafterConfig,
  Models,
  Sampling,
  TreeConfig,
  UsageError,
  decode_cycle,
)
from d2sd_jax.decoding.policies import denoise
from d2sd_jax.models.cache import KVCache, append
from d2sd_jax.models.drafter import fill_masked

pytestmark = pytest.mark.usefixtures("quick_compilation")
_BLOCK = 5
_LENGTH = 12
# Anchors of three blocks, in two rows; the last sees an empty context.
_ANCHORS = np.array([[7, 2, 0], [4, 10, 1]])
_VISIBLE = np.array([[1, 3, 2], [4, 1, 2]])
_TREE = TreeConfig(block_size=_BLOCK, num_branches=2)
_SAMPLING = Sampling.create()


def _logits(features, tokens, shift, block_shift=0):
  """Logits of blocks at `_ANCHORS` over one context, as training runs them."""
  logits = _block_logits(
    tiny.drafter(), tiny.target(), features, tokens, shift, block_shift
  )
  # Wait: the caller goes on to change its arrays, which may not be copied.
  return np.asarray(logits)


@jax.jit
def _block_logits(model, target, features, tokens, shift, block_shift):
  positions = jnp.arange(_LENGTH) + shift
  context = model.context_kv(
    features, jnp.broadcast_to(positions, features.shape[:2])
  )
  slots = jnp.arange(_BLOCK)
  at = jnp.asarray(_ANCHORS)[..., None] + slots
  blocks = tokens[jnp.arange(2)[:, None, None], at]
  blocks = fill_masked(blocks, _VISIBLE, model.config.mask_token_id)
  hidden = model(
    target.embed(blocks),
    at + shift + block_shift,
    context,
    jnp.asarray(_ANCHORS),
  )
  return target.head(hidden)


def _inputs():
  rng = np.random.default_rng(0)
  taps = len(tiny.DFLASH.target_layer_ids)
  shape = (2, _LENGTH, taps, tiny.TARGET.hidden_size)
  features = rng.standard_normal(shape).astype(np.float32)
  # None of them the mask id, so that changing one is changing it.
  return features, rng.integers(24, 60, (2, _LENGTH + _BLOCK))


def _moved(before, after):
  """Whether each block's logits changed, `[B, G]`; all or nothing."""
  change = np.abs(np.asarray(before) - np.asarray(after)).max((2, 3))
  assert ((change == 0) | (change > 1e-3)).all()
  return change > 0


def test_blocks_are_those_of_the_reference_over_three_acceptances(tmp_path):
  error = goldens.check_drafter(goldens.load("dflash_cycles"), tmp_path)
  print(f"largest error {error:.1e}")


@pytest.mark.parametrize("position", range(_LENGTH))
def test_1_a_block_sees_features_strictly_before_its_anchor(position):
  features, tokens = _inputs()
  before = _logits(features, tokens, 0)
  features[:, position] += 1.0
  moved = _moved(before, _logits(features, tokens, 0))
  np.testing.assert_array_equal(moved, position < _ANCHORS)


@pytest.mark.parametrize("position", range(_LENGTH + _BLOCK))
def test_1_a_block_sees_its_own_visible_tokens_only(position):
  # Blocks overlap: a token may be visible in one and hidden in another.
  features, tokens = _inputs()
  before = _logits(features, tokens, 0)
  tokens[:, position] -= 1
  moved = _moved(before, _logits(features, tokens, 0))
  slot = position - _ANCHORS
  np.testing.assert_array_equal(moved, (slot >= 0) & (slot < _VISIBLE))


def test_1_the_draft_of_the_loop_sees_strictly_before_the_anchor():
  models, state, _ = _decoding()
  blocks = jnp.full((3, 1, _BLOCK), 5)
  run = jax.jit(denoise, static_argnums=2)
  before = run(models, state, 0, blocks)
  row = jnp.arange(48)[:, None]
  for offset in (-1, 0, 1):
    at = (state.lengths + offset)[:, None, None, None] == row
    cache = jax.tree.map(
      lambda x, at=at: jnp.where(at, x + 1.0, x), state.drafter_caches[0]
    )
    changed = dataclasses.replace(
      state, drafter_caches=(cache, state.drafter_caches[1])
    )
    moved = _moved(before, run(models, changed, 0, blocks))
    assert moved.all() == moved.any() == (offset < 0)


def test_slots_attend_to_each_other_both_ways():
  features, tokens = _inputs()
  before = _logits(features, tokens, 0)
  # The last visible token of row 1, block 0: slot 3.
  tokens[1, 4 + 3] -= 1
  after = _logits(features, tokens, 0)
  assert (np.abs(before - after)[1, 0].max(-1) > 1e-3).all()


@pytest.mark.parametrize("config", [tiny.DFLASH, tiny.VP])
def test_forward_equals_the_oracle(config):
  model, rng = tiny.drafter(config, seed=4), np.random.default_rng(2)
  taps, width = len(config.target_layer_ids), config.hidden_size
  features = rng.standard_normal((2, 9, taps, width)).astype(np.float32)
  embeddings = rng.standard_normal((2, 1, 4, width)).astype(np.float32)
  lengths = np.array([9, 5])

  @jax.jit
  def forward(model, features, embeddings, lengths):
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    context = append(
      model.init_cache(2, 13),
      model.context_kv(features, positions),
      jnp.zeros((2,), jnp.int32),
    )
    at = lengths[:, None, None] + jnp.broadcast_to(jnp.arange(4), (2, 1, 4))
    return context, model(embeddings, at, context, lengths)

  context, hidden = forward(model, features, embeddings, lengths)
  tensors = tiny.drafter_tensors(model)
  for b, n in enumerate(lengths):
    expected = oracles.drafter_context(tensors, config, features[b])
    for layer, (keys, values) in enumerate(expected):
      got = context.layer(layer)
      close = lambda x, y: np.testing.assert_allclose(
        x.swapaxes(0, 1), y, rtol=1e-4, atol=1e-4
      )
      close(got[0][b, :, :9], keys)
      close(got[1][b, :, :9], values)
    np.testing.assert_allclose(
      hidden[b, 0],
      oracles.drafter_forward(
        tensors, config, features[b, :n], embeddings[b, 0]
      ),
      rtol=1e-4,
      atol=2e-4,
    )


def _decoding():
  """Both drafters behind three ragged prompts, the last row finished."""
  target = tiny.target()
  drafters = (tiny.drafter(tiny.DFLASH, 1), tiny.drafter(tiny.VP, 2))
  models = Models(target=target, drafters=drafters)
  prompts = [[24, 25, 26, 27, 28, 29, 30], [31, 32], [33, 34, 35, 36]]
  state = tiny.start(models, prompts, max_new=[20, 20, 0])
  return models, state, prompts


def _tree_tokens(models, state):
  tree = jax.jit(POLICIES["d2sd"].build, static_argnums=2)(models, state, _TREE)
  return np.asarray(tree.tokens), np.asarray(tree.parents)


def _with_target(models, **changes):
  target = dataclasses.replace(models.target, **changes)
  return dataclasses.replace(models, target=target)


@jax.jit
def _both_drafts(models, state):
  """Logits of drafter 1's block and of one block of drafter 2."""
  anchors = state.anchors[:, None, None]
  own = lambda i, visible: fill_masked(
    anchors + jnp.arange(_BLOCK),
    visible,
    models.drafters[i].config.mask_token_id,
  )
  return denoise(models, state, 0, own(0, 1)), denoise(
    models, state, 1, own(1, 3)
  )


def test_3_each_drafter_is_fed_the_mask_id_of_its_config():
  models, state, _ = _decoding()
  embedding = models.target.embedding
  state = dataclasses.replace(state, tokens=jnp.full_like(state.tokens, 40))
  tree = np.asarray(_tree_tokens(models, state)[0])
  feeds = {}
  for name, mask in (("first", 17), ("second", 23), ("pad", 0), ("eos", 2)):
    changed = _with_target(models, embedding=embedding.at[mask].multiply(-3.0))
    feeds[name] = _tree_tokens(changed, state)[0]
  trunk = slice(1, _BLOCK)
  # The trunk moves with the first drafter's mask id and with no other; the
  # rest of the tree with the second one's.
  assert (feeds["first"][:, trunk] != tree[:, trunk]).any()
  np.testing.assert_array_equal(feeds["second"][:, trunk], tree[:, trunk])
  assert (feeds["second"] != tree).any()
  np.testing.assert_array_equal(feeds["pad"], tree)
  np.testing.assert_array_equal(feeds["eos"], tree)


@pytest.mark.parametrize("mask_token_id", [-1, 61, 10**6])
def test_3_a_mask_id_outside_the_vocabulary_is_refused(mask_token_id):
  with pytest.raises(UsageError, match=f"mask_token_id={mask_token_id}"):
    dataclasses.replace(tiny.DFLASH, mask_token_id=mask_token_id)


def test_4_the_head_is_the_targets():
  models, state, _ = _decoding()
  order = np.random.default_rng(0).permutation(tiny.TARGET.vocab_size)
  before = _both_drafts(models, state)
  # Row v of the new head is row order[v] of the old one.
  changed = _with_target(models, lm_head=models.target.lm_head[order])
  after = _both_drafts(changed, state)
  for old, new in zip(before, after, strict=True):
    np.testing.assert_allclose(new, old[..., order], rtol=1e-5, atol=1e-5)


def test_4_the_embedding_is_the_targets():
  models, state, _ = _decoding()
  before = _both_drafts(models, state)
  used = np.asarray(state.anchors)
  # An anchor's embedding moves both drafts of the rows that have that anchor.
  embedding = models.target.embedding.at[used[0]].multiply(-2.0)
  after = _both_drafts(_with_target(models, embedding=embedding), state)
  for old, new in zip(before, after, strict=True):
    np.testing.assert_array_equal(_moved(old, new)[:, 0], used == used[0])


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size"])
def test_4_a_drafter_of_another_size_is_refused_by_name(field):
  other = dataclasses.replace(tiny.DFLASH, **{field: 62})
  with pytest.raises(UsageError, match=f"drafter {field}=62: expected the tar"):
    other.check_fits(tiny.TARGET)


def test_taps_that_do_not_fit_are_refused_by_name():
  tiny.DFLASH.check_fits(tiny.TARGET)
  deeper = dataclasses.replace(tiny.DFLASH, num_target_layers=5)
  with pytest.raises(UsageError, match="num_target_layers=5"):
    deeper.check_fits(tiny.TARGET)
  for ids in ((), (1, 1), (2, 1), (-1, 2), (1, 3)):
    with pytest.raises(UsageError, match="target_layer_ids"):
      dataclasses.replace(tiny.DFLASH, target_layer_ids=ids)


def _plant(models, state, wrong, wrong_second, sharpness):
  """Drafters that draft the target's own continuation but where `wrong`."""
  truth = _continuation(models, state)
  rows = truth.shape[0]
  directions = models.target.lm_head
  fill = lambda x: jnp.broadcast_to(jnp.asarray(x), (rows, truth.shape[1]))

  def plant(inner, wrong):
    return tiny.PlantedDrafter(
      inner=inner,
      tokens=truth,
      wrong=fill(wrong),
      sharpness=fill(sharpness),
      directions=directions,
    )

  drafters = tuple(
    plant(d, w)
    for d, w in zip(models.drafters, (wrong, wrong_second), strict=True)
  )
  return dataclasses.replace(models, drafters=drafters), truth


def _continuation(models, state):
  """Every row's greedy tokens, by one dense forward per token."""
  tensors = tiny.target_tensors(tiny.TARGET, 0)
  tokens = np.array(state.tokens)
  for row, n in zip(tokens, np.asarray(state.lengths), strict=True):
    for at in range(int(n), int(n) + 20):
      logits, _ = oracles.target_forward(tensors, tiny.TARGET, row[:at])
      row[at] = logits[-1].argmax()
  return jnp.asarray(tokens)


def test_5_caches_hold_the_committed_tokens_and_nothing_else():
  # Row 0's trunk fails at slot 2 and a branch wins; row 1 rejects at once.
  models, state, prompts = _decoding()
  wrong = np.zeros((3, 48), int)
  wrong_second = np.zeros((3, 48), int)
  lengths = np.asarray(state.lengths)
  wrong[0, lengths[0] + 2] = 1
  wrong[1, lengths[1] + 1], wrong_second[1, lengths[1] + 1] = 1, 2
  sharpness = np.full((3, 48), 4.0, np.float32)
  sharpness[0, lengths[0] + 2] = 0.3
  planted, truth = _plant(models, state, wrong, wrong_second, sharpness)
  cycle = jax.jit(decode_cycle, static_argnames=("policy", "config"))
  before = np.asarray(state.origins)
  committed = []
  for _ in range(3):
    state = cycle(
      planted, state, _SAMPLING, policy=POLICIES["d2sd"], config=_TREE
    )
    committed.append(np.asarray(state.accepted)[:, len(committed)].tolist())
    _assert_caches_are_fresh(models, state)
  assert committed == [[5, 1, 0], [5, 5, 0], [5, 5, 0]]
  assert 2 in np.asarray(state.origins)[0]
  assert not before.any()
  for b, prompt in enumerate(prompts[:2]):
    end = int(state.lengths[b]) + 1
    np.testing.assert_array_equal(
      state.tokens[b, len(prompt) : end], truth[b, len(prompt) : end]
    )
  # A finished row does not move at all.
  assert state.lengths[2] == lengths[2]


def _assert_caches_are_fresh(models, state):
  """All three caches equal those of one dense pass over rows [0, n)."""
  tensors = tiny.target_tensors(tiny.TARGET, 0)
  for b, n in enumerate(np.asarray(state.lengths)):
    tokens = np.asarray(state.tokens)[b, :n]
    _, hidden = oracles.target_forward(tensors, tiny.TARGET, tokens)
    for drafter, cache in zip(
      models.drafters, state.drafter_caches, strict=True
    ):
      own = hidden[list(drafter.config.target_layer_ids)].swapaxes(0, 1)
      expected = oracles.drafter_context(
        tiny.drafter_tensors(drafter), drafter.config, own
      )
      _assert_rows(cache, expected, b, n)
    _assert_rows(state.target_cache, _target_kv(tensors, tokens), b, n)


def _target_kv(tensors, tokens):
  """The target's keys and values of every layer, from a dense pass."""
  c = tiny.TARGET
  model = oracles.Transformer(tensors, c, "model.")
  _, hidden = oracles.target_forward(tensors, c, tokens)
  inputs = [model.weight("embed_tokens")[tokens], *hidden[:-1]]
  return [
    model.project_kv(
      i,
      oracles.rms_norm(
        x, model.weight(f"layers.{i}.input_layernorm"), c.rms_norm_eps
      ),
      np.arange(len(tokens)),
    )
    for i, x in enumerate(inputs)
  ]


def _assert_rows(cache: KVCache, expected, b, n):
  assert len(cache) == len(expected)
  for layer, pair in enumerate(expected):
    for got, rows in zip(cache.layer(layer), pair, strict=True):
      np.testing.assert_allclose(
        got[b, :, :n].swapaxes(0, 1), rows, rtol=2e-4, atol=2e-4
      )


def test_6_shifting_context_and_block_together_changes_nothing():
  features, tokens = _inputs()
  before = _logits(features, tokens, 0)
  for shift in (1, 40):
    np.testing.assert_allclose(
      before, _logits(features, tokens, shift), rtol=1e-3, atol=1e-3
    )


def test_6_shifting_the_block_alone_changes_blocks_with_a_context():
  features, tokens = _inputs()
  before = _logits(features, tokens, 0, 0)
  moved = np.abs(before - _logits(features, tokens, 0, 3)).max((2, 3)) > 1e-2
  np.testing.assert_array_equal(moved, _ANCHORS > 0)


def test_6_the_loop_gives_slots_their_absolute_positions():
  models, state, prompts = _decoding()
  tensors = tiny.target_tensors(tiny.TARGET, 0)
  logits = _both_drafts(models, state)
  for index, (drafter, visible) in enumerate(
    zip(models.drafters, (1, 3), strict=True)
  ):
    for b, prompt in enumerate(prompts):
      _, hidden = oracles.target_forward(tensors, tiny.TARGET, prompt)
      own = hidden[list(drafter.config.target_layer_ids)].swapaxes(0, 1)
      block = np.full(_BLOCK, drafter.config.mask_token_id)
      block[:visible] = int(state.anchors[b]) + np.arange(visible)
      block = np.minimum(block, tiny.TARGET.vocab_size - 1)
      embedded = tensors["model.embed_tokens.weight"][block]
      out = oracles.drafter_forward(
        tiny.drafter_tensors(drafter), drafter.config, own, embedded
      )
      np.testing.assert_allclose(
        logits[index][b, 0],
        out[1:] @ tensors["lm_head.weight"].T,
        rtol=1e-3,
        atol=2e-3,
      )


def test_fill_masked():
  tokens = jnp.array([[4, 5, 6], [7, 8, 9]])
  assert fill_masked(tokens, jnp.array([1, 3]), 0).tolist() == [
    [4, 0, 0],
    [7, 8, 9],
  ]


def test_block_size_and_role_are_checked():
  for changes in ({"block_size": 1}, {"training_mode": "draft"}):
    (field,) = changes
    with pytest.raises(UsageError, match=field):
      DrafterConfig(**{**dataclasses.asdict(tiny.DFLASH), **changes})

"""The trees of every mode, drawn by hand over a target that counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from counting import MASK, VOCAB, drafter_config, planted, successor

from d2sd_jax import POLICIES, KVCache, Models, Sampling, TreeConfig, generate
from d2sd_jax.sampling import draft_key, draft_samples, sample
from d2sd_jax.tree import FIRST_DRAFT, LOOKUP, RE_DRAFT, SAMPLE, THIRD_DRAFT

pytestmark = pytest.mark.usefixtures("quick_compilation")
_GREEDY = Sampling.create()


def _build(mode, models, state, config):
  build = jax.jit(POLICIES[mode].build, static_argnums=2)
  return jax.tree.map(np.asarray, build(models, state, config))


def _rows(tree):
  """The nodes in use of every row."""
  return [t[v].tolist() for t, v in zip(tree.tokens, tree.valid, strict=True)]


def test_prompt_lookup_copies_what_followed():
  models = Models(target=successor())
  prompts = [
    [7, 8, 9, 10, 30, 7, 8],  # 7 8 9 was seen: 10 30 7 followed.
    [5, 6, 7, 1, 5, 6, 7, 2, 5, 6],  # Twice: the latest counts.
    [4, 5, 6, 9, 5],  # 9 5 6 is new, 5 6 was seen.
    [1, 2, 3, 40, 2, 3, 50, 1, 2],  # 1 2 3 goes before a later 2 3.
    [8, 9, 8, 9, 8],  # 9 8 9: only two tokens have followed.
    [20],
    [6, 7, 20, 7],  # 8 is new, and so is 7 8.
  ]
  state = tiny.start(models, prompts, pad_to=10)
  # What lies past the anchor is garbage.
  tokens = state.tokens.at[5, 2:9].set(jnp.array([20, 21, 3, 20, 21, 4, 5]))
  state = dataclasses.replace(state, tokens=tokens)
  config = TreeConfig(block_size=4, num_branches=0)
  tree = _build("prompt_lookup", models, state, config)
  assert _rows(tree) == [
    [9, 10, 30, 7],
    [7, 2, 5, 6],
    [6, 9, 5, 6],
    [3, 40, 2, 3],
    [9, 8, 9],
    [21],
    [8],
  ]
  assert tree.parents[4].tolist() == [-1, 0, 1, -1]
  assert tree.depths[4].tolist() == [0, 1, 2, 0]
  assert set(tree.origins[0, 1:]) == {LOOKUP}


def test_prompt_lookup_finds_its_own_answer():
  # After 52 comes 0: from the 53rd token on all has been seen.
  models, prompts = Models(target=successor()), [[50], [3]]
  config = TreeConfig(block_size=5, num_branches=0)
  state = tiny.start(models, prompts, max_new=[80, 56], capacity=96)
  state = generate(
    models, state, _GREEDY, 10**6, mode="prompt_lookup", config=config
  )
  expected = [[(t[0] + 1 + i) % VOCAB for i in range(80)] for t in prompts]
  assert tiny.answers(state, prompts) == [expected[0], expected[1][:56]]
  # The prompt's token and the next must come round first; that leaves 26
  # tokens, and 2 of the shorter answer.
  counts = [row[row > 0].tolist() for row in np.asarray(state.accepted)]
  assert counts == [[1] * 53 + [5] * 5 + [1], [1] * 53 + [2]]
  assert state.num_verified.tolist() == [53 + 6 * 5, 53 + 5]
  assert set(np.asarray(state.origins[0])) == {0, LOOKUP}


def test_reuse_is_d2sd_with_drafter_1_twice():
  prompts = [[7, 8, 9], [20], [40, 41]]
  both = planted(prompts, wrong=[5, 6], second_wrong=[2])
  first = both.drafters[:1]
  config = TreeConfig(block_size=5, num_branches=3, second_block_size=6)
  build = lambda mode, drafters: _build(
    mode,
    dataclasses.replace(both, drafters=drafters),
    tiny.start(dataclasses.replace(both, drafters=drafters), prompts),
    config,
  )
  reused, dual = build("reuse", first), build("d2sd", first * 2)
  jax.tree.map(np.testing.assert_array_equal, reused, dual)
  assert set(reused.origins[0]) == {0, FIRST_DRAFT, RE_DRAFT}
  other = build("d2sd", both.drafters)
  assert (other.tokens != dual.tokens).any()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fading:
  """Counts on from what it sees, right for `reach` slots and unsure after."""

  reach: jax.Array
  config: object = dataclasses.field(
    metadata={"static": True}, default_factory=drafter_config
  )

  def init_cache(self, batch_size, capacity):
    del batch_size, capacity
    return KVCache(keys=(), values=())

  def context_kv(self, features, positions):
    del features, positions
    return KVCache(keys=(), values=())

  def __call__(self, embeddings, positions, context, context_end):
    del positions, context, context_end
    visible = (embeddings[..., MASK] == 0).sum(-1, keepdims=True)
    slots = jnp.arange(embeddings.shape[2])
    right = slots < visible + self.reach
    anchor = embeddings[:, :, 0].argmax(-1)[..., None]
    tokens = jnp.where(right, anchor + slots, 0) % VOCAB
    sharpness = jnp.where(right, 9.0, 4.0)
    return jax.nn.one_hot(tokens, VOCAB) * sharpness[..., None]


@pytest.mark.parametrize(
  ("mode", "levels"),
  [
    pytest.param("dflash", 1, marks=pytest.mark.slow),
    pytest.param("reuse", 2, marks=pytest.mark.slow),
    pytest.param("d2sd", 2, marks=pytest.mark.slow),
    ("d2sd_3", 3),
  ],
)
def test_every_level_goes_on_where_the_one_before_failed(mode, levels):
  count = POLICIES[mode].num_drafters
  models = Models(
    target=successor(), drafters=(_Fading(reach=jnp.int32(2)),) * count
  )
  prompts = [[5], [31, 32]]
  config = TreeConfig(block_size=9, num_branches=2)
  state = tiny.start(models, prompts, max_new=30)
  state = generate(models, state, _GREEDY, 1, mode=mode, config=config)
  assert state.accepted[:, 0].tolist() == [2 * levels + 1] * 2
  origins = [FIRST_DRAFT, RE_DRAFT, THIRD_DRAFT][:levels]
  drafted = np.repeat(origins, 2).tolist()
  assert state.origins[0, 2 : 2 + 2 * levels].tolist() == drafted


@pytest.mark.parametrize(
  "forbid", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_third_level(forbid):
  # Anchor 10 at index 3. The first draft errs at index 4, the second one at
  # index 6, where a third, of the same drafter, would err again.
  prompts = [[7, 8, 9], [20]]
  models = planted(prompts, wrong=[4], second_wrong=[6])
  config = TreeConfig(block_size=5, num_branches=1, forbid_repeat=forbid)
  state = tiny.start(models, prompts)
  tree = _build("d2sd_3", models, state, config)
  assert tree.tokens.shape[1] == 16  # 5 + 4 + 3, in whole tiles.
  third = [0 if forbid else 16, 14]
  assert _rows(tree)[0] == [10, 14, 12, 13, 14, 11, 12, 16, 14, *third]
  parents = [-1, 0, 1, 2, 3, 0, 5, 6, 7, 6, 9]
  assert tree.parents[0][tree.valid[0]].tolist() == parents
  origins = [0, *[FIRST_DRAFT] * 4, *[RE_DRAFT] * 4, *[THIRD_DRAFT] * 2]
  assert tree.origins[0][tree.valid[0]].tolist() == origins


def test_third_level_of_a_branch_that_has_no_place_left():
  # The only branch starts before the last slot.
  prompts = [[7, 8, 9], [20]]
  models = planted(prompts, wrong=[6], second_wrong=[6])
  config = TreeConfig(block_size=4, num_branches=1, forbid_repeat=True)
  tree = _build("d2sd_3", models, tiny.start(models, prompts), config)
  assert _rows(tree)[0] == [10, 11, 12, 16, 0]


def test_samples_of_a_sure_drafter_merge_into_its_trunk():
  prompts = [[7, 8, 9], [20], [3]]
  models = planted(prompts)
  models = dataclasses.replace(models, drafters=models.drafters[:1])
  sharpness = jnp.full_like(models.drafters[0].sharpness, 30.0)
  # Row 1 knows nothing of its last slot, row 2 nothing at all.
  sharpness = sharpness.at[1, 4].set(0).at[2].set(0)
  unsure = dataclasses.replace(models.drafters[0], sharpness=sharpness)
  models = dataclasses.replace(models, drafters=(unsure,))
  config = TreeConfig(block_size=4, num_branches=3)
  tree = _build("dflash_samples", models, tiny.start(models, prompts), config)
  assert tree.tokens.shape[1] == 16  # 1 + 3 * 4, in whole tiles.
  sure, last, nothing = _rows(tree)
  assert sure == [10, 11, 12, 13]
  assert last[:4] == [21, 22, 23, 0]
  assert len(set(last[4:])) == 3
  assert tree.parents[1, 4:7].tolist() == [2, 2, 2]
  assert tree.origins[1, :7].tolist() == [0, 1, 1, 1, *[SAMPLE] * 3]
  assert len(nothing) == 13


def test_samples_know_seed_and_sequence_and_no_batch():
  prompts = [[7, 8, 9], [20], [3]]
  models = planted(prompts[:1] * 3)
  models = dataclasses.replace(models, drafters=models.drafters[:1])
  flat = dataclasses.replace(
    models.drafters[0], sharpness=jnp.zeros_like(models.drafters[0].sharpness)
  )
  models = dataclasses.replace(models, drafters=(flat,))
  config = TreeConfig(block_size=4, num_branches=2)

  def tokens(prompts, ids, seed=1):
    state = tiny.start(
      models,
      prompts,
      sequence_ids=ids,
      sampling=Sampling.create(0.0, seed=seed),
    )
    return _build("dflash_samples", models, state, config).tokens[:, 4:]

  straight = tokens(prompts, [5, 6, 7])
  turned = tokens(prompts[::-1], [7, 6, 5])
  np.testing.assert_array_equal(straight, turned[::-1])
  assert (tokens(prompts, [5, 6, 8])[2] != straight[2]).any()
  assert (tokens(prompts, [5, 6, 7], seed=2) != straight).any(axis=1).all()


def test_samples_follow_the_marginals_and_not_the_targets_noise():
  logits = jnp.log(jnp.array([[[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]]))
  positions, ids = jnp.array([[4, 5]]), jnp.array([3])
  key = draft_key(jnp.uint32(7))
  draw = jax.jit(draft_samples, static_argnums=4)
  drawn = np.asarray(draw(logits, positions, ids, key, 4000))
  assert drawn.shape == (1, 4000, 2)
  for slot, expected in enumerate([(0.6, 0.3, 0.1), (0.2, 0.2, 0.6)]):
    share = np.bincount(drawn[0, :, slot], minlength=3) / 4000
    np.testing.assert_allclose(share, expected, atol=0.03)
  # On the same logits the target's own choices agree by chance alone.
  flat, positions = jnp.zeros((1, 200, 50)), jnp.arange(200)[None]
  draws = draw(flat, positions, ids, key, 1)[0, 0]
  chosen = jax.jit(sample)(flat, positions, ids, Sampling.create(1.0, seed=7))
  chosen = chosen[0]
  assert (draws == chosen).mean() < 0.1

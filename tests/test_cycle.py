"""One cycle and the loop around it, driven with a target that is not ours.

The target is a table: after token t comes t + 1. Every expectation below can
be counted on one's fingers.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from counting import BLOCK, MASK, VOCAB, drafter_config, planted, successor

from d2sd_jax import (
  POLICIES,
  KVCache,
  Models,
  Sampling,
  TreeConfig,
  TreePolicy,
  UsageError,
  decode_cycle,
  generate,
  stream,
)
from d2sd_jax.decoding.loop import check_mode
from d2sd_jax.tree import chain_tree

pytestmark = pytest.mark.usefixtures("quick_compilation")
_TREE = TreeConfig(block_size=BLOCK, num_branches=2)
_GREEDY = Sampling.create()
_FOREVER = jnp.int32(10**6)
_PROMPTS = [[7, 8, 9], [20], [40, 41]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
  """Stands where drafters stand: how many drafted tokens are right."""

  right: jax.Array
  config: object = dataclasses.field(metadata={"static": True})

  def init_cache(self, batch_size, capacity):
    del batch_size, capacity
    return KVCache(keys=(), values=())

  def context_kv(self, features, positions):
    del features, positions
    return KVCache(keys=(), values=())


def _draft(models, state, config):
  """A chain whose first `right` tokens the table agrees with."""
  slots = jnp.arange(config.block_size)
  right = slots <= models.drafters[0].right[:, None]
  tokens = (state.anchors[:, None] + slots) % VOCAB
  return chain_tree(jnp.where(right, tokens, (tokens + 9) % VOCAB))


_POLICY = TreePolicy(_draft, 1, lambda config: config.block_size)


def _models(right=(3, 1, 0)):
  plan = _Plan(right=jnp.asarray(right), config=drafter_config())
  return Models(target=successor(), drafters=(plan,))


def _cycle(models, state, sampling=_GREEDY):
  return _jit_cycle(models, state, sampling, policy=_POLICY, config=_TREE)


_jit_cycle = jax.jit(decode_cycle, static_argnames=("policy", "config"))


def test_one_cycle_commits_the_accepted_tokens_and_the_targets_own():
  state = tiny.start(_models(), _PROMPTS, max_new=[9, 9, 0])
  assert state.anchors.tolist() == [10, 21, 42]
  assert state.finished.tolist() == [False, False, True]
  state = _cycle(_models(), state)
  assert state.accepted[:, 0].tolist() == [4, 2, 0]
  assert state.lengths.tolist() == [7, 3, 2]
  assert state.anchors.tolist() == [14, 23, 42]
  assert tiny.answers(state, _PROMPTS) == [
    [10, 11, 12, 13, 14],
    [21, 22, 23],
    [42],
  ]
  # By origin: the prompt and the target's choices 0, the draft's 1.
  assert state.origins[0, :8].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
  assert state.origins[1, :4].tolist() == [0, 0, 1, 0]


def test_rows_end_each_in_its_own_cycle():
  models = _models(right=(3, 1, 0))
  state = tiny.start(models, _PROMPTS, max_new=[9, 9, 3])
  history = []
  while not bool(state.finished.all()):
    state = _cycle(models, state)
    history.append(state.accepted[:, len(history)].tolist())
  assert history == [[4, 2, 1], [4, 2, 1], [0, 2, 0], [0, 2, 0]]
  assert tiny.answers(state, _PROMPTS) == [
    list(range(10, 19)),
    list(range(21, 30)),
    [42, 43, 44],
  ]


@pytest.mark.parametrize("max_new", range(1, 12))
def test_the_limit_cuts_inside_a_path(max_new):
  models = _models(right=(3, 3, 3))
  state = tiny.start(models, _PROMPTS, max_new=[max_new, 11, 0])
  while not bool(state.finished.all()):
    state = _cycle(models, state)
  assert tiny.answers(state, _PROMPTS)[:2] == [
    list(range(10, 10 + max_new)),
    list(range(21, 32)),
  ]
  accepted = np.asarray(state.accepted).sum(1)
  assert accepted.tolist() == [max_new - 1, 10, 0]


@pytest.mark.parametrize("stop", range(10, 20))
def test_a_stop_id_ends_the_row_wherever_it_stands(stop):
  # 10: the first token. 14, 18: a cycle's last. Others: inside its path.
  models = _models(right=(3, 3, 3))
  state = tiny.start(models, _PROMPTS, max_new=[20, 11, 20], stops=(stop, 44))
  while not bool(state.finished.all()):
    state = _cycle(models, state)
  assert tiny.answers(state, _PROMPTS) == [
    list(range(10, stop + 1)),
    list(range(21, 32)),
    [42, 43, 44],
  ]
  cycles = np.asarray(state.accepted)[0]
  assert cycles[cycles > 0].tolist() == [
    *([4] * ((stop - 10) // 4)),
    *([(stop - 10) % 4] if (stop - 10) % 4 else []),
  ]


def test_a_stop_id_past_the_accepted_tokens_does_not_count():
  # The draft's second token is the stop id, but only the first is accepted.
  models = _models(right=(1, 1, 1))
  prompts = [[7, 8, 9], [33], [40, 41]]
  stop = 10 + 2 + 9
  state = tiny.start(models, prompts, max_new=[20, 9, 0], stops=(stop,))
  state = _cycle(models, state)
  assert state.finished.tolist() == [False, False, True]
  assert tiny.answers(state, prompts)[0] == [10, 11, 12]


def test_a_stop_id_in_the_prompt_does_not_count():
  state = tiny.start(_models(), _PROMPTS, max_new=9, stops=(8, 20, 40))
  assert not bool(state.finished.any())


def test_a_finished_row_goes_through_unchanged():
  # Row 0 ends at its limit, row 2 at a stop id with room left, row 3 fills.
  models = _models(right=(3, 3, 3, 3))
  prompts = [*_PROMPTS, [50]]
  state = tiny.start(models, prompts, max_new=[3, 20, 20, 0], stops=(43,))
  for _ in range(4):
    state = _cycle(models, state)
    assert state.finished.tolist() == [True, False, True, True]
    assert state.lengths.tolist()[::2] == [5, 3]
    assert state.lengths[3] == 1
    text = tiny.answers(state, prompts)
    assert (text[0], text[2], text[3]) == ([10, 11, 12], [42, 43], [51])
  assert np.asarray(state.accepted)[:, :4].tolist() == [
    [2, 0, 0, 0],
    [4, 4, 4, 4],
    [1, 0, 0, 0],
    [0, 0, 0, 0],
  ]


@pytest.mark.slow
def test_11_the_mask_id_is_a_token_like_any_other_in_the_output():
  prompts = [[27, 28], [MASK], [29, MASK]]
  for mode in POLICIES:
    models = planted(prompts)
    models = dataclasses.replace(
      models, drafters=models.drafters[: POLICIES[mode].num_drafters]
    )
    state = tiny.start(models, prompts, max_new=[6, 6, 2])
    state = generate(models, state, _GREEDY, _FOREVER, mode=mode, config=_TREE)
    assert tiny.answers(state, prompts) == [
      [29, 30, 31, 32, 33, 34],
      [31, 32, 33, 34, 35, 36],
      [31, 32],
    ]


def test_branches_win_where_the_trunk_fails():
  # Prompt 7 8 9, anchor 10 at index 3: the draft is wrong at index 5.
  models = planted(_PROMPTS, wrong=[5])
  state = tiny.start(models, _PROMPTS, max_new=[14, 14, 0])
  state = generate(
    models, state, _GREEDY, jnp.int32(1), mode="d2sd", config=_TREE
  )
  assert state.accepted[0, 0] == 4
  # 11 comes from the first draft, 12 and 13 from the second, 14 from neither.
  assert state.origins[0, 3:8].tolist() == [0, 1, 2, 2, 0]
  dflash = dataclasses.replace(models, drafters=models.drafters[:1])
  state = tiny.start(dflash, _PROMPTS, max_new=[14, 14, 0])
  state = generate(
    dflash, state, _GREEDY, jnp.int32(1), mode="dflash", config=_TREE
  )
  assert state.accepted[0, 0] == 2


@pytest.mark.parametrize("forbid", [False, True])
def test_forbid_repeat_bars_the_first_new_token_and_no_other(forbid):
  # Both drafters count on, the second one 12 12; prefix 1, then 0 look the
  # likeliest to fail.
  models = planted(_PROMPTS)
  first, second = models.drafters
  sharpness = first.sharpness.at[0, 4].set(5.0).at[0, 5].set(3.0)
  first = dataclasses.replace(first, sharpness=sharpness)
  second = dataclasses.replace(second, tokens=second.tokens.at[0, 6].set(12))
  models = dataclasses.replace(models, drafters=(first, second))
  state = tiny.start(models, _PROMPTS, max_new=[20, 20, 0])
  config = dataclasses.replace(_TREE, forbid_repeat=forbid)
  build = jax.jit(POLICIES["d2sd"].build, static_argnums=2)
  tokens = build(models, state, config).tokens[0].tolist()
  assert tokens[:4] == [10, 11, 12, 13]
  # A branch behind 10 11, then one behind 10.
  branches = [12, 12, 11, 12, 12]
  new = [i for i in range(5) if tokens[4 + i] != branches[i]]
  assert new == ([0, 2] if forbid else [])


def test_no_branches_is_the_first_draft_alone():
  config = dataclasses.replace(_TREE, num_branches=0)
  models = planted(_PROMPTS, wrong=[5])
  state = tiny.start(models, _PROMPTS, max_new=[14, 14, 0])
  state = generate(
    models, state, _GREEDY, jnp.int32(2), mode="d2sd", config=config
  )
  assert state.accepted[:, :2].tolist() == [[2, 4], [4, 4], [0, 0]]
  assert not (state.origins == 2).any()


def _runs():
  """Models, prompts, limits and sampling of many kinds, in one shape."""
  for seed, (wrong, second, temperature, filters) in enumerate(
    [
      ((), (), 0.0, (0, 1.0)),
      (range(48), range(48), 0.0, (0, 1.0)),
      (range(0, 48, 3), (), 0.7, (3, 0.9)),
      (range(48), (), 1.4, (0, 0.5)),
    ]
  ):
    prompts = [[3 + seed] * (seed + 1), [9], [5, 6] * (seed + 1)]
    models = planted(prompts, wrong, second)
    sampling = Sampling.create(temperature, *filters, seed)
    yield models, prompts, [20, 1 + seed, 0], sampling


def test_9_one_trace_serves_all_lengths():
  cycle = jax.jit(
    chex.assert_max_traces(
      lambda *args: decode_cycle(*args, policy=POLICIES["d2sd"], config=_TREE),
      n=1,
    )
  )
  seen = set()
  for models, prompts, max_new, sampling in _runs():
    state = tiny.start(models, prompts, max_new=max_new, sampling=sampling)
    for _ in range(6):
      state = cycle(models, state, sampling)
    seen |= set(np.unique(state.accepted))
  assert seen == {0, 1, 2, 3, 4}
  assert cycle._cache_size() == 1


def test_9_one_program_generates_streams_and_samples():
  before = generate._cache_size()
  for models, prompts, max_new, sampling in _runs():
    for cycles in (1, 3, 10**6):
      state = tiny.start(models, prompts, max_new=max_new, sampling=sampling)
      generate(
        models, state, sampling, jnp.int32(cycles), mode="d2sd", config=_TREE
      )
    state = tiny.start(models, prompts, max_new=max_new, sampling=sampling)
    list(stream(models, state, sampling, mode="d2sd", config=_TREE))
  assert generate._cache_size() - before <= 1


def test_10_nothing_in_the_loop_waits_for_the_host():
  (models, prompts, max_new, sampling), *_ = _runs()
  run = lambda state: generate(
    models, state, sampling, _FOREVER, mode="d2sd", config=_TREE
  )
  start = lambda: tiny.start(
    models, prompts, max_new=max_new, sampling=sampling
  )
  jax.block_until_ready(run(start()))
  state = start()
  with jax.transfer_guard("disallow"):
    state = run(state)
  assert bool(state.finished.all())
  text = str(jax.make_jaxpr(run)(start()))
  assert text.count("while[") >= 1
  for primitive in ("callback", "infeed", "outfeed", "debug_print"):
    assert primitive not in text


def test_the_state_is_donated():
  (models, prompts, max_new, sampling), *_ = _runs()
  state = tiny.start(models, prompts, max_new=max_new, sampling=sampling)
  generate(models, state, sampling, _FOREVER, mode="d2sd", config=_TREE)
  assert state.tokens.is_deleted()
  assert all(x.is_deleted() for x in jax.tree.leaves(state.drafter_caches))


@pytest.mark.parametrize(
  "mode",
  [
    mode
    if mode in ("ar", "prompt_lookup", "d2sd")
    else pytest.param(mode, marks=pytest.mark.slow)
    for mode in POLICIES
  ],
)
@pytest.mark.parametrize("step", [1, 4])
def test_streaming_gives_what_generating_gives(mode, step):
  for models, prompts, max_new, sampling in _runs():
    count = POLICIES[mode].num_drafters
    models = dataclasses.replace(models, drafters=models.drafters[:count])
    whole, state = (
      tiny.start(models, prompts, max_new=max_new, sampling=sampling)
      for _ in range(2)
    )
    whole = generate(models, whole, sampling, _FOREVER, mode=mode, config=_TREE)
    text = tiny.answers(state, prompts)
    states = stream(
      models, state, sampling, mode=mode, config=_TREE, cycles_per_step=step
    )
    for state in states:
      now = tiny.answers(state, prompts)
      assert [n[: len(t)] for n, t in zip(now, text, strict=True)] == text
      text = now
    assert text == tiny.answers(whole, prompts)
    assert state.num_cycles == whole.num_cycles
    np.testing.assert_array_equal(state.accepted, whole.accepted)
    np.testing.assert_array_equal(state.origins, whole.origins)


def test_generate_stops_after_max_cycles():
  models = planted(_PROMPTS)
  state = tiny.start(models, _PROMPTS, max_new=[20, 20, 0])
  for done in (2, 4):
    state = generate(
      models, state, _GREEDY, jnp.int32(2), mode="d2sd", config=_TREE
    )
    assert state.num_cycles == done
    assert state.lengths.tolist() == [3 + 4 * done, 1 + 4 * done, 2]


def test_all_rows_finished_from_the_start_run_no_cycle():
  models = Models(target=successor())
  state = tiny.start(models, _PROMPTS, max_new=[1, 0, 1])
  state = generate(models, state, _GREEDY, _FOREVER, mode="ar", config=_TREE)
  assert state.num_cycles == 0
  assert list(stream(models, state, _GREEDY, mode="ar", config=_TREE)) == []


def test_unknown_modes_and_missing_drafters_are_refused():
  models = planted(_PROMPTS)
  with pytest.raises(UsageError, match=r"mode='eagle'.*ar, prompt_lookup"):
    check_mode("eagle", models)
  for mode, needed in (("ar", 0), ("dflash", 1)):
    with pytest.raises(UsageError, match=f"drafters=2.*{needed} for mode"):
      check_mode(mode, models)

"""Speculative output is plain autoregressive output, token for token.

In true float32, under the same seed, in every mode, block, batch and filter.
Random drafters are almost never right, so drafts are planted too: the target's
own continuation, wrong where hypothesis says so, through the very loop that
serves real drafters. A difference is excused only as a tie: where the target's
two best scores, or a token and the edge of a filter, lie within 1e-3, or where
any token so far was one of two experts' within 1e-4 of its router's scores; and
ties only up to one in 10,000 tokens.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2sd_jax import (
  POLICIES,
  Models,
  Sampling,
  TargetConfig,
  TreeConfig,
  decode_cycle,
  generate,
)
from d2sd_jax.sampling import position_noise
from d2sd_jax.tree import FIRST_DRAFT, LOOKUP, RE_DRAFT, SAMPLE, THIRD_DRAFT

_VOCAB = tiny.TARGET.vocab_size
_NEW = 22
_CAPACITY = 48
_FOREVER = jnp.int32(10**6)
_MARGIN, _ROUTER_MARGIN = 1e-3, 1e-4
_FAMILIES = {"qwen3": tiny.TARGET, "gpt_oss": tiny.GPT_OSS}

# Few static shapes, so that hundreds of cases share a few programs.
_CONFIGS = {
  "smallest": TreeConfig(block_size=2, num_branches=1),
  "all branches": TreeConfig(block_size=4, num_branches=3),
  "no repeats": TreeConfig(block_size=6, num_branches=3, forbid_repeat=True),
  "longer second, budget": TreeConfig(
    block_size=5, num_branches=3, second_block_size=7, node_budget=17
  ),
}
_EXAMPLES = functools.partial(
  settings,
  deadline=None,
  derandomize=True,
  suppress_health_check=list(HealthCheck),
)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass(frozen=True)
class Case:
  """What hypothesis draws: three ragged prompts, at times one row filler."""

  prompts: list
  max_new: tuple
  sampling: Sampling
  target_seed: int
  stop_index: int | None
  draws: int
  target: TargetConfig = tiny.TARGET


@st.composite
def _cases(draw, target=tiny.TARGET):
  sizes = draw(st.permutations([1, 4, 9]))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  return Case(
    prompts=[rng.integers(0, _VOCAB, size).tolist() for size in sizes],
    max_new=draw(st.sampled_from([(22, 9, 22), (1, 22, 0), (22, 22, 22)])),
    sampling=Sampling.create(
      draw(st.sampled_from([0.0, 0.8, 0.8, 1.3])),
      *draw(
        st.sampled_from([(0, 1.0), (0, 1.0), (7, 1.0), (0, 0.9), (5, 0.8)])
      ),
      draw(st.sampled_from([0, 1, 12345, 2**32 - 1])),
    ),
    target_seed=draw(st.integers(0, 3)),
    stop_index=draw(st.sampled_from([None, None, 0, 3, 7, 12])),
    draws=draw(st.integers(0, 2**32 - 1)),
    target=target,
  )


@functools.cache
def _models(config, target_seed, num_drafters, int8=False):
  drafters = (tiny.drafter(tiny.DFLASH, 1), tiny.drafter(tiny.VP, 2))
  models = Models(
    target=tiny.target(target_seed, config), drafters=drafters[:num_drafters]
  )
  return models.with_int8_drafting() if int8 else models


def _start(models, case, stops=(-1,), max_new=None, **changes):
  return tiny.start(
    models,
    case.prompts,
    max_new=case.max_new if max_new is None else max_new,
    stops=stops,
    sampling=case.sampling,
    capacity=_CAPACITY,
    **changes,
  )


def _decode(models, case, mode, config, stops=(-1,), **changes):
  state = _start(models, case, stops, **changes)
  return generate(
    models, state, case.sampling, _FOREVER, mode=mode, config=config
  )


def _autoregressive(case, **changes):
  return _decode(
    _models(case.target, case.target_seed, 0),
    case,
    "ar",
    TreeConfig(),
    **changes,
  )


def _stops(case, tokens):
  """A stop id that row 0 will produce, or one that no row will."""
  return (-1 if case.stop_index is None else int(tokens[case.stop_index]),)


def _assert_same(case, config, expected, got, ties):
  """Equal tokens; a first difference must be a tie and is counted."""
  for row, (a, b) in enumerate(zip(expected, got, strict=True)):
    ties["tokens"] += len(a)
    if a != b:
      at = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None
      )
      assert at is not None, (case, config, row, a, b)
      margin = _margin(case, row, a[:at], a[at], b[at])
      assert margin < _MARGIN, (case, config, row, a, b, margin)
      ties["ties"] += 1
  # One in 10,000, and one more for as long as there are fewer tokens.
  assert ties["ties"] <= 1 + ties["tokens"] // 10_000


def _margin(case, row, before, mine, other):
  """How close the choice between two tokens was, in float64."""
  context = [*case.prompts[row], *before]
  tensors = tiny.target_tensors(case.target, case.target_seed)
  logits, _, router_margin = oracles.target_pass(tensors, case.target, context)
  if router_margin < _ROUTER_MARGIN:
    return 0.0
  logits, sampling = logits[-1], case.sampling
  if not sampling.temperature > 0:
    return abs(logits[mine] - logits[other])
  logits = logits / float(sampling.temperature)
  top_k, top_p = int(sampling.top_k), float(sampling.top_p)
  edges = []
  if top_k:
    edges += list(np.sort(logits)[::-1][[top_k - 1, top_k]])
  cut = oracles.filter_logits(logits, top_k, 1.0)
  mass = np.exp(cut - cut.max())
  mass = np.sort(mass / mass.sum())[::-1]
  at_edge = [abs(logits[t] - e) for t in (mine, other) for e in edges]
  if top_p < 1:
    at_edge.append(np.abs(np.cumsum(mass) - top_p).min())
  noise = position_noise(
    sampling.seed, jnp.array([row]), jnp.array([[len(context)]]), _VOCAB
  )[0, 0]
  scores = oracles.filter_logits(logits, top_k, top_p) + noise
  return min([abs(scores[mine] - scores[other]), *at_edge])


def _check_history(case, state, mode, config):
  """Identities between tokens, cycles and what each cycle committed."""
  accepted, lengths = np.asarray(state.accepted), np.asarray(state.lengths)
  cycles = int(state.num_cycles)
  assert bool(state.finished.all())
  assert not accepted[:, cycles:].any()
  most = POLICIES[mode].max_path(config)
  for row, prompt in zip(range(len(lengths)), case.prompts, strict=True):
    assert accepted[row].sum() == lengths[row] - len(prompt)
    own = int((accepted[row] > 0).sum())
    assert (accepted[row, :own] >= 1).all()
    assert (accepted[row, :own] <= most).all()
    assert not accepted[row, own:].any()
  return accepted[:, :cycles]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "family"),
  [
    ("all branches", "qwen3"),
    ("no repeats", "qwen3"),
    ("longer second, budget", "qwen3"),
    ("longer second, budget", "gpt_oss"),
  ],
)
def test_random_drafters(name, family):
  """Whatever the drafters say, the tokens are the target's."""
  config, ties = _CONFIGS[name], collections.Counter()

  @_EXAMPLES(max_examples=25)
  @given(_cases(_FAMILIES[family]))
  def check(case):
    stops = _stops(case, _everything(case)[0])
    expected = _autoregressive(case, stops=stops)
    answers = tiny.answers(expected, case.prompts)
    accepted = _check_history(case, expected, "ar", config)
    assert set(np.unique(accepted)) <= {0, 1}
    for mode, count, int8 in (
      *(("dflash", 1, False), ("d2sd", 2, False), ("d2sd", 2, True)),
    ):
      models = _models(case.target, case.target_seed, count, int8)
      state = _decode(models, case, mode, config, stops)
      _check_history(case, state, mode, config)
      got = tiny.answers(state, case.prompts)
      _assert_same(case, config, answers, got, ties)

  check()
  assert ties["tokens"] > 1000


def _everything(case):
  """Every row's full continuation, neither stopped nor limited."""
  state = _autoregressive(case, max_new=_NEW)
  return tiny.answers(state, case.prompts)


def _plant(case, tokens, rng, block_size):
  """Models whose drafts are `tokens`, wrong and unsure where `rng` says."""
  shape = (len(case.prompts), _CAPACITY)
  plan = np.zeros(shape, np.int32)
  for row, prompt, answer in zip(plan, case.prompts, tokens, strict=True):
    row[: len(prompt) + len(answer)] = prompt + answer
  # From nearly always right to nearly always wrong.
  rate = rng.choice([0.0, 1 / block_size, 0.4, 0.9], size=(len(plan), 1))
  wrong = rng.random(shape) < rate
  # The second drafter errs less often, as it should, and otherwise.
  again = (rng.random(shape) < rate / 2) * rng.integers(1, 4, shape)
  sharpness = rng.choice([0.05, 0.3, 0.6, 2.0], size=shape)
  if rng.random() < 0.5:
    sharpness = np.where(wrong, 0.1, sharpness)
  return _planted(case, plan, wrong, again, sharpness)


def _planted(case, plan, wrong, again, sharpness):
  models = _models(case.target, case.target_seed, 2)
  drafters = tuple(
    tiny.PlantedDrafter(
      inner=inner,
      tokens=jnp.asarray(plan, jnp.int32),
      wrong=jnp.asarray(errors, jnp.int32),
      sharpness=jnp.asarray(sharpness, jnp.float32),
      directions=models.target.lm_head,
    )
    for inner, errors in zip(models.drafters, (wrong, again), strict=True)
  )
  # Some of them through a head in int8.
  head = (
    models.with_int8_drafting().draft_head if case.target_seed % 2 else None
  )
  return dataclasses.replace(models, drafters=drafters, draft_head=head)


@functools.partial(jax.jit, static_argnames="config")
def _observe(models, state, sampling, config):
  """The same cycles one by one, with the tree each of them drafted."""
  policy = POLICIES["d2sd"]

  def cycle(state, _):
    tree = policy.build(models, state, config)
    after = decode_cycle(models, state, sampling, policy=policy, config=config)
    return after, (tree, state.lengths, state.finished)

  return jax.lax.scan(cycle, state, length=_NEW)


def _winner(tree, row, plan, start):
  """Deepest node on the target's own path, lowest first; and its branch."""
  tokens, parents = tree.tokens[row], tree.parents[row]
  deepest = [0]
  for node in np.flatnonzero(tree.valid[row]):
    path = oracles.node_path(parents, node)
    own = tokens[path].tolist() == plan[row, start:][: len(path)].tolist()
    if own and len(path) > len(deepest):
      deepest = path
  return deepest


def _record(seen, case, config, plan, limits, stops, observed):
  """Checks every cycle against brute force, and notes what occurred."""
  state, (trees, starts, finished) = jax.tree.map(np.asarray, observed)
  block = config.block_size
  for step, row in np.ndindex(*finished.shape):
    if finished[step, row]:
      assert state.accepted[row, step] == 0
      continue
    tree = jax.tree.map(lambda x, step=step: x[step], trees)
    start = starts[step, row]
    path = _winner(tree, row, plan, start)
    committed = plan[row, start + 1 : start + 1 + len(path)].tolist()
    count = len(path)
    stopped = [i for i, t in enumerate(committed) if t in stops]
    if stopped:
      count = stopped[0] + 1
    last = len(case.prompts[row]) + limits[row] - 1
    cut = start + count > last
    count = min(count, last - start)
    assert state.accepted[row, step] == count
    # Notes: a length counts only where nothing but the draft ended it.
    if not stopped and not cut:
      seen["accepted", len(path)] += 1
      branches = [
        n for n in range(block, path[-1] + 1) if tree.parents[row, n] < block
      ]
      seen["winner", len(branches) if path[-1] >= block else 0] += 1
    if stopped and stopped[0] < len(path) - 1:
      seen["stop inside"] += 1
    if cut:
      seen["limit inside"] += 1
    seen["equal siblings"] += _first_match(tree, row, plan, start) < len(path)


def _first_match(tree, row, plan, start):
  """Nodes of the path that the first matching child of each node gives."""
  node, depth = 0, 0
  while True:
    children = np.flatnonzero(tree.parents[row] == node)
    matching = tree.tokens[row, children] == plan[row, start + depth + 1]
    if not matching.any():
      return depth + 1
    node, depth = children[matching][0], depth + 1


@pytest.mark.parametrize(
  ("name", "family"),
  [
    ("all branches", "qwen3"),
    *(
      pytest.param(name, "qwen3", marks=pytest.mark.slow)
      for name in _CONFIGS
      if name != "all branches"
    ),
    pytest.param("longer second, budget", "gpt_oss", marks=pytest.mark.slow),
  ],
)
def test_planted_drafts(name, family):
  """Drafts that are right in part: every way a cycle can end, and tokens."""
  config = _CONFIGS[name]
  seen, ties = collections.Counter(), collections.Counter()

  def check(case, models, tokens, plan):
    stops = _stops(case, tokens[0])
    expected = []
    for answer, most in zip(tokens, case.max_new, strict=True):
      kept = answer[:most]
      end = next((i for i, t in enumerate(kept) if t in stops), len(kept))
      expected.append(kept[: end + 1])
    # A row of no new tokens still holds its first anchor.
    one = lambda rows: [r or a[:1] for r, a in zip(rows, tokens, strict=True)]
    for mode, count in (("dflash", 1), ("d2sd", 2)):
      fewer = dataclasses.replace(models, drafters=models.drafters[:count])
      state = _decode(fewer, case, mode, config, stops)
      accepted = _check_history(case, state, mode, config)
      for length in np.unique(accepted):
        seen[mode, int(length)] += 1
      got = tiny.answers(state, case.prompts)
      _assert_same(case, config, one(expected), one(got), ties)
    observed = _observe(
      models, _start(models, case, stops), case.sampling, config
    )
    assert tiny.answers(observed[0], case.prompts) == got
    _record(seen, case, config, plan, case.max_new, stops, observed)

  def planned(case):
    tokens = _everything(case)
    rng = np.random.default_rng(case.draws)
    models = _plant(case, tokens, rng, config.block_size)
    check(case, models, tokens, np.asarray(models.drafters[0].tokens))

  target = _FAMILIES[family]
  _EXAMPLES(max_examples=25)(given(_cases(target))(planned))()
  # What must occur does so below, whatever hypothesis drew.
  for case, models, tokens, plan in _sweep(config, target):
    check(case, models, tokens, plan)

  deepest = config.branch_size
  for length in range(1, config.block_size + 1):
    assert seen["dflash", length], length
  for length in range(1, deepest + 1):
    assert seen["accepted", length], (length, seen)
  for winner in range(config.num_branches + 1):
    assert seen["winner", winner], (winner, seen)
  assert seen["stop inside"]
  assert seen["limit inside"]
  # Where a branch starts at every slot, the first match ends no earlier.
  if config.num_branches < config.block_size - 1 and not config.forbid_repeat:
    assert seen["equal siblings"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fading(tiny.PlantedDrafter):
  """Errs, and doubts, from the second slot behind what it sees."""

  mask: jax.Array

  def __call__(self, embeddings, positions, context, context_end):
    visible = (embeddings != self.mask).any(-1).sum(-1, keepdims=True)
    late = jnp.arange(embeddings.shape[2]) > visible
    rows = jnp.arange(len(positions))[:, None, None]
    tokens = self.tokens[rows, positions] + late
    unit = self.directions[tokens % self.directions.shape[0]]
    return unit * jnp.where(late, 0.3, 2.0)[..., None]


def _fading(models):
  """Each draft is right for one slot: only a third one gets to the third."""
  fields = [f.name for f in dataclasses.fields(tiny.PlantedDrafter)]
  drafters = tuple(
    _Fading(
      **{field: getattr(drafter, field) for field in fields},
      mask=models.target.embed(drafter.config.mask_token_id),
    )
    for drafter in models.drafters
  )
  return dataclasses.replace(models, drafters=drafters)


_OTHERS = {
  "prompt_lookup": (LOOKUP,),
  "dflash_samples": (FIRST_DRAFT, SAMPLE),
  "reuse": (FIRST_DRAFT, RE_DRAFT),
  "d2sd_3": (FIRST_DRAFT, RE_DRAFT, THIRD_DRAFT),
}


@pytest.mark.parametrize(
  ("mode", "name"),
  [
    pytest.param(
      "prompt_lookup", "longer second, budget", marks=pytest.mark.slow
    ),
    ("dflash_samples", "longer second, budget"),
    pytest.param("reuse", "no repeats", marks=pytest.mark.slow),
    pytest.param("d2sd_3", "no repeats", marks=pytest.mark.slow),
    pytest.param("d2sd_3", "longer second, budget", marks=pytest.mark.slow),
  ],
)
def test_other_modes(mode, name):
  """Every mode of the ladder, on drafts that are right in part."""
  config, ties = _CONFIGS[name], collections.Counter()
  lengths, origins = set(), set()

  def check(case, models):
    tokens = _everything(case)
    stops = _stops(case, tokens[0])
    expected = _autoregressive(case, stops=stops)
    count = POLICIES[mode].num_drafters
    models = dataclasses.replace(models, drafters=models.drafters[:count])
    state = _decode(models, case, mode, config, stops)
    lengths.update(np.unique(_check_history(case, state, mode, config)))
    got = tiny.answers(state, case.prompts)
    _assert_same(case, config, tiny.answers(expected, case.prompts), got, ties)
    for row, answer, prompt in zip(
      np.asarray(state.origins), got, case.prompts, strict=True
    ):
      origins.update(row[len(prompt) : len(prompt) + len(answer)])

  def drawn(case):
    rng = np.random.default_rng(case.draws)
    check(case, _plant(case, _everything(case), rng, config.block_size))

  _EXAMPLES(max_examples=6)(given(_cases())(drawn))()
  for case, models, *_ in _sweep(config):
    check(case, models)
    if mode == "d2sd_3":
      check(case, _fading(models))
  # The budget leaves no room for a third level.
  wanted = set(_OTHERS[mode]) - ({THIRD_DRAFT} if config.node_budget else set())
  assert wanted <= origins, origins
  assert lengths >= {1, 2, 3, config.block_size} or mode == "prompt_lookup"


def _sweep(config, target=tiny.TARGET):
  """Plans that force each length, each winning branch and a stop inside."""
  block, branches = config.block_size, config.num_branches
  prompts = [[7, 8, 9, 10], [5], [1, 2]]
  for seed, stop_index in ((0, None), (1, block - 1)):
    case = Case(
      prompts=prompts,
      max_new=(_NEW, _NEW, _NEW - 1),
      sampling=Sampling.create(0.8, seed=seed),
      target_seed=seed,
      stop_index=stop_index,
      draws=0,
      target=target,
    )
    tokens = _everything(case)
    plan = np.zeros((3, _CAPACITY), np.int32)
    for row, prompt, answer in zip(plan, prompts, tokens, strict=True):
      row[: len(prompt) + len(answer)] = prompt + answer
    never = np.zeros_like(plan)
    sure = np.full(plan.shape, 3.0)
    # Both wrong after 1, 2, .. γ tokens; row 2 is right throughout.
    gaps = np.zeros_like(plan)
    for row, prompt in enumerate(prompts[:2]):
      ends = len(prompt) + np.cumsum(np.arange(1 + row, block + 1))
      gaps[row, ends[ends < _CAPACITY]] = 1
    yield case, _planted(case, plan, gaps, 2 * gaps, sure), tokens, plan
    # The second drafter right to its last slot.
    every = never + 1
    yield case, _planted(case, plan, every, never, sure), tokens, plan
    # Slot 1 + j is wrong and the j earlier slots look less sure: branch j of
    # the list starts there and wins.
    for rank in range(branches):
      wrong, doubt = never.copy(), sure.copy()
      for row, prompt in enumerate(prompts):
        at = len(prompt)
        wrong[row, at + 1 + rank] = 1
        doubt[row, at + 1 : at + 2 + rank] = 0.45
      yield case, _planted(case, plan, wrong, never, doubt), tokens, plan
    # The last slot is wrong but looks sure: every branch starts earlier and
    # begins with the trunk's own, right, token.
    wrong, doubt = never.copy(), sure.copy()
    for row, prompt in enumerate(prompts):
      wrong[row, len(prompt) + block - 1] = 1
      doubt[row, len(prompt) + 1 : len(prompt) + block - 1] = 0.45
    yield case, _planted(case, plan, wrong, never, doubt), tokens, plan


@pytest.mark.slow
def test_a_row_does_not_know_its_batch():
  """Any order, any company, any batch size: the prompt's index decides."""
  config = _CONFIGS["all branches"]
  case = Case(
    prompts=[[3, 1, 4], [1, 5, 9, 2, 6], [5]],
    max_new=(_NEW,) * 3,
    sampling=Sampling.create(1.1, top_k=20, seed=4),
    target_seed=2,
    stop_index=None,
    draws=0,
  )
  models = _models(tiny.TARGET, 2, 2)
  run = lambda case, ids: tiny.answers(
    _decode(models, case, "d2sd", config, sequence_ids=ids), case.prompts
  )
  together = run(case, [10, 11, 12])
  turned = dataclasses.replace(case, prompts=case.prompts[::-1])
  assert run(turned, [12, 11, 10]) == together[::-1]
  alone = dataclasses.replace(case, prompts=case.prompts[1:2], max_new=(_NEW,))
  assert run(alone, [11]) == together[1:2]
  # And the index does decide.
  assert run(alone, [10]) != together[1:2]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_autoregressive_tokens_are_those_of_a_dense_forward(temperature):
  """The yardstick itself, against one dense forward per token."""
  case = Case(
    prompts=[[3, 1, 4, 1], [5, 9], [2]],
    max_new=(9, 6, 1),
    sampling=Sampling.create(temperature, seed=6),
    target_seed=1,
    stop_index=None,
    draws=0,
  )
  got = tiny.answers(_autoregressive(case), case.prompts)
  tensors = tiny.target_tensors(tiny.TARGET, 1)
  for row, (prompt, most) in enumerate(
    zip(case.prompts, case.max_new, strict=True)
  ):
    tokens = list(prompt)
    for _ in range(most):
      logits, _ = oracles.target_forward(tensors, tiny.TARGET, tokens)
      scores = logits[-1]
      if temperature:
        noise = position_noise(
          case.sampling.seed,
          jnp.array([row]),
          jnp.array([[len(tokens)]]),
          _VOCAB,
        )
        scores = scores / temperature + np.asarray(noise)[0, 0]
      tokens.append(int(scores.argmax()))
    assert got[row] == tokens[len(prompt) :]

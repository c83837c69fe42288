"""Every family, against recorded outputs of an independent implementation.

How the recordings were made: `data/record_tiny.py`, `data/record_smollm2.py`.
"""

import dataclasses
import functools
from pathlib import Path

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny

from d2sd_jax import (
  Models,
  Sampling,
  TreeConfig,
  UsageError,
  build_prefix_tree,
  generate,
  load_target,
)
from d2sd_jax.config import default_target_layer_ids
from d2sd_jax.io.hf_tensors import target_from_tensors
from d2sd_jax.kernels.cascade_attention import xla
from d2sd_jax.models import experts
from d2sd_jax.models.cache import append
from d2sd_jax.models.rope import LinearScaling

pytestmark = pytest.mark.usefixtures("quick_compilation")

_DATA = Path(__file__).parent / "data"
_TINY = pytest.mark.parametrize(
  "name", ["tiny_qwen3", "tiny_llama", "tiny_llama3", "tiny_gpt_oss"]
)
# The two that differ most.
_TWO_TINY = pytest.mark.parametrize(
  "name",
  [
    "tiny_qwen3",
    pytest.param("tiny_llama", marks=pytest.mark.slow),
    pytest.param("tiny_llama3", marks=pytest.mark.slow),
    "tiny_gpt_oss",
  ],
)
_CYCLES = jnp.int32(10**6)


@functools.cache
def _golden(name):
  return goldens.load(name)


def _prefill(target, tokens, lengths, taps):
  run = jax.jit(type(target).prefill, static_argnums=3)
  return run(target, jnp.asarray(tokens), jnp.asarray(lengths), taps)


def _score(target, tree, cache, lengths, taps):
  run = jax.jit(type(target).score_tree, static_argnums=4)
  return run(target, tree, cache, lengths, taps)


@_TINY
def test_prefill_gives_the_recorded_logits_and_layer_outputs(name):
  logits, features = goldens.check_target(_golden(name))
  print(f"{name}: logits {logits:.1e}, features {features:.1e}")


@_TWO_TINY
def test_taps_are_the_layers_asked_for_in_their_order(name):
  golden = _golden(name)
  config, tensors = goldens.target(golden)
  target = target_from_tensors(config, tensors, jnp.float32)
  output = _prefill(target, golden["ids"], golden["lengths"], (1, 3))
  for slot, layer in enumerate((1, 3)):
    np.testing.assert_allclose(
      output.features[0, :, slot],
      golden["hidden"][layer, 0],
      rtol=1e-4,
      atol=2e-4,
    )


@_TWO_TINY
def test_trees_over_recorded_text_have_the_recorded_logits(name):
  print(f"{name}: {goldens.check_tree(_golden(name)):.1e}")


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("tiny_qwen3", marks=pytest.mark.slow),
    pytest.param("tiny_llama", marks=pytest.mark.slow),
    pytest.param("tiny_llama3", marks=pytest.mark.slow),
    "tiny_gpt_oss",
  ],
)
def test_greedy_continuation_is_the_recorded_one(name):
  goldens.check_greedy(_golden(name))


def _tree():
  """Two rows of 2 branches, one with unused nodes."""
  build = jax.jit(build_prefix_tree, static_argnums=3)
  tree = build(
    jnp.array([[5, 6, 7, 8], [9, 10, 11, 12]]),
    jnp.array(
      [
        [[5, 20, 21, 22], [5, 6, 23, 24]],
        [[9, 10, 11, 25], [9, 10, 26, 27]],
      ]
    ),
    jnp.array([[0, 1], [2, 1]]),
    9,
  )
  assert tree.valid.sum(axis=1).tolist() == [9, 7]
  return tree


_LINEAR = LinearScaling(factor=3.0)


@pytest.mark.parametrize(
  "config",
  [
    tiny.TARGET,
    dataclasses.replace(tiny.TARGET, tied_head=True),
    dataclasses.replace(tiny.TARGET, qk_norm=False, rope_scaling=_LINEAR),
    tiny.GPT_OSS,
    # As many experts as a few rows choose: all are looked at in every pass.
    pytest.param(
      dataclasses.replace(tiny.GPT_OSS, num_experts=3, windows=(1, 4, 7)),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      dataclasses.replace(tiny.GPT_OSS, num_experts=47, windows=(5, 6, None)),
      marks=pytest.mark.slow,
    ),
  ],
  ids=["qwen3", "tied", "linear", "gpt_oss", "3 experts", "47 experts"],
)
def test_score_tree_equals_one_causal_forward_per_branch(config):
  tensors = tiny.target_tensors(config, 3)
  target = tiny.target(3, config)
  prompts = np.array([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]])
  lengths = jnp.array([5, 2])
  output = _prefill(target, prompts, lengths, (0, 2))
  zero = jnp.zeros((2,), jnp.int32)
  cache = append(target.init_cache(2, 8), output.kv, zero)
  tree = _tree()
  before = [np.array(x) for x in jax.tree.leaves(cache)]
  scores = _score(target, tree, cache, lengths, (0, 2))
  for b in range(2):
    used = int(tree.valid[b].sum())
    context = prompts[b, : lengths[b]].tolist()
    tokens = np.asarray(tree.tokens[b])
    parents = np.asarray(tree.parents[b])
    np.testing.assert_allclose(
      scores.logits[b, :used],
      oracles.branch_logits(
        tensors, config, context, tokens[:used], parents[:used]
      ),
      rtol=1e-4,
      atol=2e-4,
    )
    path = oracles.node_path(parents, used - 1)
    _, hidden = oracles.target_forward(
      tensors, config, [*context, *tokens[path]]
    )
    np.testing.assert_allclose(
      scores.features[b, jnp.array(path)],
      hidden[[0, 2], len(context) :].swapaxes(0, 1),
      rtol=1e-4,
      atol=2e-4,
    )
  # The cache it read is as it was, and garbage past the length is not read.
  for x, old in zip(jax.tree.leaves(cache), before, strict=True):
    np.testing.assert_array_equal(x, old)
  row = jnp.arange(8)[:, None]
  past = row >= lengths[:, None, None, None]
  poisoned = jax.tree.map(lambda x: jnp.where(past, 1e30, x), cache)
  again = _score(target, tree, poisoned, lengths, (0, 2))
  np.testing.assert_array_equal(scores.logits, again.logits)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(again))


def test_each_node_sees_the_window_of_its_own_position():
  """Not the root's: the published reference has one window for all nodes."""
  window, length = 3, 5
  config = dataclasses.replace(
    tiny.GPT_OSS, num_layers=1, windows=(window,), num_experts=0, sinks=False
  )
  target, tree = tiny.target(0, config), _tree()
  lengths = jnp.array([length, length - 1])
  ids = jnp.arange(10).reshape(2, 5)
  kv = _prefill(target, ids, lengths, ()).kv
  cache = append(target.init_cache(2, 8), kv, jnp.zeros((2,), jnp.int32))
  before = _score(target, tree, cache, lengths, ()).logits
  depths = np.asarray(tree.depths)
  for row in range(8):
    changed = jax.tree.map(lambda x, row=row: x.at[:, :, row].add(1.0), cache)
    after = _score(target, tree, changed, lengths, ()).logits
    moved = np.abs(after - before).max(-1) > 1e-3
    position = np.asarray(lengths)[:, None] + depths
    sees = (row < np.asarray(lengths)[:, None]) & (position - row < window)
    valid = np.asarray(tree.valid)
    np.testing.assert_array_equal(moved & valid, sees & valid)
  for node in range(1, tree.tokens.shape[1]):
    tokens = tree.tokens.at[:, node].add(1)
    changed = dataclasses.replace(tree, tokens=tokens)
    after = _score(target, changed, cache, lengths, ()).logits
    moved = np.abs(after - before).max(-1) > 1e-3
    for b in range(2):
      above = oracles.ancestors(np.asarray(tree.parents[b]))[:, node]
      near = depths[b] - depths[b, node] < window
      np.testing.assert_array_equal(moved[b], above & near)


@pytest.mark.parametrize("length", [2, 3, 4, 11])
def test_a_long_prompt_is_seen_through_its_windows(length):
  """Below, at and past the windows of 3 and 2; and in slices."""
  config = tiny.GPT_OSS
  tensors = tiny.target_tensors(config, 1)
  ids = np.random.default_rng(0).integers(61, size=(2, 11))
  lengths = np.array([length, 1])
  output = _prefill(tiny.target(1, config), ids, lengths, (0, 1, 2))
  for row, n in enumerate(lengths):
    logits, hidden = oracles.target_forward(tensors, config, ids[row, :n])
    np.testing.assert_allclose(output.logits[row], logits[-1], atol=2e-4)
    got = output.features[row, :n].swapaxes(0, 1)
    np.testing.assert_allclose(got, hidden, rtol=1e-4, atol=2e-4)


def test_long_prompts_go_through_attention_and_experts_in_slices(monkeypatch):
  ids = np.random.default_rng(0).integers(61, size=(1, 24))
  lengths, target = jnp.array([24]), tiny.target(1, tiny.GPT_OSS)
  run = lambda: jax.jit(lambda t: t.prefill(ids, lengths, (1,)))(target)
  whole = run()
  monkeypatch.setattr(xla, "MAX_NODES", 8)
  monkeypatch.setattr(experts, "MAX_ROWS", 12)
  parts = run()
  np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-4)
  np.testing.assert_allclose(parts.features, whole.features, atol=1e-4)


def test_prefill_does_not_depend_on_padding():
  target = tiny.target(1)
  lengths = jnp.array([4, 1])
  short = np.array([[1, 2, 3, 4], [5, 0, 0, 0]])
  long = np.array([[1, 2, 3, 4, 9, 9, 9], [5, 8, 7, 6, 5, 4, 3]])
  a = _prefill(target, short, lengths, (1,))
  b = _prefill(target, long, lengths, (1,))
  np.testing.assert_allclose(a.logits, b.logits, atol=1e-5)
  for row, n in enumerate([4, 1]):
    np.testing.assert_allclose(
      a.features[row, :n], b.features[row, :n], atol=1e-5
    )
    for x, y in zip(jax.tree.leaves(a.kv), jax.tree.leaves(b.kv), strict=True):
      np.testing.assert_allclose(x[row, :, :n], y[row, :, :n], atol=1e-5)


def test_embed_and_head_are_the_models_own():
  tied = dataclasses.replace(tiny.TARGET, tied_head=True)
  ids = jnp.array([[3, 60]])
  hidden = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24)))
  for config in (tiny.TARGET, tied):
    tensors = tiny.target_tensors(config, 0)
    target = tiny.target(0, config)
    table = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", table)
    np.testing.assert_array_equal(target.embed(ids), table[np.asarray(ids)])
    np.testing.assert_allclose(
      target.head(hidden), hidden @ head.T, rtol=1e-5, atol=1e-5
    )


def test_bfloat16_gives_float32_logits():
  tensors = tiny.target_tensors(tiny.TARGET, 0)
  target = target_from_tensors(tiny.TARGET, tensors, jnp.bfloat16)
  output = _prefill(target, np.array([[1, 2, 3]]), np.array([3]), (1,))
  assert output.logits.dtype == jnp.float32
  assert output.features.dtype == jnp.bfloat16
  assert target.init_cache(1, 2).keys[0].dtype == jnp.bfloat16
  exact, _ = oracles.target_forward(tensors, tiny.TARGET, [1, 2, 3])
  assert np.corrcoef(output.logits[0], exact[-1])[0, 1] > 0.99


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop("lm_head.weight"), "lm_head.weight: missing"),
    (lambda t: t.pop("model.norm.weight"), "model.norm.weight: missing"),
    (
      lambda t: t.pop("model.layers.2.self_attn.q_norm.weight"),
      "layers.2.self_attn.q_norm.weight: missing",
    ),
    (
      lambda t: t.update({"model.layers.9.mlp.up_proj.weight": np.zeros(3)}),
      "layers.9.mlp.up_proj.weight: not part",
    ),
    (
      lambda t: t.update({"model.norm.weight": np.zeros(25)}),
      r"model.norm.weight: shape \(25,\), expected \(24,\)",
    ),
    (
      # The transpose of the right shape.
      lambda t: t.update({"lm_head.weight": np.zeros((24, 61))}),
      r"lm_head.weight: shape \(24, 61\), expected \(61, 24\)",
    ),
  ],
)
def test_wrong_tensors_are_refused_by_name(change, message):
  tensors = tiny.target_tensors(tiny.TARGET, 0)
  change(tensors)
  with pytest.raises(UsageError, match=message):
    target_from_tensors(tiny.TARGET, tensors, jnp.float32)


def test_a_tied_target_has_no_head_of_its_own():
  tensors = tiny.target_tensors(tiny.TARGET, 0)
  tied = dataclasses.replace(tiny.TARGET, tied_head=True)
  with pytest.raises(UsageError, match=r"lm_head\.weight: other values"):
    target_from_tensors(tied, tensors, jnp.float32)
  # Some folders hold the embedding twice.
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  target = target_from_tensors(tied, tensors, jnp.float32)
  assert target.lm_head is None


@pytest.mark.parametrize(
  ("num_layers", "num_taps", "expected"),
  [
    (36, 5, (1, 9, 17, 25, 33)),
    (30, 5, (1, 8, 14, 20, 27)),
    (30, 1, (15,)),
    (7, 2, (1, 4)),
  ],
)
def test_default_taps(num_layers, num_taps, expected):
  assert default_target_layer_ids(num_layers, num_taps) == expected


@pytest.mark.slow
def test_smollm2_is_the_recorded_model(smollm2_path):
  golden = _golden("smollm2_golden")
  target = load_target(smollm2_path)
  taps = tuple(golden["hidden_layers"].tolist())
  ids, lengths = golden["ids"], golden["lengths"]
  padded = np.pad(ids, ((0, 0), (0, 96 - ids.shape[1])), constant_values=9)
  output = _prefill(target, padded, lengths, taps)
  logits = np.asarray(output.logits)
  close = functools.partial(np.testing.assert_allclose, atol=1e-3, rtol=0)
  close(logits[:, golden["vocab_subset"]], golden["logits_subset"])
  close(
    np.take_along_axis(logits, golden["top_ids"], axis=1), golden["top_logits"]
  )
  wide = logits.astype(np.float64)
  top = wide.max(-1, keepdims=True)
  lse = np.log(np.exp(wide - top).sum(-1)) + top[:, 0]
  rows = np.arange(len(ids))
  close(lse, golden["lse"][rows, lengths - 1])

  def relative(got, expected):
    scale = np.abs(expected).max(-1, keepdims=True)
    close(got / scale, expected / scale, atol=1e-5)

  features = np.asarray(output.features)
  relative(features[rows, lengths - 1], golden["hidden"])
  for row, positions in enumerate(golden["deep_positions"]):
    relative(features[row, positions, -1], golden["deep_hidden"][row])

  models = Models(target=target)
  prompts = [p[:n].tolist() for p, n in zip(ids, lengths, strict=True)]
  new = golden["greedy_ids"].shape[1]
  state = tiny.start(models, prompts, max_new=new, pad_to=96, capacity=96 + new)
  state = generate(
    models, state, Sampling.create(), _CYCLES, mode="ar", config=TreeConfig()
  )
  assert tiny.answers(state, prompts) == golden["greedy_ids"].tolist()

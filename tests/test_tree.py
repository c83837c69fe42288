"""The prefix tree: drawn by hand, and by properties."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2sd_jax import TreeConfig, UsageError, ancestor_mask, build_prefix_tree
from d2sd_jax.tree import chain_tree, merge_paths

pytestmark = pytest.mark.usefixtures("quick_compilation")

_jit_build = jax.jit(build_prefix_tree, static_argnames="num_nodes")
_jit_merge = jax.jit(merge_paths, static_argnames=("num_nodes", "origins"))
_jit_ancestors = jax.jit(ancestor_mask)


def _build(trunk, branches, prefix_lengths, num_nodes):
  return _jit_build(
    jnp.array(trunk),
    jnp.array(branches),
    jnp.array(prefix_lengths),
    num_nodes=num_nodes,
  )


def test_golden_tree():
  # Row 0:  a0 - 1 - 2 - 3            Row 1:  a9 - 1 - 2 - 3
  #          |   ` 41 - 42 (branch 0)                  ` 63 (branch 0)
  #          ` 51 - 52 - 53 (branch 1)         ` 72 - 73 (branch 1)
  tree = _build(
    [[90, 1, 2, 3], [99, 1, 2, 3]],
    [[[90, 1, 41, 42], [90, 51, 52, 53]], [[99, 1, 2, 63], [99, 1, 72, 73]]],
    [[1, 0], [2, 1]],
    9,
  )
  assert tree.tokens.tolist() == [
    [90, 1, 2, 3, 41, 42, 51, 52, 53],
    [99, 1, 2, 3, 63, 72, 73, 0, 0],
  ]
  assert tree.parents.tolist() == [
    [-1, 0, 1, 2, 1, 4, 0, 6, 7],
    [-1, 0, 1, 2, 2, 1, 5, -1, -1],
  ]
  assert tree.depths.tolist() == [
    [0, 1, 2, 3, 2, 3, 1, 2, 3],
    [0, 1, 2, 3, 3, 2, 3, 0, 0],
  ]
  assert tree.valid.tolist() == [[True] * 9, [True] * 7 + [False] * 2]
  assert tree.origins[0].tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 2]


def test_golden_ancestors():
  mask = ancestor_mask(jnp.array([[-1, 0, 1, 0, 3, -1]]))[0]
  assert [np.flatnonzero(row).tolist() for row in mask] == [
    [0],
    [0, 1],
    [0, 1, 2],
    [0, 3],
    [0, 3, 4],
    [5],
  ]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 9, 10, 17, 18])
def test_ancestors_of_a_chain_reach_the_root(size):
  parents = jnp.arange(-1, size - 1)[None]
  np.testing.assert_array_equal(
    _jit_ancestors(parents)[0], np.tri(size, dtype=bool)
  )


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_ancestors_match_a_walk_to_the_root(data):
  size = data.draw(st.sampled_from([2, 7, 13]))
  parents = [-1] + [data.draw(st.integers(-1, i - 1)) for i in range(1, size)]
  mask = _jit_ancestors(jnp.array([parents]))[0]
  np.testing.assert_array_equal(mask, oracles.ancestors(parents))


@st.composite
def _drafts(draw):
  """(trunk, branches, prefix lengths, budget) of two ragged rows."""
  block, branches, extra = draw(
    st.sampled_from([(2, 1, 0), (4, 3, 0), (5, 2, 2)])
  )
  token = st.integers(0, 4)
  row = lambda n: st.lists(token, min_size=n, max_size=n)
  trunk, suffixes, lengths = [], [], []
  for _ in range(2):
    trunk.append(draw(row(block)))
    lengths.append(draw(st.permutations(range(block - 1)))[:branches])
    suffixes.append(
      [
        [*trunk[-1][: i + 1], *draw(row(block + extra - 1 - i))]
        for i in lengths[-1]
      ]
    )
  most = block + sum(block + extra - 1 - i for i in range(branches))
  budget = draw(st.sampled_from([most, most, block, (block + most) // 2]))
  return trunk, suffixes, lengths, budget, most


@settings(deadline=None, max_examples=60)
@given(_drafts())
def test_nodes_are_the_candidates_paths(drafts):
  trunk, branches, lengths, budget, most = drafts
  tree = _build(trunk, branches, lengths, budget)
  for b in range(2):
    tokens, parents = np.asarray(tree.tokens[b]), np.asarray(tree.parents[b])
    valid, depths = np.asarray(tree.valid[b]), np.asarray(tree.depths[b])
    used = np.flatnonzero(valid)
    suffixes = len(branches[b][0]) - 1 - np.array(lengths[b])
    everything = len(trunk[b]) + suffixes.sum()
    assert len(tokens) == budget
    assert used.tolist() == list(range(min(everything, budget)))
    assert (parents[~valid] == -1).all()
    assert (parents[used] < used).all()
    assert valid[parents[used[1:]]].all()

    paths = [oracles.node_path(parents, i) for i in used]
    assert depths[used].tolist() == [len(p) - 1 for p in paths]
    found = {tuple(tokens[p].tolist()) for p in paths}
    wanted = oracles.candidate_paths(trunk[b], branches[b], lengths[b])
    # Parents come first, so what a smaller budget keeps is prefix-closed.
    assert found <= wanted
    if budget == most:
      assert found == wanted
    assert {tuple(trunk[b][: n + 1]) for n in range(len(trunk[b]))} <= found


def test_budget_cuts_the_last_branches_tails():
  tree = _build(
    [[9, 1, 2, 3]], [[[9, 4, 5, 6], [9, 1, 7, 8]]], [[0, 1]], num_nodes=8
  )
  assert tree.tokens[0].tolist() == [9, 1, 2, 3, 4, 5, 6, 7]
  assert tree.parents[0].tolist() == [-1, 0, 1, 2, 0, 4, 5, 1]


def test_default_tree_uses_at_most_70_nodes():
  config = TreeConfig(block_size=16, num_branches=4)
  assert (config.most_nodes, config.num_nodes) == (70, 72)
  early = jnp.array([[2, 0, 3, 1], [14, 11, 13, 12]])
  trunk = jnp.arange(32).reshape(2, 16)
  tree = _build(trunk, jnp.zeros((2, 4, 16), int), early, 70)
  assert tree.valid.sum(axis=1).tolist() == [70, 16 + 1 + 2 + 3 + 4]


def test_chain():
  tree = chain_tree(jnp.array([[7, 8, 9], [4, 5, 6]]))
  assert tree.parents.tolist() == [[-1, 0, 1]] * 2
  assert tree.depths.tolist() == [[0, 1, 2]] * 2
  assert tree.origins.tolist() == [[0, 1, 1]] * 2
  assert bool(tree.valid.all())


def test_chain_of_fewer_tokens_than_slots():
  tree = chain_tree(jnp.array([[7, 8, 9], [4, 5, 6]]), jnp.array([0, 1]), 3)
  assert tree.tokens.tolist() == [[7, 0, 0], [4, 5, 0]]
  assert tree.parents.tolist() == [[-1, -1, -1], [-1, 0, -1]]
  assert tree.depths.tolist() == [[0, 0, 0], [0, 1, 0]]
  assert tree.valid.sum(axis=1).tolist() == [1, 2]
  assert tree.origins[1, 1] == 3


def test_golden_merged_paths():
  # 90 - 1 - 2 - 3             The second path leaves the trunk behind 1, the
  #       |                    third one leaves the second behind 41, and the
  #       ` 41 - 42 - 43       fourth is the trunk and goes on.
  #           ` 52 - 53
  paths = [
    [90, 1, 41, 42, 43],
    [90, 1, 41, 52, 53],
    [90, 1, 2, 3, 4],
    [90, 1, 41, 42, 43],
  ]
  tree = _jit_merge(
    jnp.array([[90, 1, 2, 3]]),
    jnp.array([paths]),
    num_nodes=12,
    origins=(2, 4, 5, 2),
  )
  assert tree.tokens[0].tolist() == [
    *[90, 1, 2, 3, 41, 42, 43, 52, 53, 4],
    *[0, 0],
  ]
  assert tree.parents[0].tolist() == [-1, 0, 1, 2, 1, 4, 5, 4, 7, 3, -1, -1]
  assert tree.depths[0].tolist() == [0, 1, 2, 3, 2, 3, 4, 3, 4, 4, 0, 0]
  assert tree.origins[0, :10].tolist() == [0, 1, 1, 1, 2, 2, 2, 4, 4, 5]
  assert tree.valid[0].tolist() == [True] * 10 + [False] * 2


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_merged_paths_are_all_there_and_stored_once(data):
  block, count, size = data.draw(st.sampled_from([(2, 1, 2), (4, 5, 6)]))
  draw = lambda n: data.draw(
    st.lists(st.integers(0, 2), min_size=n, max_size=n)
  )
  trunks = [[9, *draw(block - 1)] for _ in range(2)]
  paths = [[[9, *draw(size - 1)] for _ in range(count)] for _ in range(2)]
  most = block + count * (size - 1)
  budget = data.draw(st.sampled_from([most, block, (block + most) // 2]))
  tree = _jit_merge(
    jnp.array(trunks), jnp.array(paths), num_nodes=budget, origins=(4,) * count
  )
  for b in range(2):
    used = np.flatnonzero(tree.valid[b])
    tokens, parents = np.asarray(tree.tokens[b]), np.asarray(tree.parents[b])
    found = [oracles.node_path(parents, i) for i in used]
    assert tree.depths[b, used].tolist() == [len(p) - 1 for p in found]
    texts = [tuple(tokens[p].tolist()) for p in found]
    wanted = {
      tuple(path[: n + 1])
      for path in [trunks[b], *paths[b]]
      for n in range(len(path))
    }
    assert len(set(texts)) == len(texts) == min(budget, len(wanted))
    assert set(texts) <= wanted


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("block_size", 1),
    ("num_branches", -1),
    ("num_branches", 6),
    ("second_block_size", 5),
    ("node_budget", 5),
  ],
)
def test_impossible_trees_are_refused_by_name(field, value):
  with pytest.raises(UsageError, match=f"{field}={value}"):
    TreeConfig(**{"block_size": 6, field: value})

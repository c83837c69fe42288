"""The accepted path, against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from hypothesis import given, settings
from hypothesis import strategies as st

from d2sd_jax import (
  PrefixTree,
  Sampling,
  longest_accepted_path,
  target_choices,
)
from d2sd_jax.sampling import sample

_jit_path = jax.jit(longest_accepted_path, static_argnames="max_length")


def _tree(tokens, parents, valid=None):
  parents = np.asarray(parents, np.int32)
  depths = [
    [len(oracles.node_path(p, i)) - 1 for i in range(len(p))] for p in parents
  ]
  return PrefixTree(
    tokens=jnp.array(tokens, jnp.int32),
    parents=jnp.array(parents),
    depths=jnp.array(depths, jnp.int32),
    valid=jnp.ones(parents.shape, bool) if valid is None else jnp.array(valid),
    origins=jnp.zeros(parents.shape, jnp.int8),
  )


def _verdict(tree, choices, max_length):
  verdict = _jit_path(tree, jnp.array(choices), max_length=max_length)
  return (
    verdict.path.tolist(),
    verdict.num_accepted.tolist(),
    verdict.next_anchor.tolist(),
  )


def test_three_rows_by_hand():
  # 0 - 1 - 2, a branch 3 - 4 from the root.
  parents = [[-1, 0, 1, 0, 3]] * 3
  tokens = [[9, 5, 6, 7, 8]] * 3
  choices = [
    [5, 6, 1, 0, 0],  # the whole trunk
    [7, 0, 0, 8, 2],  # the whole branch
    [3, 6, 1, 8, 2],  # nothing, though deeper nodes match
  ]
  assert _verdict(_tree(tokens, parents), choices, 3) == (
    [[0, 1, 2], [0, 3, 4], [0, 0, 0]],
    [2, 2, 0],
    [1, 2, 3],
  )


def test_equal_siblings_all_stay_alive():
  # Both children of the root carry 5; only the second one goes on rightly.
  tree = _tree([[9, 5, 6, 5, 7]], [[-1, 0, 1, 0, 3]])
  path, accepted, anchor = _verdict(tree, [[5, 7, 0, 7, 4]], 3)
  assert (path, accepted, anchor) == ([[0, 3, 4]], [2], [4])


def test_the_trunk_wins_ties():
  tree = _tree([[9, 5, 6, 5, 6]], [[-1, 0, 1, 0, 3]])
  path, accepted, anchor = _verdict(tree, [[5, 6, 1, 6, 2]], 3)
  assert (path, accepted, anchor) == ([[0, 1, 2]], [2], [1])


def test_unused_nodes_are_never_accepted():
  tree = _tree([[9, 5, 0]], [[-1, 0, -1]], valid=[[True, True, False]])
  assert _verdict(tree, [[0, 0, 0]], 2) == ([[0, 0]], [0], [0])


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_matches_brute_force(data):
  size, rows = 11, 3
  small = st.integers(0, 1)
  tokens, parents, valid, choices = [], [], [], []
  for _ in range(rows):
    used = data.draw(st.integers(1, size))
    draw = lambda: [data.draw(small) for _ in range(size)]
    tokens.append(draw())
    choices.append(draw())
    parents.append(
      [-1]
      + [data.draw(st.integers(max(0, i - 3), i - 1)) for i in range(1, used)]
      + [-1] * (size - used)
    )
    valid.append([i < used for i in range(size)])
  tree = _tree(tokens, parents, valid)
  path, accepted, anchor = _verdict(tree, choices, size)
  for b in range(rows):
    best = oracles.longest_accepted(tokens[b], parents[b], valid[b], choices[b])
    assert path[b][: accepted[b] + 1] == best
    assert not any(path[b][accepted[b] + 1 :])
    assert anchor[b] == choices[b][best[-1]]


def test_a_choice_is_keyed_by_the_position_of_the_token_chosen():
  logits = jnp.zeros((2, 3, 50))
  positions = jnp.array([[4, 5, 5], [0, 1, 2]])
  ids = jnp.array([7, 3])
  sampling = Sampling.create(temperature=1.0, seed=11)
  np.testing.assert_array_equal(
    jax.jit(target_choices)(logits, positions, ids, sampling),
    jax.jit(sample)(logits, positions + 1, ids, sampling),
  )

"""The optimizer on stacks is the optimizer on every leaf by itself."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from d2sd_jax.training.optimizer import in_stacks, make_optimizer
from d2sd_jax.training.train_config import TrainConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Tall, wide and square matrices, some of one shape, and vectors.
_SHAPES = {
  "tall": [(7, 3), (7, 3), (7, 3)],
  "norms": [(5,), (4,), (5,)],
  "wide": [(3, 7)],
  "square": [(5, 5), (5, 5)],
}


def _tree(seed):
  leaves, structure = jax.tree.flatten(
    _SHAPES, is_leaf=lambda x: isinstance(x, tuple)
  )
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return jax.tree.unflatten(
    structure,
    [jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)],
  )


def _run(optimizer, steps=4):
  params = _tree(0)
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for step in range(steps):
    updates, state = update(_tree(step + 1), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def test_muon_in_stacks_is_muon():
  config = TrainConfig(
    corpus="c",
    heldout="h",
    optimizer="muon",
    num_steps=10,
    learning_rate=0.1,
    weight_decay=0.3,
    clip_norm=2.0,
  )
  schedule = optax.schedules.warmup_cosine_decay_schedule(0.0, 0.1, 1, 10)
  plain = optax.chain(
    optax.clip_by_global_norm(2.0),
    optax.contrib.muon(
      schedule, weight_decay=0.3, adam_b2=0.95, consistent_rms=0.2
    ),
  )
  found, state = _run(make_optimizer(config))
  wanted, _ = _run(plain)
  chex.assert_trees_all_close(found, wanted, rtol=2e-5, atol=2e-5)
  assert max(x.ndim for x in jax.tree.leaves(state)) == 3


def test_leaves_come_back_in_their_places():
  tree = {
    "a": jnp.zeros((2, 3)),
    "b": jnp.zeros((3,)),
    "c": jnp.ones((2, 3)),
    "d": jnp.ones((2,)),
  }
  # Members of a stack move by their number, and so do elements of vectors.
  number = lambda x: jnp.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1))
  inner = optax.stateless(
    lambda updates, params: jax.tree.map(
      lambda u, p: u + 10 * number(u) + p, updates, params
    )
  )
  found, _ = in_stacks(inner).update(tree, in_stacks(inner).init(tree), tree)
  wanted = {
    "a": jnp.full((2, 3), 0.0),
    "b": jnp.array([0.0, 10.0, 20.0]),
    "c": jnp.full((2, 3), 12.0),
    "d": jnp.array([32.0, 42.0]),
  }
  chex.assert_trees_all_equal(found, wanted)

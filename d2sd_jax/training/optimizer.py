"""Optimizers of a distillation run, and their learning rate."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from d2sd_jax.training.train_config import TrainConfig

_VECTORS = "vectors"


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """AdamW, or Muon for the matrices, behind a clip; cosine with warm-up."""
  schedule = learning_rate_schedule(config)
  if config.optimizer == "adamw":
    update = optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay)
  else:
    # Updates as large as AdamW's usually are, so that learning rates carry
    # over (arXiv 2502.16982).
    update = in_stacks(
      optax.contrib.muon(
        schedule,
        weight_decay=config.weight_decay,
        adam_b2=0.95,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
      )
    )
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
  """Linear warm-up over `warmup_fraction` of the steps, then a cosine to 0."""
  warmup = max(1, round(config.warmup_fraction * config.num_steps))
  return optax.schedules.warmup_cosine_decay_schedule(
    0.0, config.learning_rate, warmup, max(config.num_steps, warmup + 1)
  )


def in_stacks(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """`inner` on a stack of all matrices of one shape, in the place of each.

  A drafter has 36 matrices of five shapes. Muon multiplies each by itself 15
  times, far too small a product to keep a GPU busy; a stack is one product.

  Args:
    inner: takes a dict of stacks, `[number of matrices, *shape]` by shape,
      whose members it treats alike but apart, and of all vectors end to end,
      whose elements it does.
  """

  def init(params: Any) -> Any:
    return inner.init(_stack(params))

  def update(updates: Any, state: Any, params: Any = None) -> Any:
    stacks = None if params is None else _stack(params)
    new, state = inner.update(_stack(updates), state, stacks)
    parts = {name: _parts(name, x, updates) for name, x in new.items()}
    return jax.tree.map(lambda x: next(parts[_name(x)]), updates), state

  return optax.GradientTransformation(init, update)


def _stack(tree: Any) -> dict[str, jax.Array]:
  """Leaves of one kind together, in the tree's order."""
  groups: dict[str, list[jax.Array]] = {}
  for leaf in jax.tree.leaves(tree):
    groups.setdefault(_name(leaf), []).append(leaf)
  # Vectors end to end are one, which a mesh leaves whole, as it does each.
  join = lambda name: jnp.concatenate if name == _VECTORS else jnp.stack
  return {name: join(name)(group) for name, group in groups.items()}


def _parts(name: str, joined: jax.Array, tree: Any) -> Iterator[jax.Array]:
  """The leaves that `_stack` has put together."""
  if name != _VECTORS:
    return iter(joined)
  sizes = [x.size for x in jax.tree.leaves(tree) if _name(x) == _VECTORS]
  return iter(jnp.split(joined, list(itertools.accumulate(sizes))[:-1]))


def _name(leaf: jax.Array) -> str:
  return "x".join(map(str, leaf.shape)) if leaf.ndim > 1 else _VECTORS


def _matrices(stacks: dict[str, Any]) -> dict[str, Any]:
  """How Muon reads each stack; `None` leaves what is no matrix to AdamW.

  Told by the names, since optax puts marks in the place of what it masks.
  """
  each = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
  return {name: None if name == _VECTORS else each for name in stacks}

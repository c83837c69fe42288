"""The pieces of a cycle, each as a step that can follow itself."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from d2sd_jax.bench.config import BenchConfig
from d2sd_jax.bench.floors import (
  Work,
  commit_work,
  draft_work,
  target_work,
)
from d2sd_jax.bench.models import random_state, random_tree
from d2sd_jax.decoding.cycle import commit, decode_cycle
from d2sd_jax.decoding.policies import POLICIES, draft_block, redraft
from d2sd_jax.decoding.state import DecodeState, Models
from d2sd_jax.kernels.cascade_attention.api import default_implementation
from d2sd_jax.models.target import TargetOutput
from d2sd_jax.sampling import Sampling
from d2sd_jax.timing import Step
from d2sd_jax.verify import longest_accepted_path, target_choices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
  """What is timed.

  Attributes:
    step: see `time_step`.
    models: what it runs.
    carry: what its first step gets.
    inputs: what all its steps get.
    works: what must be done, one after the other.
    implementations: what attention runs, by the pass it is part of.
  """

  step: Step
  models: Models
  carry: Any
  inputs: Any
  works: tuple[Work, ...]
  implementations: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class _Cell:
  """Models and a place of the grid."""

  models: Models
  config: BenchConfig
  batch: int
  cache: int

  @property
  def used(self) -> int:
    return self.cache - self.config.tree.branch_size - 1

  def state(self, models: Models) -> DecodeState:
    return random_state(models, self.config, self.batch, self.cache)

  def target_runs(self, nodes: int) -> str:
    """Attention's implementation in the target."""
    forced = self.models.target.implementation
    return forced or self._runs(self.config.num_kv_heads, 1, nodes)

  def drafter_runs(self, groups: int) -> str:
    """Attention's implementation in a drafter."""
    block = self.config.block_size
    return self._runs(self.config.num_kv_heads, groups, block)

  def _runs(self, kv_heads: int, groups: int, nodes: int) -> str:
    c = self.config
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, c.dtype_name)
    query: Any = shape(self.batch, groups, nodes, c.num_heads, c.head_dim)
    keys: Any = shape(self.batch, kv_heads, self.cache, c.head_dim)
    return default_implementation(query, keys)


def autoregressive(cell: _Cell) -> Piece:
  """A whole step of mode `ar`."""
  models = Models(target=cell.models.target)
  return Piece(
    step=_cycle_of("ar", cell.config),
    models=models,
    carry=cell.state(models),
    inputs=None,
    works=(target_work(models, cell.batch, 1, cell.used),),
    implementations={"target": cell.target_runs(1)},
  )


def whole_cycle(cell: _Cell) -> Piece:
  """A whole cycle of mode `d2sd`."""
  config = cell.config.tree
  nodes = config.num_nodes
  return Piece(
    step=_cycle_of("d2sd", cell.config),
    models=cell.models,
    carry=cell.state(cell.models),
    inputs=None,
    works=(
      _first_work(cell),
      _second_work(cell),
      target_work(cell.models, cell.batch, nodes, cell.used),
      commit_work(cell.models, cell.batch, config.branch_size),
    ),
    implementations={
      "target": cell.target_runs(nodes),
      "draft 1": cell.drafter_runs(1),
      "draft 2": cell.drafter_runs(config.num_branches),
    },
  )


def _cycle_of(mode: str, config: BenchConfig) -> Step:
  """A cycle after which everything stands as before, with a new anchor."""

  def step(models, state, _):
    lengths = state.lengths
    after = decode_cycle(
      models,
      state,
      Sampling.create(),
      policy=POLICIES[mode],
      config=config.tree,
    )
    return _rewind(after, lengths)

  return step


def _rewind(state: DecodeState, lengths: Any) -> DecodeState:
  """As long as before, so that every step costs the same."""
  return dataclasses.replace(
    _with_anchor(state, lengths, state.anchors),
    lengths=lengths,
    num_cycles=jnp.int32(0),
  )


def _with_anchor(state: DecodeState, lengths: Any, tokens: Any) -> DecodeState:
  """The state with other tokens at the rows' anchors."""
  rows = jnp.arange(tokens.shape[0])
  return dataclasses.replace(
    state, tokens=state.tokens.at[rows, lengths].set(tokens)
  )


def first_draft(cell: _Cell) -> Piece:
  """Drafter 1's block and its confidence."""
  config = cell.config.tree
  slots = jnp.zeros((cell.batch, config.block_size - 1), jnp.float32)

  def step(models, carry, _):
    state, _ = carry
    trunk, confidence = draft_block(models, state, config)
    return _with_anchor(state, state.lengths, trunk[:, 1]), confidence

  return Piece(
    step=step,
    models=cell.models,
    carry=(cell.state(cell.models), slots),
    inputs=None,
    works=(_first_work(cell),),
    implementations={"draft 1": cell.drafter_runs(1)},
  )


def second_draft(cell: _Cell) -> Piece:
  """Drafter 2's K blocks, each behind a prefix of another length."""
  config = cell.config.tree
  branches, block = config.num_branches, config.branch_size
  shape = (cell.batch, branches, block)
  hosts = jax.random.randint(
    jax.random.key(cell.config.seed), shape, 0, cell.config.vocab_size
  )
  starts = jnp.broadcast_to(jnp.arange(branches), shape[:2])

  def step(models, carry, starts):
    state, hosts = carry
    return state, redraft(models, state, config, 1, hosts, starts)[0]

  return Piece(
    step=step,
    models=cell.models,
    carry=(cell.state(cell.models), hosts.astype(jnp.int32)),
    inputs=starts,
    works=(_second_work(cell),),
    implementations={"draft 2": cell.drafter_runs(branches)},
  )


def _first_work(cell: _Cell) -> Work:
  block = cell.config.tree.block_size
  return draft_work(cell.models, 0, cell.batch, 1, block, cell.used)


def _second_work(cell: _Cell) -> Work:
  tree = cell.config.tree
  sizes = tree.num_branches, tree.branch_size
  return draft_work(cell.models, 1, cell.batch, *sizes, cell.used)


def verification(nodes: int) -> Callable[[_Cell], Piece]:
  """The target's pass over so many nodes, its choices and the best path."""

  def piece(cell: _Cell) -> Piece:
    state = cell.state(cell.models)
    tree = random_tree(cell.config, cell.batch, nodes)
    step = lambda models, carry, _: _verify(models, carry, cell.config)
    shapes = jax.eval_shape(
      lambda m, s, t: _verify(m, (s, t, None), cell.config)[2],
      *(cell.models, state, tree),
    )
    kept = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return Piece(
      step=step,
      models=cell.models,
      carry=(state, tree, kept),
      inputs=None,
      works=(target_work(cell.models, cell.batch, nodes, cell.used),),
      implementations={"target": cell.target_runs(nodes)},
    )

  return piece


def _verify(models: Models, carry: Any, config: BenchConfig) -> Any:
  """Scores the tree; its next tokens are the target's choices."""
  state, tree, _ = carry
  scores = models.target.score_tree(
    tree, state.target_cache, state.lengths, models.taps
  )
  positions = state.lengths[:, None] + tree.depths
  choices = target_choices(
    scores.logits, positions, state.sequence_ids, Sampling.create()
  )
  verdict = longest_accepted_path(tree, choices, config.tree.branch_size)
  tree = dataclasses.replace(tree, tokens=choices)
  # What a commit would read must be there; logits it never sees.
  return state, tree, (scores.features, scores.kv, verdict)


def committing(cell: _Cell) -> Piece:
  """Writing a path into all caches, and the drafters' context."""
  config = cell.config
  tree, (features, kv, verdict) = _verified(cell)

  def step(models, state, inputs):
    tree, features, kv, verdict = inputs
    scores = TargetOutput(logits=jnp.zeros((0,)), features=features, kv=kv)
    lengths = state.lengths
    return _rewind(commit(models, state, tree, scores, verdict), lengths)

  path = config.tree.branch_size
  return Piece(
    step=step,
    models=cell.models,
    carry=cell.state(cell.models),
    inputs=(tree, features, kv, verdict),
    works=(commit_work(cell.models, cell.batch, path),),
    implementations={},
  )


def _verified(cell: _Cell) -> Any:
  """What a verification leaves behind."""
  state = cell.state(cell.models)
  tree = random_tree(cell.config, cell.batch, cell.config.tree.num_nodes)
  verify = jax.jit(
    lambda m, s, t: _verify(m, (s, t, None), cell.config)[1:],
  )
  return verify(cell.models, state, tree)


def pieces(config: BenchConfig) -> dict[str, Callable[[Models], Piece]]:
  """How each row of the grid is made, by its name, `PIECE/BATCHxCACHE`."""
  everywhere: dict[str, Callable[[_Cell], Piece]] = {
    "ar": autoregressive,
    f"verify_{config.grid_nodes}": verification(config.grid_nodes),
    "cycle": whole_cycle,
  }
  once = {
    "ar": autoregressive,
    "draft_1": first_draft,
    "draft_2": second_draft,
    **{f"verify_{n}": verification(n) for n in config.verify_nodes},
    "commit": committing,
    "cycle": whole_cycle,
  }
  rows: dict[str, Callable[[Models], Piece]] = {}
  for cache in config.caches:
    for batch in config.batches:
      first = batch == config.batches[0] and cache == config.caches[0]
      for name, make in (once if first else everywhere).items():
        rows[f"{name}/{batch}x{cache}"] = _at(make, config, batch, cache)
  return rows


def _at(
  make: Callable[[_Cell], Piece], config: BenchConfig, batch: int, cache: int
) -> Callable[[Models], Piece]:
  """One row, made of models when its turn comes."""
  return lambda models: make(_Cell(models, config, batch, cache))

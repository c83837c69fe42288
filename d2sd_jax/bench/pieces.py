"""The pieces of a cycle, each as a step that can follow itself."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from d2sd_jax.bench.cell import Cell, Piece
from d2sd_jax.bench.collectives import (
  GATHER,
  OWN,
  SUM,
  Message,
  draft_messages,
  pass_carry,
  pass_step,
  target_messages,
  together,
)
from d2sd_jax.bench.config import BenchConfig
from d2sd_jax.bench.floors import (
  Work,
  commit_work,
  device_batch,
  draft_work,
  target_work,
)
from d2sd_jax.decoding.cycle import commit, decode_cycle, score
from d2sd_jax.decoding.placement import ROWS, WHOLE, cache_spec
from d2sd_jax.decoding.policies import POLICIES, draft_block, redraft
from d2sd_jax.decoding.state import DecodeState, Models
from d2sd_jax.models.cache import commit_path
from d2sd_jax.models.target import TargetOutput
from d2sd_jax.sampling import Sampling
from d2sd_jax.sharding import TENSOR
from d2sd_jax.timing import Step, Use
from d2sd_jax.tree import PrefixTree
from d2sd_jax.verify import Verdict, longest_accepted_path


def autoregressive(cell: Cell) -> Piece:
  """A whole step of mode `ar`."""
  models = dataclasses.replace(cell.models, drafters=(), draft_head=None)
  return Piece(
    step=_cycle_of("ar", cell.config),
    models=models,
    carry=cell.state(models),
    inputs=None,
    specs=cell.specs(models),
    works=(target_work(models, cell.batch, 1, cell.used),),
    messages=target_messages(models, cell.batch, 1),
    uses=cell.target_uses(1),
  )


def whole_cycle(cell: Cell) -> Piece:
  """A whole cycle of mode `d2sd`."""
  config = cell.config.tree
  nodes = config.num_nodes
  return Piece(
    step=_cycle_of("d2sd", cell.config),
    models=cell.models,
    carry=cell.state(cell.models),
    inputs=None,
    specs=cell.specs(cell.models),
    messages=together(
      _first_messages(cell),
      _second_messages(cell),
      target_messages(cell.models, cell.batch, nodes),
    ),
    works=(
      _first_work(cell),
      _second_work(cell),
      target_work(cell.models, cell.batch, nodes, cell.used),
      commit_work(cell.models, cell.batch, config.branch_size),
    ),
    uses=(
      *cell.drafter_uses(0, 1),
      *cell.drafter_uses(1, config.num_branches),
      *cell.target_uses(nodes),
      *cell.context_uses(config.branch_size),
    ),
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


def first_draft(cell: Cell) -> Piece:
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
    carry=(cell.state(cell.models), cell.put(slots, ROWS)),
    inputs=None,
    specs=cell.specs(cell.models, (ROWS,)),
    messages=_first_messages(cell),
    works=(_first_work(cell),),
    uses=cell.drafter_uses(0, 1),
  )


def second_draft(cell: Cell) -> Piece:
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
    carry=(
      cell.state(cell.models),
      cell.put(hosts.astype(jnp.int32), ROWS),
    ),
    inputs=cell.put(starts, ROWS),
    specs=cell.specs(cell.models, (ROWS,), ROWS),
    messages=_second_messages(cell),
    works=(_second_work(cell),),
    uses=cell.drafter_uses(1, branches),
  )


def _first_work(cell: Cell) -> Work:
  block = cell.config.tree.block_size
  return draft_work(cell.models, 0, cell.batch, 1, block, cell.used)


def _second_work(cell: Cell) -> Work:
  tree = cell.config.tree
  sizes = tree.num_branches, tree.branch_size
  return draft_work(cell.models, 1, cell.batch, *sizes, cell.used)


def _first_messages(cell: Cell) -> Mapping[Message, int]:
  block = cell.config.tree.block_size
  return draft_messages(cell.models, 0, cell.batch, 1, block)


def _second_messages(cell: Cell) -> Mapping[Message, int]:
  tree = cell.config.tree
  sizes = tree.num_branches, tree.branch_size
  return draft_messages(cell.models, 1, cell.batch, *sizes)


def verification(nodes: int) -> Callable[[Cell], Piece]:
  """The target's pass over so many nodes, its choices and the best path.

  The path's keys and values go into the target's cache, as in a cycle: if all
  nodes' were kept, they would first be cut out of the products.
  """

  def piece(cell: Cell) -> Piece:
    state = cell.state(cell.models)
    tree = cell.tree(nodes)
    _, scores, verdict = jax.eval_shape(
      _verifying(cell), cell.models, state, tree
    )
    kept = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype), (scores.features, verdict)
    )

    def step(models, carry, _):
      state, tree, _ = carry
      tree, scores, verdict = _verify(models, state, tree, cell.config)
      written = commit_path(
        state.target_cache, scores.kv, verdict.path, state.lengths
      )
      state = dataclasses.replace(state, target_cache=written)
      return state, tree, (scores.features, verdict)

    return Piece(
      step=step,
      models=cell.models,
      carry=(state, tree, cell.put(kept, ROWS)),
      inputs=None,
      specs=cell.specs(cell.models, (ROWS, ROWS)),
      messages=target_messages(cell.models, cell.batch, nodes),
      works=(target_work(cell.models, cell.batch, nodes, cell.used),),
      uses=cell.target_uses(nodes),
    )

  return piece


def _verify(
  models: Models, state: DecodeState, tree: PrefixTree, config: BenchConfig
) -> tuple[PrefixTree, TargetOutput, Verdict]:
  """A tree whose tokens are the target's choices; its pass; the best path."""
  choices, scores = score(models, state, Sampling.create(), tree)
  verdict = longest_accepted_path(tree, choices, config.tree.branch_size)
  return dataclasses.replace(tree, tokens=choices), scores, verdict


def _scores_specs(cell: Cell) -> TargetOutput:
  """Where a pass of the target leaves what."""
  kv: Any = cache_spec(cell.models.target)
  return TargetOutput(logits=ROWS, features=ROWS, kv=kv)  # type: ignore[arg-type]


def _verifying(cell: Cell) -> Callable[..., Any]:
  """`_verify` on all devices, of models, a state and a tree."""
  models, state, _ = cell.specs(cell.models)
  return cell.spread(
    lambda m, s, t: _verify(m, s, t, cell.config),
    (models, state, ROWS),
    (ROWS, _scores_specs(cell), ROWS),
  )


def committing(cell: Cell) -> Piece:
  """Writing a path into all caches, and the drafters' context."""
  state = cell.state(cell.models)
  tree = cell.tree(cell.config.tree.num_nodes)
  verified = jax.jit(_verifying(cell))(cell.models, state, tree)

  def step(models, state, verified):
    return _rewind(commit(models, state, *verified), state.lengths)

  path = cell.config.tree.branch_size
  return Piece(
    step=step,
    models=cell.models,
    carry=state,
    inputs=verified,
    specs=cell.specs(cell.models, inputs=(ROWS, _scores_specs(cell), ROWS)),
    works=(commit_work(cell.models, cell.batch, path),),
    uses=cell.context_uses(path),
  )


def pieces(config: BenchConfig) -> dict[str, Callable[[Models], Piece]]:
  """How each row of the grid is made, by its name, `PIECE/BATCHxCACHE`."""
  everywhere: dict[str, Callable[[Cell], Piece]] = {
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
  make: Callable[[Cell], Piece], config: BenchConfig, batch: int, cache: int
) -> Callable[[Models], Piece]:
  """One row, made of models when its turn comes."""
  return lambda models: make(Cell(models, config, batch, cache))


def collective_rows(
  config: BenchConfig,
) -> dict[str, Callable[[Mesh], Piece]]:
  """Rows of what a target pass exchanges and nothing else, by their names.

  Named `collectives_NODES/BATCHxCACHE`, for the first cache alone, since it
  makes no difference; none where the target is not split.
  """
  if config.mesh_sizes[TENSOR] == 1:
    return {}
  usual = {1, config.grid_nodes, config.tree.num_nodes}
  rows = {}
  for batch in config.batches:
    more = config.verify_nodes if batch == config.batches[0] else ()
    for nodes in sorted(usual | set(more)):
      name = f"collectives_{nodes}/{batch}x{config.caches[0]}"
      rows[name] = _collectives(config, batch, nodes)
  return rows


def _collectives(
  config: BenchConfig, batch: int, nodes: int
) -> Callable[[Mesh], Piece]:
  def piece(mesh: Mesh) -> Piece:
    own = device_batch(batch, mesh)
    states = own, nodes, config.hidden_size
    sums = 2 * config.num_layers + 1
    return Piece(
      step=pass_step(config.num_layers),
      models=None,
      carry=pass_carry(config, mesh, batch, nodes),
      inputs=None,
      specs=(WHOLE, OWN, WHOLE),
      messages={
        Message(SUM, states, config.dtype_name): sums,
        Message(GATHER, (own, nodes)): 1,
      },
      uses=(Use("sums", SUM, sums), Use("choice", GATHER)),
    )

  return piece

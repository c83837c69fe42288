"""What is timed, and at which place of the grid."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from d2sd_jax.bench.collectives import Message
from d2sd_jax.bench.config import BenchConfig
from d2sd_jax.bench.floors import Work, device_batch, device_heads
from d2sd_jax.bench.models import at_places, random_state, random_tree
from d2sd_jax.decoding.placement import ROWS, WHOLE, model_specs, spread
from d2sd_jax.decoding.state import DecodeState, Models, state_specs
from d2sd_jax.kernels.cascade_attention.api import default_implementation
from d2sd_jax.timing import Step
from d2sd_jax.tree import PrefixTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
  """What is timed.

  Attributes:
    step: see `time_step`.
    models: what it runs.
    carry: what its first step gets.
    inputs: what all its steps get.
    specs: where `models`, `carry` and `inputs` lie on a mesh.
    works: what must be done by each device, one after the other.
    messages: what the devices exchange in a step, and how often.
    implementations: what attention runs, by the pass it is part of.
  """

  step: Step
  models: Any
  carry: Any
  inputs: Any
  specs: tuple[Any, Any, Any] = (WHOLE, WHOLE, WHOLE)
  works: tuple[Work, ...] = ()
  messages: Mapping[Message, int] = dataclasses.field(default_factory=dict)
  implementations: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Cell:
  """Models and a place of the grid."""

  models: Models
  config: BenchConfig
  batch: int
  cache: int

  @property
  def mesh(self) -> Mesh | None:
    """Where the models lie."""
    return self.models.mesh

  @property
  def used(self) -> int:
    """Rows of the caches that are seen."""
    return self.cache - self.config.tree.branch_size - 1

  def state(self, models: Models) -> DecodeState:
    """In the midst of decoding."""
    return random_state(models, self.config, self.batch, self.cache)

  def tree(self, nodes: int) -> PrefixTree:
    """Random tokens and branches."""
    tree = random_tree(self.config, self.batch, nodes)
    return self.put(tree, ROWS)

  def put(self, values: Any, specs: Any) -> Any:
    """The values at their places."""
    return at_places(self.mesh, values, specs)

  def specs(
    self, models: Models, more: Any = None, inputs: Any = WHOLE
  ) -> tuple[Any, Any, Any]:
    """Of a piece whose carry is a state, or a state and `more`."""
    state = state_specs(models)
    carry = state if more is None else (state, *more)
    return model_specs(models), carry, inputs

  def spread(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
    """The function on every device of the mesh."""
    return spread(function, self.mesh, in_specs, out_specs)

  def target_runs(self, nodes: int) -> str:
    """Attention's implementation in the target."""
    target = self.models.target
    return target.implementation or self._runs(target, 1, nodes)

  def drafter_runs(self, index: int, groups: int) -> str:
    """Attention's implementation in a drafter."""
    drafter = self.models.drafters[index]
    return self._runs(drafter, groups, self.config.block_size)

  def _runs(self, model: Any, groups: int, nodes: int) -> str:
    c = self.config
    heads, key_heads = device_heads(model, self.mesh)
    batch = device_batch(self.batch, self.mesh)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, c.dtype_name)
    query: Any = shape(batch, groups, nodes, heads, c.head_dim)
    keys: Any = shape(batch, key_heads, self.cache, c.head_dim)
    return default_implementation(query, keys)

"""What is timed, and at which place of the grid."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from d2sd_jax.bench.collectives import Message
from d2sd_jax.bench.config import BenchConfig
from d2sd_jax.bench.floors import (
  Work,
  device_batch,
  device_heads,
  device_shape,
)
from d2sd_jax.bench.models import at_places, random_state, random_tree
from d2sd_jax.decoding.placement import ROWS, WHOLE, model_specs, spread
from d2sd_jax.decoding.state import DecodeState, Models, state_specs
from d2sd_jax.kernels.cascade_attention import api as attention
from d2sd_jax.kernels.linear import api as products
from d2sd_jax.kernels.transposed import Transposed
from d2sd_jax.timing import Step, Use
from d2sd_jax.tree import PrefixTree

# Matrices of a layer, and of a drafter's context.
_LAYER = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_CONTEXT = ("fc", "context_proj")


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
    uses: what attention and each product of a pass should run.
  """

  step: Step
  models: Any
  carry: Any
  inputs: Any
  specs: tuple[Any, Any, Any] = (WHOLE, WHOLE, WHOLE)
  works: tuple[Work, ...] = ()
  messages: Mapping[Message, int] = dataclasses.field(default_factory=dict)
  uses: tuple[Use, ...] = ()


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

  def target_uses(self, nodes: int) -> tuple[Use, ...]:
    """Of a pass of the target over so many nodes of each row."""
    target = self.models.target
    attends = target.implementation or self._attends(target, 1, nodes)
    return self._uses("target", target, attends, nodes)

  def drafter_uses(self, index: int, groups: int) -> tuple[Use, ...]:
    """Of a pass of a drafter over so many blocks of each row."""
    drafter, block = self.models.drafters[index], self.config.block_size
    attends = self._attends(drafter, groups, block)
    return self._uses(f"draft {index + 1}", drafter, attends, groups * block)

  def context_uses(self, path: int) -> tuple[Use, ...]:
    """Of the drafters' context of a path, which is alike in both."""
    drafter, times = self.models.drafters[0], len(self.models.drafters)
    return tuple(
      self._product(f"context {name}", getattr(drafter, name), path, times)
      for name in _CONTEXT
    )

  def _uses(
    self, name: str, model: Any, attends: str, nodes: int
  ) -> tuple[Use, ...]:
    """Attention and the products of a model whose layers are alike."""
    layer, layers = model.layers[0], len(model.layers)
    return (
      Use(name, attends, layers),
      *(
        self._product(f"{name} {matrix}", getattr(layer, matrix), nodes, layers)
        for matrix in _LAYER
      ),
    )

  def _attends(self, model: Any, groups: int, nodes: int) -> str:
    """Attention's default for a pass over groups of nodes of each row."""
    c = self.config
    heads, key_heads = device_heads(model, self.mesh)
    batch = device_batch(self.batch, self.mesh)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, c.dtype_name)
    query: Any = shape(batch, groups, nodes, heads, c.head_dim)
    keys: Any = shape(batch, key_heads, self.cache, c.head_dim)
    return attention.default_implementation(query, keys)

  def _product(self, name: str, matrix: Any, nodes: int, times: int) -> Use:
    """A product of so many nodes of each row."""
    own = lambda x: jax.ShapeDtypeStruct(device_shape(x), x.dtype)
    matrix = jax.tree.map(own, matrix)
    # A quantized one has scales, too.
    (values,) = (x for x in jax.tree.leaves(matrix) if x.ndim == 2)
    count = device_batch(self.batch, self.mesh) * nodes
    width = values.shape[1 if isinstance(matrix, Transposed) else 0]
    # Of its left side only rows, width and dtype matter.
    x: Any = jax.ShapeDtypeStruct((count, width), self.config.dtype_name)
    gated = name.endswith("gate_up_proj")
    runs = products.default_implementation(x, matrix, gated=gated)
    return Use(name, runs, times)

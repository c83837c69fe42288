"""Random models, caches and trees, drawn where they will be used."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from d2sd_jax.bench.config import BenchConfig
from d2sd_jax.config import DrafterConfig, TargetConfig
from d2sd_jax.decoding.placement import (
  WHOLE,
  model_specs,
  shardings,
  weight_specs,
)
from d2sd_jax.decoding.state import DecodeState, Models, prefill, state_specs
from d2sd_jax.kernels.transposed import as_stored
from d2sd_jax.models.drafter import INIT_STD, FusedDrafter
from d2sd_jax.models.layers import LayerWeights
from d2sd_jax.models.target import LlamaTarget
from d2sd_jax.sampling import Sampling
from d2sd_jax.sharding import TENSOR
from d2sd_jax.tensor_parallel import Share
from d2sd_jax.tree import PrefixTree, chain_tree
from d2sd_jax.typing import Array

# Longest run without a branch in a tree that is only timed.
_TRUNK = 16


@functools.cache
def _normal(
  shape: tuple[int, ...], dtype: Any, place: Any, mean: float, std: float
) -> Callable[[Array], Array]:
  """Draws noise at a place; jitted, so that nothing else takes memory."""
  draw = lambda key: mean + std * jax.random.normal(key, shape, dtype)
  return jax.jit(draw, out_shardings=place)


class Draws:
  """Random arrays, each from a key of its own."""

  def __init__(self, seed: int, dtype: str, mesh: Mesh | None = None):
    """Draws of one seed; `dtype` is that of real numbers."""
    self._key, self._count = jax.random.key(seed), 0
    self._mesh = mesh
    self.dtype = jnp.dtype(dtype)

  def key(self) -> Array:
    """A new key."""
    self._count += 1
    return jax.random.fold_in(self._key, self._count)

  def noise(
    self,
    *shape: int,
    spec: PartitionSpec = WHOLE,
    mean: float = 0.0,
    std: float = 1.0,
  ) -> Array:
    """Normal noise; on a mesh each device draws its own part."""
    place = None if self._mesh is None else NamedSharding(self._mesh, spec)
    return _normal(shape, self.dtype, place, mean, std)(self.key())

  def tokens(self, vocab_size: int, *shape: int) -> Array:
    """Ids of a vocabulary."""
    return jax.random.randint(self.key(), shape, 0, vocab_size, jnp.int32)


def at_places(mesh: Mesh | None, values: Any, specs: Any) -> Any:
  """Arrays where `specs`, or those of whole subtrees, say; if need be moved."""
  if mesh is None:
    return values
  return jax.device_put(values, shardings(mesh, specs))


def random_models(config: BenchConfig, mesh: Mesh | None = None) -> Models:
  """A target and two drafters with random weights, drawn where they lie.

  Args:
    config: their shapes, and whether devices share the drafters too.
    mesh: the devices that share the target; `None` is the default device.
  """
  draws = Draws(config.seed, config.dtype_name, mesh)
  axis = None if mesh is None else TENSOR
  drafter_axis = axis if config.shard_drafters else None
  size = lambda axis: 1 if mesh is None or axis is None else mesh.shape[axis]
  target = LlamaTarget(
    **_shapes(config.target, size(axis)),
    config=config.target,
    implementation=config.implementation,
    axis=axis,
  )
  drafter = FusedDrafter(
    **_shapes(config.drafter, size(drafter_axis)),
    config=config.drafter,
    axis=drafter_axis,
  )
  models = Models(
    target=_drawn(draws, target),
    drafters=(_drawn(draws, drafter), _drawn(draws, drafter)),
    mesh=mesh,
  )
  if config.drafter_weights == "int8":
    models = models.with_int8_drafting()
  return at_places(mesh, models, model_specs(models))


def _drawn(draws: Draws, shapes: Any) -> Any:
  """A model whose every matrix and norm is random, of one of shapes."""

  def draw(array, spec):
    mean = 1.0 if array.ndim == 1 else 0.0
    return draws.noise(*array.shape, spec=spec, mean=mean, std=INIT_STD)

  return jax.tree.map(draw, shapes, weight_specs(shapes))


def _array(*shape: int) -> Any:
  """Stands for an array of a model that is not there yet."""
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _matrix(inputs: int, outputs: int) -> Any:
  """Stands for a matrix as the device stores it."""
  return jax.eval_shape(as_stored, _array(inputs, outputs))


def _shapes(c: TargetConfig | DrafterConfig, size: int) -> dict[str, Any]:
  """The weights of a target or a drafter that `size` devices share."""
  share = Share(config=c, part=0, size=size)
  width, key = c.hidden_size, len(share.key_rows)
  layers = tuple(_layer_shapes(c, size) for _ in range(c.num_layers))
  both = {"layers": layers, "norm": _array(width)}
  if isinstance(c, DrafterConfig):
    return both | {
      "fc": _matrix(len(c.target_layer_ids) * width, width),
      "hidden_norm": _array(width),
      "context_proj": _matrix(width, size * 2 * c.num_layers * key),
    }
  table = _array(size * len(share.vocabulary_rows), width)
  return both | {"embedding": table, "lm_head": None if c.tied_head else table}


def _layer_shapes(c: TargetConfig | DrafterConfig, size: int) -> LayerWeights:
  share = Share(config=c, part=0, size=size)
  width, head = c.hidden_size, c.head_dim
  query, key = size * len(share.query_rows), size * len(share.key_rows)
  inner = size * len(share.inner_rows)
  return LayerWeights(
    input_norm=_array(width),
    qkv_proj=_matrix(width, query + 2 * key),
    o_proj=_matrix(query, width),
    q_norm=_array(head) if c.qk_norm else None,
    k_norm=_array(head) if c.qk_norm else None,
    post_norm=_array(width),
    gate_up_proj=_matrix(width, 2 * inner),
    down_proj=_matrix(inner, width),
  )


def random_state(
  models: Models, config: BenchConfig, batch: int, cache: int
) -> DecodeState:
  """A state in the midst of decoding: caches full but for one path.

  No row ever finishes.
  """
  draws = Draws(config.seed + 1, config.dtype_name, models.mesh)
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  shapes = jax.eval_shape(
    functools.partial(prefill, capacity=cache),
    *(models, ints(batch, 1), *[ints(batch)] * 3, ints(2)),
    Sampling.create(),
  )
  zeros = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype),
    dataclasses.replace(shapes, target_cache=(), drafter_caches=()),
  )
  specs = state_specs(models)
  fill = lambda cache, spec: jax.tree.map(
    lambda s: draws.noise(*s.shape, spec=spec), cache
  )
  used = cache - config.tree.branch_size - 1
  state = dataclasses.replace(
    zeros,
    tokens=draws.tokens(config.vocab_size, batch, cache),
    lengths=jnp.full((batch,), used, jnp.int32),
    last_positions=jnp.full((batch,), 2**30, jnp.int32),
    stop_ids=jnp.array([-1, -1], jnp.int32),
    sequence_ids=jnp.arange(batch, dtype=jnp.int32),
    target_cache=fill(shapes.target_cache, specs.target_cache),
    drafter_caches=tuple(
      map(fill, shapes.drafter_caches, specs.drafter_caches)
    ),
  )
  return at_places(models.mesh, state, specs)


def random_tree(config: BenchConfig, batch: int, nodes: int) -> PrefixTree:
  """A trunk, and chains that hang at random places below it."""
  draws = Draws(config.seed + 2, config.dtype_name)
  rng = np.random.default_rng(config.seed)
  parents = np.arange(-1, nodes - 1)
  for first in range(_TRUNK, nodes, _TRUNK):
    parents[first] = rng.integers(0, _TRUNK)
  depths = np.zeros(nodes, int)
  for node in range(1, nodes):
    depths[node] = depths[parents[node]] + 1
  tree = chain_tree(draws.tokens(config.vocab_size, batch, nodes))
  wide = lambda x: jnp.broadcast_to(jnp.array(x, jnp.int32), (batch, nodes))
  return dataclasses.replace(tree, parents=wide(parents), depths=wide(depths))

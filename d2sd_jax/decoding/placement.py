"""Where models and the state of decoding lie on a mesh of devices.

Rows of a batch are split over the axis `data`, models over `tensor` (see
`d2sd_jax.tensor_parallel`). All of a decode loop runs in one `shard_map`: what
the devices exchange is written where it happens, and nothing else is.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from d2sd_jax.models.drafter import Drafter, FusedDrafter
from d2sd_jax.sharding import DATA, TENSOR, place
from d2sd_jax.tensor_parallel import Share, check_split, take_rows

if TYPE_CHECKING:
  from d2sd_jax.decoding.state import Models

_T = TypeVar("_T")
WHOLE, ROWS = PartitionSpec(), PartitionSpec(DATA)
# The dimension of each weight that devices share; other weights are whole.
# Of matrices that of `[in, out]`, whichever way they are stored.
_SPLIT = {
  "embedding": 0,
  "lm_head": 0,
  "qkv_proj": 1,
  "qkv_bias": 0,
  "o_proj": 0,
  "gate_up_proj": 1,
  "down_proj": 0,
  "sinks": 0,
  "context_proj": 1,
}
_SPLIT_IN_EXPERTS = {
  "gate_proj": 2,
  "gate_bias": 1,
  "up_proj": 2,
  "up_bias": 1,
  "down_proj": 1,
}


def spread(
  function: Callable[..., _T], mesh: Mesh | None, in_specs: Any, out_specs: Any
) -> Callable[..., _T]:
  """`function` on every device of a mesh; itself where there is no mesh.

  Args:
    function: takes and returns each device's part of its arrays.
    mesh: the devices.
    in_specs: `PartitionSpec`s of its arguments.
    out_specs: those of its results.
  """
  if mesh is None:
    return function
  # Pallas's kernels do not say over which axes their results vary.
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=False,
  )


def weight_specs(model: _T) -> _T:
  """A target's or a drafter's, where it is split over an axis: by field."""
  axis = getattr(model, "axis", None)

  def spec(path: Any, leaf: Any) -> PartitionSpec:
    names = [key.name for key in path if hasattr(key, "name")]
    rule = _SPLIT_IN_EXPERTS if "experts" in names else _SPLIT
    split = next((rule[name] for name in names if name in rule), None)
    if axis is None or split is None:
      return WHOLE
    if names[-1] == "scales":  # Of int8: one per column.
      return PartitionSpec(axis) if split == 1 else WHOLE
    if "stored" in names:  # Transposed.
      split = 1 - split
    return PartitionSpec(*[None] * split, axis)

  return jax.tree_util.tree_map_with_path(spec, model)


def model_specs(models: "Models") -> Any:
  """The `PartitionSpec` of every array of the models."""
  return dataclasses.replace(
    models,
    target=weight_specs(models.target),
    drafters=tuple(map(weight_specs, models.drafters)),
    draft_head=jax.tree.map(
      lambda _: PartitionSpec(models.axis), models.draft_head
    ),
  )


def cache_spec(model: Any) -> PartitionSpec:
  """Of each array of a target's or a drafter's cache."""
  return PartitionSpec(DATA, getattr(model, "axis", None))


def shardings(mesh: Mesh, specs: Any) -> Any:
  """`PartitionSpec`s as the places of arrays."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    specs,
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )


def put(mesh: Mesh | None, values: _T, specs: Any) -> _T:
  """Host arrays, the same in every process, at their places on the mesh."""
  if mesh is None:
    return jax.tree.map(jnp.array, values)
  return jax.tree.map(place, values, shardings(mesh, specs))


def to_host(values: _T) -> _T:
  """Arrays as NumPy's, whole in every process."""
  known = lambda x: x.is_fully_addressable or x.is_fully_replicated
  if all(map(known, jax.tree.leaves(values))):
    return jax.device_get(values)
  return multihost_utils.process_allgather(values, tiled=True)


def put_drafter(
  drafter: Drafter | FusedDrafter, mesh: Mesh | None, *, split: bool = False
) -> FusedDrafter:
  """A drafter as its devices store it.

  Args:
    drafter: as it is loaded or trained; int8 (`Models.with_int8_drafting`)
      comes after.
    mesh: the devices; `None` is the default one.
    split: whether devices share it, or each has all of it. Sharing reads fewer
      bytes and exchanges two sums a layer, as in a target.

  Raises:
    UsageError: so many devices cannot share it.
  """
  if isinstance(drafter, Drafter):
    drafter = drafter.fuse()
  if split and mesh is not None:
    check_split(drafter.config, mesh.shape[TENSOR])
    drafter = _regrouped(drafter, mesh.shape[TENSOR])
  drafter = drafter.as_stored()
  return drafter if mesh is None else put(mesh, drafter, weight_specs(drafter))


def _regrouped(drafter: FusedDrafter, size: int) -> FusedDrafter:
  """The drafter with what each device holds side by side."""
  config = drafter.config
  shares = [Share(config=config, part=i, size=size) for i in range(size)]
  keys = config.num_kv_heads * config.head_dim
  queries = config.num_heads * config.head_dim

  def regroup(x: Any, columns: Callable[[Share], Any], axis: int) -> Any:
    index = np.concatenate([columns(share) for share in shares])
    return take_rows(x, index, axis)

  # Columns of matrices side by side: offsets, -1 staying what it is.
  after = lambda rows, start: np.where(rows < 0, -1, rows + start)
  join = lambda rows, starts: np.concatenate([after(rows, s) for s in starts])
  qkv = lambda share: np.concatenate(
    [share.query_rows, join(share.key_rows, (queries, queries + keys))]
  )
  both = lambda s: join(s.inner_rows, (0, config.intermediate_size))
  starts = range(0, 2 * config.num_layers * keys, keys)
  layers = tuple(
    dataclasses.replace(
      layer,
      qkv_proj=regroup(layer.qkv_proj, qkv, 1),
      o_proj=regroup(layer.o_proj, lambda s: s.query_rows, 0),
      gate_up_proj=regroup(layer.gate_up_proj, both, 1),
      down_proj=regroup(layer.down_proj, lambda s: s.inner_rows, 0),
    )
    for layer in drafter.layers
  )
  context = lambda share: join(share.key_rows, starts)
  return dataclasses.replace(
    drafter,
    context_proj=regroup(drafter.context_proj, context, 1),
    layers=layers,
    axis=TENSOR,
  )

"""Meshes of devices, and which dimension of an array is split over which axis.

In training `data` splits the batch only. `fsdp` splits the batch too, and
besides the weights and the optimizer's state, which are gathered where they are
used. All of it runs in `jit`: an array's place is told, and XLA finds the
messages. Decoding splits models over `tensor` (`d2sd_jax.decoding.placement`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from d2sd_jax.errors import require

# Axes of a mesh by what they split; the batch is split over all of these.
DATA, FSDP = "data", "fsdp"
BATCH_AXES = (DATA, FSDP)
# A mesh that decodes: `tensor` splits the models (`d2sd_jax.tensor_parallel`).
TENSOR = "tensor"
DECODING_AXES = (DATA, TENSOR)

_T = TypeVar("_T")


def parse_mesh(
  text: str | None, axes: Sequence[str] = BATCH_AXES
) -> dict[str, int]:
  """Sizes by axis of a mesh written as `data:4,fsdp:2`.

  Args:
    text: `None` is a mesh of one device.
    axes: names that may occur, each once; the first is there in any case.

  Raises:
    UsageError: it is not written that way.
  """
  sizes: dict[str, int] = {}
  for part in (f"{axes[0]}:1" if text is None else text).split(","):
    name, _, size = part.strip().partition(":")
    fits = name in axes and name not in sizes
    fits = fits and size.isdecimal() and len(size) <= 6 and int(size) >= 1
    example = ",".join(f"{axis}:2" for axis in axes)
    require(bool(fits), "mesh", text, f"sizes of axes, such as {example}")
    sizes[name] = int(size)
  return {axis: sizes.get(axis, 1) for axis in axes}


def make_mesh(text: str | None, axes: Sequence[str] = BATCH_AXES) -> Mesh:
  """The mesh that `text` describes, of the devices of all processes.

  One process may leave devices over. Several must use all of them, or some
  would have nothing to do.

  Args:
    text: see `parse_mesh`.
    axes: see `parse_mesh`.

  Raises:
    UsageError: there are not as many devices.
  """
  sizes = parse_mesh(text, axes)
  wanted, found = math.prod(sizes.values()), jax.device_count()
  if jax.process_count() > 1:
    fits, expected = wanted == found, f"{axes[0]}:{found} or another product of"
    where = f"{found}, the devices of all {jax.process_count()} processes"
  else:
    fits, expected = wanted <= found, f"{axes[0]}:{found} or another product up"
    where = f"to {found}, the devices here"
  require(fits, "mesh", text, f"{expected} {where}")
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    devices=jax.devices()[:wanted],
  )


def batch_shards(sizes: Mapping[str, int]) -> int:
  """Parts that a batch is split into; `sizes` by axis, e.g. `mesh.shape`."""
  return math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch: the first dimension over both axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def weight_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
  """A weight's place, and that of whatever of its shape an optimizer keeps.

  The longest dimension that `fsdp` divides is split. Going by the shape alone,
  the rule knows every model and optimizer; and Muon's products of a matrix
  with itself then run over the split dimension, and their sums are small.
  Vectors are small too, and stay whole.
  """
  size = mesh.shape[FSDP]
  fits = [i for i, n in enumerate(shape) if n and n % size == 0]
  if size == 1 or len(shape) < 2 or not fits:
    return replicated(mesh)
  longest = max(fits, key=lambda i: shape[i])
  return NamedSharding(mesh, PartitionSpec(*[None] * longest, FSDP))


def shard_weights(mesh: Mesh, tree: _T) -> _T:
  """Puts weights, the same in every process, where `weight_sharding` says."""
  return jax.tree.map(lambda x: place(x, weight_sharding(mesh, x.shape)), tree)


def replicate(mesh: Mesh, tree: _T) -> _T:
  """Puts arrays, the same in every process, whole on every device."""
  return jax.tree.map(lambda x: place(x, replicated(mesh)), tree)


def shard_batch(mesh: Mesh, batch: _T) -> _T:
  """Puts a batch on the mesh; a process's own rows are all that is read."""
  return jax.tree.map(lambda x: place(x, batch_sharding(mesh)), batch)


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
  """Rows of a batch that this process's devices hold, in order."""
  places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  parts = [index for index in places.values() if index is not None]
  rows = np.arange(batch_size)
  return tuple(sorted({int(row) for part in parts for row in rows[part]}))


def constrain_weights(mesh: Mesh | None, tree: _T) -> _T:
  """Inside `jit`: weights are split as `weight_sharding` says."""
  if mesh is None:
    return tree
  place = lambda x: weight_sharding(mesh, x.shape)
  return jax.lax.with_sharding_constraint(tree, jax.tree.map(place, tree))


def gather(mesh: Mesh | None, tree: _T) -> _T:
  """Inside `jit`: arrays are whole on every device.

  Said of weights before they are used, it keeps XLA from gathering what they
  are multiplied with instead, the activations.
  """
  if mesh is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def place(value: Any, sharding: NamedSharding) -> jax.Array:
  """Puts an array, of which every process knows at least its own part."""
  value = np.asarray(value)
  return jax.make_array_from_callback(
    value.shape, sharding, lambda index: value[index]
  )

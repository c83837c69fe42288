"""The least time a piece can take: its bytes or its FLOPs, whichever binds.

On a mesh both are those of one device: its part of what is split, all of what
is whole.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from d2sd_jax.decoding.state import Models
from d2sd_jax.sharding import DATA, TENSOR
from d2sd_jax.tensor_parallel import Share


@dataclasses.dataclass(frozen=True)
class Rates:
  """What the device was measured to reach, in bytes and FLOPs per second."""

  bytes: float
  flops: float


@dataclasses.dataclass(frozen=True)
class Work:
  """Bytes that must move and FLOPs that must be done, one after the other."""

  bytes: float
  flops: float

  def milliseconds(self, rates: Rates) -> float:
    """The floor."""
    return 1e3 * max(self.bytes / rates.bytes, self.flops / rates.flops)

  def bound(self, rates: Rates) -> str:
    """Which of the two binds."""
    memory = self.bytes / rates.bytes > self.flops / rates.flops
    return "bytes" if memory else "flops"


def device_batch(batch: int, mesh: Mesh | None) -> int:
  """Rows of a batch that one device has."""
  return batch if mesh is None else batch // mesh.shape[DATA]


def device_shape(x: Any) -> tuple[int, ...]:
  """Of the part of an array, or of what stands for one, that a device has."""
  return x.sharding.shard_shape(x.shape)


def device_heads(model: Any, mesh: Mesh | None) -> tuple[int, int]:
  """Query heads and key heads of a model that one device has."""
  split = mesh is not None and model.axis is not None
  size = mesh.shape[TENSOR] if mesh is not None and split else 1
  share = Share(config=model.config, part=0, size=size)
  return len(share.heads), len(share.key_heads)


def target_work(models: Models, batch: int, nodes: int, used: int) -> Work:
  """One pass of the target over as many nodes of each row.

  Args:
    models: the target is asked.
    batch: rows.
    nodes: of each row.
    used: rows of the cache that are seen.
  """
  target = models.target
  weights = (target.layers, target.norm, target.head_weight)
  batch = device_batch(batch, models.mesh)
  heads = device_heads(target, models.mesh)
  return _pass_work(weights, target, heads, batch, nodes, nodes, used)


def draft_work(
  models: Models, index: int, batch: int, groups: int, block: int, used: int
) -> Work:
  """One pass of a drafter over blocks, with the head.

  Args:
    models: drafters and head.
    index: which drafter.
    batch: rows.
    groups: blocks of each row, which share the row's cache.
    block: slots of a block.
    used: rows of the cache that are seen.
  """
  drafter = models.drafters[index]
  head = models.draft_head
  if head is None:
    head = models.target.head_weight
  weights = (drafter.layers, drafter.norm, head)
  batch = device_batch(batch, models.mesh)
  heads = device_heads(drafter, models.mesh)
  nodes = groups * block
  return _pass_work(weights, drafter, heads, batch, nodes, block, used)


def commit_work(models: Models, batch: int, path: int) -> Work:
  """Context keys and values of every drafter; writes are next to nothing."""
  weights = [(d.fc, d.context_proj) for d in models.drafters]
  rows = device_batch(batch, models.mesh) * path
  return Work(_bytes(weights), 2 * rows * _parameters(weights))


def _pass_work(
  weights: Any,
  model: Any,
  heads: tuple[int, int],
  batch: int,
  nodes: int,
  own: int,
  used: int,
) -> Work:
  """Weights once, the cache once; each node meets all weights and keys."""
  itemsize = jax.tree.leaves(weights[1])[0].dtype.itemsize
  layers, head = model.config.num_layers, model.config.head_dim
  width = heads[1] * head
  cache = 2 * layers * batch * used * width * itemsize
  rows = batch * nodes
  scores = 4 * rows * (used + own) * layers * heads[0] * head
  flops = 2 * rows * _parameters(weights) + scores
  return Work(_bytes(weights) + cache, flops)


def _bytes(weights: Any) -> int:
  return sum(_size(x) * x.dtype.itemsize for x in jax.tree.leaves(weights))


def _parameters(weights: Any) -> int:
  """Of the matrices."""
  return sum(_size(x) for x in jax.tree.leaves(weights) if x.ndim == 2)


def _size(x: jax.Array) -> int:
  """Numbers of an array that one device has."""
  return math.prod(device_shape(x))

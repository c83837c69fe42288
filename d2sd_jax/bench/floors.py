"""The least time a piece can take: its bytes or its FLOPs, whichever binds."""

import dataclasses
from typing import Any

import jax

from d2sd_jax.config import DrafterConfig, TargetConfig
from d2sd_jax.decoding.state import Models


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
  return _pass_work(weights, target.config, batch, nodes, nodes, used)


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
  return _pass_work(weights, drafter.config, batch, groups * block, block, used)


def commit_work(models: Models, batch: int, path: int) -> Work:
  """Context keys and values of every drafter; writes are next to nothing."""
  weights = [(d.fc, d.context_proj) for d in models.drafters]
  return Work(_bytes(weights), 2 * batch * path * _parameters(weights))


def _pass_work(
  weights: Any,
  config: TargetConfig | DrafterConfig,
  batch: int,
  nodes: int,
  own: int,
  used: int,
) -> Work:
  """Weights once, the cache once; each node meets all weights and keys."""
  itemsize = jax.tree.leaves(weights[1])[0].dtype.itemsize
  width = config.num_kv_heads * config.head_dim
  cache = 2 * config.num_layers * batch * used * width * itemsize
  rows = batch * nodes
  heads = config.num_layers * config.num_heads * config.head_dim
  scores = 4 * rows * (used + own) * heads
  flops = 2 * rows * _parameters(weights) + scores
  return Work(_bytes(weights) + cache, flops)


def _bytes(weights: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))


def _parameters(weights: Any) -> int:
  """Of the matrices."""
  return sum(x.size for x in jax.tree.leaves(weights) if x.ndim == 2)

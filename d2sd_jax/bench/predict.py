"""What a step and a cycle should cost on devices that were not there.

A model on paper, in seconds. A pass takes the longer of its bytes and its FLOPs
on one device, at rates that one device was measured to reach; then a start for
each kernel, attention's own time, and the messages between the devices.
`docs/scaling.md` says what each number rests on.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

from d2sd_jax.config import TreeConfig

# Of weights outside of experts, activations and caches: bfloat16.
_BYTES = 2
# Kernels a layer, as counted for one row and for more.
_KERNELS_OF_ONE, _KERNELS = 23, 18
# Attention's kernel took so many times its floor.
_ATTENTION = 2.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """A target and its drafters.

  Attributes:
    inner_size: of the feed-forward network, or of each expert.
    drafter_inner: of a drafter's feed-forward network.
    num_experts, top_k: 0 without experts.
    expert_bits: of a weight of an expert, its scales included.
    grouped: kernels that read an expert once, where a row has chosen it, and
      run it on those rows; else what `d2sd_jax.models.experts` does.
    window, windowed_layers: layers that see so many tokens.
  """

  name: str
  num_layers: int
  hidden_size: int
  inner_size: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  vocab_size: int
  drafter_inner: int
  drafter_layers: int = 5
  num_taps: int = 5
  num_experts: int = 0
  top_k: int = 0
  expert_bits: float = 16.0
  grouped: bool = False
  window: int = 0
  windowed_layers: int = 0

  @property
  def attention_parameters(self) -> int:
    """Of one layer's projections."""
    columns = 2 * self.num_heads + 2 * self.num_kv_heads
    return self.hidden_size * columns * self.head_dim

  @property
  def network_parameters(self) -> int:
    """Of one layer's network, or of one expert."""
    return 3 * self.hidden_size * self.inner_size

  @property
  def head_parameters(self) -> int:
    """Of the head, and of the embedding."""
    return self.vocab_size * self.hidden_size

  @property
  def dense_parameters(self) -> int:
    """That every row of a pass meets, the head left out."""
    network = self.hidden_size * self.num_experts  # The router.
    if not self.num_experts:
      network = self.network_parameters
    return self.num_layers * (self.attention_parameters + network)

  @property
  def drafter_parameters(self) -> int:
    """Of one drafter's layers."""
    network = 3 * self.hidden_size * self.drafter_inner
    return self.drafter_layers * (self.attention_parameters + network)

  @property
  def context_parameters(self) -> tuple[int, int]:
    """Of one drafter's `fc`, and of its context's keys and values."""
    columns = 2 * self.drafter_layers * self.num_kv_heads * self.head_dim
    width = self.hidden_size
    return self.num_taps * width * width, width * columns

  @property
  def parameters(self) -> int:
    """Of the target."""
    experts = self.num_layers * self.num_experts * self.network_parameters
    return self.dense_parameters + experts + 2 * self.head_parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One device and its way to the others.

  Attributes:
    memory: bytes per second.
    peak: bfloat16 FLOPs per second.
    link: bytes per second out of the device.
    latency: seconds of a message of no size.
    kernel: seconds that each kernel takes beside its work.
    attention: seconds of attention's kernel over next to no cache.
    capacity: bytes.
  """

  name: str
  memory: float
  peak: float
  link: float
  latency: float
  kernel: float
  attention: float
  capacity: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What runs where.

  Attributes:
    tensor: devices that share the target.
    batch: rows.
    context: rows of the caches in use.
    split_drafters: whether the devices share the drafters too.
    tree: of a cycle.
  """

  shape: Shape
  chip: Chip
  tensor: int = 1
  batch: int = 1
  context: int = 2048
  split_drafters: bool = False
  tree: TreeConfig = dataclasses.field(default_factory=TreeConfig)

  @property
  def drafter_parts(self) -> int:
    """Devices that share a drafter."""
    return self.tensor if self.split_drafters else 1


def distinct_experts(num_experts: int, top_k: int, rows: int) -> float:
  """How many experts rows choose together, if each draws evenly by itself.

  `E (1 - (1 - k/E)^n)`: an expert is left out by a row with `1 - k/E`.
  """
  return num_experts * (1 - (1 - top_k / num_experts) ** rows)


def work_seconds(chip: Chip, size: float, flops: float) -> float:
  """The longer of both, at the device's rates."""
  return max(size / chip.memory, flops / chip.peak)


def sum_seconds(chip: Chip, tensor: int, size: float) -> float:
  """An all-reduce of `size` bytes on each of `tensor` devices.

  Each sends `2 (t - 1) / t` of them, as in a ring; nothing on one device.
  """
  if tensor == 1:
    return 0.0
  return chip.latency + 2 * (tensor - 1) / tensor * size / chip.link


def expert_work(shape: Shape, rows: int) -> tuple[float, float]:
  """Bytes and FLOPs of one layer's experts on all devices together."""
  if not shape.num_experts:
    return 0.0, 0.0
  per_expert = shape.network_parameters
  size = per_expert * shape.expert_bits / 8
  chosen = rows * shape.top_k
  if shape.grouped:
    read = distinct_experts(shape.num_experts, shape.top_k, rows)
  elif 3 * chosen <= shape.num_experts:
    read = 3 * chosen  # Gathered: read, written and read again.
  else:
    read, chosen = shape.num_experts, rows * shape.num_experts
  return read * size, 2.0 * chosen * per_expert


def attention_seconds(
  plan: Plan, parts: int, nodes: int, own: int, context: int
) -> float:
  """Attention of one layer on one device; all nodes share a read of the keys.

  Args:
    plan: sizes and rates.
    parts: devices that share the heads.
    nodes: of each row.
    own: nodes that one of them may see, beside the context.
    context: rows of the cache that are seen.
  """
  shape = plan.shape
  size = plan.batch * context * _key_bytes(plan, parts)
  heads = shape.num_heads / parts
  seen = context + own
  flops = 4 * plan.batch * nodes * seen * heads * shape.head_dim
  floor = work_seconds(plan.chip, size, flops)
  return plan.chip.attention + _ATTENTION * floor


def target_seconds(plan: Plan, nodes: int) -> float:
  """One pass of the target over `nodes` of each row."""
  shape, chip, parts = plan.shape, plan.chip, plan.tensor
  rows = plan.batch * nodes
  dense = shape.dense_parameters + shape.head_parameters
  size, flops = expert_work(shape, rows)
  size = shape.num_layers * size + _BYTES * dense
  flops = shape.num_layers * flops + 2 * rows * dense
  near = shape.windowed_layers
  seen = min(plan.context, shape.window)
  attend = lambda layers, context: (
    layers * attention_seconds(plan, parts, nodes, nodes, context)
  )
  return (
    work_seconds(chip, size / parts, flops / parts)
    + _start_seconds(chip, shape.num_layers, rows)
    + attend(shape.num_layers - near, plan.context)
    + attend(near, seen)
    + exchange_seconds(plan, nodes)
  )


def exchange_seconds(plan: Plan, nodes: int) -> float:
  """What a target pass exchanges: `collectives_N` of the benchmark."""
  sums = 2 * plan.shape.num_layers + 1
  return sums * _states_seconds(plan, nodes) + _message_seconds(plan)


def draft_seconds(plan: Plan, index: int) -> float:
  """Drafter 1's block (index 0), or drafter 2's branches."""
  shape, chip, parts = plan.shape, plan.chip, plan.drafter_parts
  tree = plan.tree
  groups = 1 if index == 0 else tree.num_branches
  block = tree.block_size if index == 0 else tree.branch_size
  nodes = groups * block
  rows = plan.batch * nodes
  own = shape.drafter_parameters / parts + shape.head_parameters / plan.tensor
  layers = shape.drafter_layers
  sums = 1 + (2 * layers if plan.split_drafters else 0)
  # A choice; of drafter 1 also the largest score and the sum of confidences.
  small = 3 if index == 0 else 1
  attention = attention_seconds(plan, parts, nodes, block, plan.context)
  return (
    work_seconds(chip, _BYTES * own, 2 * rows * own)
    + _start_seconds(chip, layers, rows)
    + layers * attention
    + sums * _states_seconds(plan, nodes)
    + small * _message_seconds(plan)
  )


def commit_seconds(plan: Plan) -> float:
  """One drafter's context keys and values of a path."""
  whole, split = plan.shape.context_parameters
  weights = whole + split / plan.drafter_parts
  rows = plan.batch * plan.tree.branch_size
  return work_seconds(plan.chip, _BYTES * weights, 2 * rows * weights)


def step_seconds(plan: Plan) -> float:
  """A step of `ar`."""
  return target_seconds(plan, 1)


def dflash_seconds(plan: Plan) -> float:
  """A cycle of `dflash`."""
  nodes = plan.tree.block_size
  drafted = draft_seconds(plan, 0) + commit_seconds(plan)
  return drafted + target_seconds(plan, nodes)


def d2sd_seconds(plan: Plan) -> float:
  """A cycle of `d2sd`."""
  drafted = draft_seconds(plan, 0) + draft_seconds(plan, 1)
  verified = target_seconds(plan, plan.tree.num_nodes)
  return drafted + verified + 2 * commit_seconds(plan)


def memory_bytes(plan: Plan, num_drafters: int = 2) -> float:
  """Weights and caches of one device."""
  shape, parts = plan.shape, plan.drafter_parts
  experts = shape.num_layers * shape.num_experts * shape.network_parameters
  target: float = _BYTES * (shape.dense_parameters + 2 * shape.head_parameters)
  target += experts * shape.expert_bits / 8
  whole, split = shape.context_parameters
  drafter = (shape.drafter_parameters + split) / parts + whole
  cache = _key_bytes(plan, 1) * plan.batch * plan.context
  caches = (
    shape.num_layers / plan.tensor + num_drafters * shape.drafter_layers / parts
  )
  return target / plan.tensor + num_drafters * _BYTES * drafter + cache * caches


def fits(plan: Plan, num_drafters: int = 2) -> bool:
  """Whether a twentieth of the device's memory is left."""
  return memory_bytes(plan, num_drafters) <= 0.95 * plan.chip.capacity


def tokens_per_second(plan: Plan, seconds: float, alpha: float = 1.0) -> float:
  """Of all rows together, α committed a row and cycle."""
  return plan.batch * alpha / seconds


def paying_batches(
  plan: Plan,
  alpha: float,
  seconds: Callable[[Plan], float],
  batches: Iterable[int],
) -> list[int]:
  """Batches at which a cycle costs less than α steps of `ar`."""
  pays = lambda plan: seconds(plan) < alpha * step_seconds(plan)
  at = lambda batch: dataclasses.replace(plan, batch=batch)
  return [batch for batch in batches if pays(at(batch))]


def _start_seconds(chip: Chip, layers: int, rows: int) -> float:
  kernels = _KERNELS_OF_ONE if rows == 1 else _KERNELS
  return layers * kernels * chip.kernel


def _key_bytes(plan: Plan, parts: int) -> float:
  """Of one token's keys and values in one layer of one device."""
  heads = math.ceil(plan.shape.num_kv_heads / parts)
  return 2 * heads * plan.shape.head_dim * _BYTES


def _states_seconds(plan: Plan, nodes: int) -> float:
  size = plan.batch * nodes * plan.shape.hidden_size * _BYTES
  return sum_seconds(plan.chip, plan.tensor, size)


def _message_seconds(plan: Plan) -> float:
  """A score and an id, or a confidence: too small for anything but latency."""
  return sum_seconds(plan.chip, plan.tensor, 0)

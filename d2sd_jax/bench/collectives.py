"""What devices that share a model tell each other, and what that takes.

A pass of a split target sums its hidden states once for the embedding and
twice a layer, and gathers a score and an id a device for each choice
(`d2sd_jax.tensor_parallel`). Here each message is timed by itself, and a step
that sends exactly those of a pass.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from d2sd_jax.bench.config import BenchConfig
from d2sd_jax.bench.floors import device_batch
from d2sd_jax.decoding.placement import WHOLE
from d2sd_jax.decoding.state import Models
from d2sd_jax.sharding import DATA, TENSOR
from d2sd_jax.tensor_parallel import best_token, sum_parts
from d2sd_jax.timing import Timing, Use, time_step

SUM, GATHER = "all-reduce", "all-gather"
# Messages of one kind in a step.
_CHAIN = 32
# Each device has values of its own.
OWN = PartitionSpec((DATA, TENSOR))


@dataclasses.dataclass(frozen=True)
class Message:
  """One exchange between the devices that share a model.

  Attributes:
    kind: `all-reduce`, or `all-gather` of a score and an id each.
    shape: of what one device gives.
    dtype: of what is summed; scores are float32 and ids int32.
  """

  kind: str
  shape: tuple[int, ...]
  dtype: str = "float32"

  @property
  def row(self) -> str:
    """The name of its row."""
    return f"rates/{self.kind}/{'x'.join(map(str, self.shape))}"


def target_messages(
  models: Models, batch: int, nodes: int
) -> Mapping[Message, int]:
  """Of one pass of the target over `nodes` of each of `batch` rows."""
  if not _shared(models.mesh):
    return {}
  c, batch = models.target.config, device_batch(batch, models.mesh)
  dtype = models.target.embedding.dtype.name
  states = Message(SUM, (batch, nodes, c.hidden_size), dtype)
  return {states: 2 * c.num_layers + 1, Message(GATHER, (batch, nodes)): 1}


def draft_messages(
  models: Models, index: int, batch: int, groups: int, block: int
) -> Mapping[Message, int]:
  """Of one pass of a drafter over blocks.

  A drafter that is whole on every device still shares embedding and head. The
  confidence of drafter 1 alone is read: a largest score and a sum.

  Args:
    models: target and drafters.
    index: which drafter.
    batch: rows.
    groups: blocks of each row.
    block: slots of a block.
  """
  if not _shared(models.mesh):
    return {}
  drafter = models.drafters[index]
  c, batch = drafter.config, device_batch(batch, models.mesh)
  layers = 0 if drafter.axis is None else c.num_layers
  dtype = drafter.dtype.name
  states = Message(SUM, (batch, groups * block, c.hidden_size), dtype)
  drafted = batch, groups * (block - 1)
  confidence = {Message(SUM, drafted): 2} if index == 0 else {}
  return {states: 2 * layers + 1, Message(GATHER, drafted): 1, **confidence}


def together(*messages: Mapping[Message, int]) -> Mapping[Message, int]:
  """All of them."""
  total: Counter[Message] = Counter()
  for some in messages:
    total.update(some)
  return dict(total)


def message_timing(config: BenchConfig, mesh: Mesh, message: Message) -> Timing:
  """Times one message, as the mean of many that follow each other.

  Many, for a loop's own step may take longer than a message does.
  """
  if message.kind == SUM:
    step = lambda _, carry, __: _sums(carry, _CHAIN)
  else:
    step = lambda _, carry, __: _choices(carry, _CHAIN)
  timing = time_step(
    *(step, None, _zeros(mesh, message.shape, message.dtype), None),
    repeats=config.repeats,
    seconds=config.seconds,
    mesh=mesh,
    specs=(WHOLE, OWN, WHOLE),
  )
  timing.check_ran([Use("message", message.kind, _CHAIN)])
  times = tuple(time / _CHAIN for time in timing.times)
  return dataclasses.replace(timing, times=times)


def pass_step(num_layers: int) -> Callable[[Any, Any, Any], Any]:
  """A step with a target pass's messages: sums one after another, a choice."""

  def step(_, carry, __):
    states = _sums(carry[0], 2 * num_layers + 1)
    return states, _told(states[..., :1])

  return step


def _sums(states: Any, count: int) -> Any:
  """Sums of sums.

  A sum of what is equal on all devices is a product, and XLA might see that:
  whoever times these counts what the compiled program has.
  """
  for _ in range(count):
    states = sum_parts(states, TENSOR)
  return states


def _choices(scores: Any, count: int) -> Any:
  """Choices among scores that the ones before have made."""
  for _ in range(count):
    scores = _told(scores[..., None]).astype(scores.dtype)
  return scores


def pass_carry(config: BenchConfig, mesh: Mesh, batch: int, nodes: int) -> Any:
  """The carry of `pass_step`."""
  states = (device_batch(batch, mesh), nodes, config.hidden_size)
  return (
    _zeros(mesh, states, config.dtype_name),
    _zeros(mesh, states[:2], "int32"),
  )


def _told(scores: Any) -> Any:
  """A choice of the devices together."""
  return best_token(scores.astype(jnp.float32), TENSOR)


def _zeros(mesh: Mesh, shape: tuple[int, ...], dtype: str) -> Any:
  """An array of this shape for each device; sums of zeros stay finite."""
  everywhere = (mesh.size * shape[0], *shape[1:])
  make = lambda: jnp.zeros(everywhere, dtype)
  return jax.jit(make, out_shardings=NamedSharding(mesh, OWN))()


def _shared(mesh: Mesh | None) -> bool:
  return mesh is not None and mesh.shape[TENSOR] > 1

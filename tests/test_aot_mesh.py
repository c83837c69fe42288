"""Decoding on meshes that are not there: `pytest -m aot`.

Qwen3-8B's shapes. What is read off the compiled programs: which messages a
cycle exchanges, that weights and caches lie still, and the memory of a device.
"""

import collections
import dataclasses
import math
import re

import chips
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from d2sd_jax import generate
from d2sd_jax.decoding.placement import ROWS, WHOLE, model_specs
from d2sd_jax.decoding.state import prefill, state_specs
from d2sd_jax.sharding import DECODING_AXES, TENSOR

pytestmark = pytest.mark.aot
_WIDTH = chips.QWEN3_8B["hidden_size"]
_VOCABULARY = chips.QWEN3_8B["vocab_size"]
_MESSAGE = re.compile(
  r"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) (all-gather|all-reduce|all-to-all|"
  r"collective-\w+|ragged-all-to-all|reduce-scatter)(?:-start)?\(",
  re.MULTILINE,
)
_BYTES = {"pred": 1, "s8": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}
_NODES = 72
_STATES = _NODES * _WIDTH * 2
# A score and an id for each node and device.
_SMALL = 8 * _NODES * 2 * 4


@dataclasses.dataclass(frozen=True)
class _Case:
  """A mesh, and what lies on it.

  Attributes:
    temporary: bytes beside weights, caches and state, above what was measured.
    split: whether devices share the drafters, too.
  """

  chip: str
  topology: str
  data: int
  tensor: int
  temporary: float
  num_layers: int = chips.LAYERS
  split: bool = False

  def __str__(self):
    drafters = "split" if self.split else "whole"
    return f"{self.chip}-data:{self.data},tensor:{self.tensor}-{drafters}"


# With whole drafters 8.5e9 bytes of weights and caches lie on a device, about
# half of a v5e's memory. v6e's program takes longest to compile, so it has
# fewer layers here; all 36 took 0.085e9 temporary bytes.
_CASES = [
  _Case("v5e", "2x2", 1, 4, 0.1e9),
  _Case("v6e", "2x4", 2, 4, 0.13e9, num_layers=12),
  _Case("h200", "4", 1, 4, 0.25e9),
  _Case("v6e", "2x4", 1, 8, 0.1e9, num_layers=4, split=True),
]


def _mesh(case):
  """Its devices in its shape."""
  devices = np.array(chips.devices_of(case.chip, case.topology))
  return Mesh(
    devices.reshape(case.data, case.tensor),
    *(DECODING_AXES, (AxisType.Auto,) * 2),
  )


def _arguments(case, mesh):
  """Shapes of all that `generate` takes, at their places."""
  models, _, sampling, steps = chips.arguments(
    case.num_layers, 1, chips.QWEN3_8B
  )
  # Every size is a multiple of both: global shapes are those of one device.
  share = lambda model: dataclasses.replace(model, axis=TENSOR)
  models = dataclasses.replace(
    models,
    target=share(models.target),
    drafters=tuple(map(share, models.drafters))
    if case.split
    else models.drafters,
    mesh=mesh,
  )
  state = chips.make_state(models, case.data)
  specs = model_specs(models), state_specs(models), WHOLE, WHOLE

  def place(spec, tree):
    where = NamedSharding(mesh, spec)
    held = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(held, tree)

  return jax.tree.map(
    *(place, specs, (models, state, sampling, steps)),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )


def _arrays(types):
  """Element type and sizes of each array in an HLO type."""
  for name, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", types):
    yield name, [int(n) for n in sizes.split(",") if n]


def _messages(hlo):
  """Kind of everything that is exchanged, and the arrays of its type.

  Those of what a message starts with are there too.
  """
  for types, kind in _MESSAGE.findall(hlo):
    yield kind, list(_arrays(types))


def _check_messages(hlo, case):
  """Two sums of states a layer, lookups, and scores with ids; no more."""
  sums, small = 0, collections.Counter()
  for kind, arrays in _messages(hlo):
    name, sizes = arrays[-1]
    if kind == "all-reduce" and (name, sizes[-1:]) == ("bf16", [_WIDTH]):
      sums, limit = sums + 1, _STATES
    else:
      small[kind, name, *sizes] += 1
      limit = _SMALL
      assert kind in ("all-reduce", "all-gather"), (kind, arrays)
    for name, sizes in arrays:
      assert _BYTES[name] * math.prod(sizes) <= limit, (kind, arrays)
  print(case, sums, "sums of states;", dict(small))
  # Of the target and of both drafts: one lookup each.
  layers = case.num_layers + 2 * chips.DRAFTER_LAYERS * case.split
  assert sums == 2 * layers + 3
  # One of each draft, and two of the target's choice: greedy or sampled.
  gathered = [key for key in small.elements() if key[0] == "all-gather"]
  assert len(gathered) == 4
  for _, name, *sizes in gathered:
    assert (name, sizes[0], sizes[-1]) == ("s32", case.tensor, 2)


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_cycle_on_a_mesh(case):
  """What all devices together do, in mode `d2sd`."""
  mesh = _mesh(case)
  with jax.default_device(mesh.devices.flat[0]):
    args = _arguments(case, mesh)
    compiled = chips.compile_program(
      generate, *args, mode="d2sd", config=chips.TREE
    )
  hlo, memory = compiled.as_text(), compiled.memory_analysis()
  print(case, memory)
  _check_messages(hlo, case)
  # Nothing is made of the whole vocabulary, noise included.
  assert not re.search(rf"[\[,]{_VOCABULARY}[\],]", hlo)
  for cache in {
    args[1].target_cache.keys[0],
    args[1].drafter_caches[0].keys[0],
  }:
    shape = cache.sharding.shard_shape(cache.shape)
    for held in (shape, (*shape[:2], shape[3], shape[2])):
      sizes = ",".join(map(str, held))
      assert list(chips.copies(hlo, f"bf16[{sizes}]")) == []
  assert list(chips.moved_weights(hlo)) == []
  assert memory.temp_size_in_bytes < case.temporary
  total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  assert total + memory.generated_code_size_in_bytes < chips.HBM[case.chip]


def test_a_prompt_as_long_as_its_cache():
  """A write of all rows with no indices ended XLA's process here."""
  case = _Case("h200", "2", 2, 1, 0, num_layers=1)
  mesh = _mesh(case)

  def held(spec, *sizes):
    where = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(sizes, np.int32, sharding=where)

  with jax.default_device(mesh.devices.flat[0]):
    models, _, sampling, _ = _arguments(case, mesh)
    arguments = held(ROWS, 2, 64), *[held(ROWS, 2)] * 3, held(WHOLE, 5)
    compiled = chips.compile_program(
      jax.jit(prefill, static_argnames="capacity"),
      *(models, *arguments, sampling),
      capacity=64,
    )
  assert compiled.output_shardings.tokens.spec == ROWS

"""Device time of one step, inside one loop whose steps need each other."""

import dataclasses
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from d2sd_jax.decoding.placement import WHOLE, spread
from d2sd_jax.errors import require
from d2sd_jax.kernels.device import compiler_options

# Takes models, what the step before returned, and inputs that stay.
Step = Callable[[Any, Any, Any], Any]
# What a compiled program calls when a kernel of ours, or cuDNN's, is in it, or
# an exchange.
_OWN = ("lone_node", "lone_row", "few_rows", "streamed")
_MARKS = {
  "cudnn": "cudnn",
  "mosaic_gpu": "cascade_attention",
  "mosaic_tpu": "tpu_custom_call",
  **{name: name for name in (*_OWN, "all-reduce", "all-gather")},
}
# What devices exchange; where it waits somewhere else, it is but started.
_COLLECTIVES = re.compile(r"\s(all-reduce|all-gather)(?:-start)?\(")


@dataclasses.dataclass(frozen=True)
class Use:
  """What a step should run: an implementation so many times, for a name."""

  name: str
  implementation: str
  times: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """Milliseconds of a step.

  Attributes:
    times: of every repeat; see `time_marginally`.
    steps: how many were timed in each of them.
    call: milliseconds of a call beside its steps.
    compile_seconds: which are not part of any time.
    custom_calls: how often the compiled program calls each kernel, by name.
    collectives: how many exchanges between devices a step has, by their kind.
  """

  times: tuple[float, ...]
  steps: int
  call: float
  compile_seconds: float
  custom_calls: Mapping[str, int]
  collectives: Mapping[str, int] = dataclasses.field(default_factory=dict)

  @property
  def median(self) -> float:
    """What counts."""
    return statistics.median(self.times)

  def record(self) -> dict[str, Any]:
    """As it is written to a file."""
    exchanged = {"collectives": dict(self.collectives)}
    return {
      "median_ms": self.median,
      "least_ms": min(self.times),
      "most_ms": max(self.times),
      "repeats": len(self.times),
      "steps": self.steps,
      "call_ms": self.call,
      "compile_seconds": self.compile_seconds,
      "custom_calls": dict(sorted(self.custom_calls.items())),
      **(exchanged if self.collectives else {}),
    }

  def check_ran(self, uses: Sequence[Use]) -> None:
    """Raises `RuntimeError` where the program does not call what it should.

    Each kernel or exchange as often as all its uses do, or more: XLA may have
    merged some or left some out. And no kernel of ours that has no use. What
    XLA makes of the rest has no name.

    Args:
      uses: all of the step's.
    """
    calls = {**self.custom_calls, **self.collectives}
    for name, mark in _MARKS.items():
      own = [use for use in uses if use.implementation == name]
      wanted = sum(use.times for use in own)
      called = sum(n for call, n in calls.items() if mark in call)
      if called < wanted or (called and not own and name in _OWN):
        told = ", ".join(use.name for use in own) or "nothing"
        raise RuntimeError(
          f"{told} should run {name}, {wanted} times in all, but the compiled"
          f" program calls it {called} times"
        )


def check_seconds(seconds: float) -> None:
  """A `UsageError` unless `time_marginally` can take so long."""
  require(0 < seconds <= 60, "seconds", seconds, "above 0, and 60 at most")


def time_marginally(
  call: Callable[[int], float], *, repeats: int, seconds: float
) -> tuple[tuple[float, ...], int, float]:
  """Seconds of a step, as what more steps add to a call of one.

  A call costs something before its first step: on a GPU some milliseconds, in
  which its CUDA graphs are made ready. Divided among a call's steps, that would
  be a part of each, and more of it the fewer they are.

  Args:
    call: runs so many steps, one or more, and returns the seconds they took.
    repeats: calls of one step, and as many of more.
    seconds: about how much longer the latter take, half of it at least.

  Returns:
    Seconds of a step for each longer call, over the median of those of one
    step; the steps that it has more; the seconds of a call beside its steps.

  Raises:
    UsageError: see `check_seconds`.
  """
  check_seconds(seconds)
  # The first calls of a program make ready what later ones find.
  call(1)
  call(1)
  steps = 1
  while True:
    pairs = [(call(1), call(1 + steps)) for _ in range(repeats)]
    one = statistics.median(short for short, _ in pairs)
    gains = [long - one for _, long in pairs]
    # A call that was held up says nothing of how many steps are enough.
    if min(gains) >= seconds / 2:
      break
    wanted = seconds / max(min(gains), seconds / 8)
    steps = math.ceil(steps * wanted)
  times = tuple(gain / steps for gain in gains)
  return times, steps, one - statistics.median(times)


def time_step(
  step: Step,
  models: Any,
  carry: Any,
  inputs: Any,
  *,
  repeats: int,
  seconds: float,
  mesh: Mesh | None = None,
  specs: tuple[Any, Any, Any] = (WHOLE, WHOLE, WHOLE),
) -> Timing:
  """Times `step`, called again and again on its own result.

  Carry and inputs pass a barrier before every step, so that XLA can neither
  take work out of the loop nor leave any out.

  Args:
    step: `(models, carry, inputs) -> carry`.
    models: weights, the same in every step, as in a decode loop.
    carry: what the first step gets; donated.
    inputs: what all steps get.
    repeats: see `time_marginally`.
    seconds: see there.
    mesh: on whose devices the whole loop runs in one `shard_map`; `step` then
      gets each device's part. `None` is one device.
    specs: `PartitionSpec`s of models, carry and inputs on the mesh.
  """

  def loop(models, carry, inputs, count):
    def once(_, carry):
      carry, held = jax.lax.optimization_barrier((carry, inputs))
      return step(models, carry, held)

    return jax.lax.fori_loop(0, count, once, carry)

  def counted(steps: int) -> jax.Array:
    # On all devices, or every call would begin with its way there.
    place = None if mesh is None else NamedSharding(mesh, WHOLE)
    return jax.block_until_ready(jax.device_put(jnp.int32(steps), place))

  everywhere = spread(loop, mesh, (*specs, WHOLE), specs[1])
  compiling = jax.jit(everywhere, donate_argnums=1)
  start = time.perf_counter()
  program = compiling.lower(models, carry, inputs, counted(1)).compile(
    compiler_options=compiler_options(one_device=mesh is None)
  )
  compile_seconds = time.perf_counter() - start

  def call(steps: int) -> float:
    nonlocal carry
    count = counted(steps)
    start = time.perf_counter()
    carry = jax.block_until_ready(program(models, carry, inputs, count))
    return time.perf_counter() - start

  jax.block_until_ready((models, carry, inputs))
  times, steps, beside = time_marginally(call, repeats=repeats, seconds=seconds)
  hlo = program.as_text() or ""
  return Timing(
    times=tuple(1e3 * time for time in times),
    steps=steps,
    call=1e3 * beside,
    compile_seconds=compile_seconds,
    custom_calls=custom_calls(hlo),
    collectives=Counter(_COLLECTIVES.findall(hlo)),
  )


def custom_calls(hlo: str) -> Counter[str]:
  """How often a compiled program calls each kernel that has a name.

  All of Triton's kernels are one target, and all of Mosaic GPU's: those are
  told by their own names.

  Args:
    hlo: the program's text.
  """
  called: Counter[str] = Counter()
  for line in hlo.splitlines():
    if target := re.search(r'custom_call_target="([^"]+)"', line):
      own = re.search(r'op_name="[^"]*/(\w+)/(?:pallas_call|mpmd_map)"', line)
      ours = own if re.search("triton|mosaic_gpu", target[1]) else None
      called[(ours or target)[1]] += 1
  return called

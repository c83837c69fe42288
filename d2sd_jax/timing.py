"""Device time of one step, inside one loop whose steps need each other."""

import dataclasses
import functools
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# Takes models, what the step before returned, and inputs that stay.
Step = Callable[[Any, Any, Any], Any]
# What a compiled program holds when a kernel of ours, or cuDNN's, is in it.
_MARKS = {
  "cudnn": "cudnn",
  "mosaic_gpu": "mosaic_gpu",
  "mosaic_tpu": "tpu_custom_call",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """Milliseconds of a step.

  Attributes:
    times: of every timed call, divided by its steps.
    steps: in one timed call.
    compile_seconds: which are not part of any time.
    custom_calls: names of the kernels in the compiled program.
  """

  times: tuple[float, ...]
  steps: int
  compile_seconds: float
  custom_calls: tuple[str, ...]

  @property
  def median(self) -> float:
    """What counts."""
    return statistics.median(self.times)

  def record(self) -> dict[str, Any]:
    """As it is written to a file."""
    return {
      "median_ms": self.median,
      "least_ms": min(self.times),
      "most_ms": max(self.times),
      "repeats": len(self.times),
      "steps": self.steps,
      "compile_seconds": self.compile_seconds,
      "custom_calls": list(self.custom_calls),
    }

  def check_ran(self, implementations: Mapping[str, str]) -> None:
    """Raises `RuntimeError` where a kernel is not in the program.

    Args:
      implementations: what should be there, by what it is for.
    """
    for use, name in implementations.items():
      mark = _MARKS.get(name, "")
      if not any(mark in call for call in (*self.custom_calls, "")):
        raise RuntimeError(
          f"{use} should run {name}, but the compiled program calls"
          f" {', '.join(self.custom_calls) or 'no kernel'}"
        )


def time_step(
  step: Step,
  models: Any,
  carry: Any,
  inputs: Any,
  *,
  repeats: int,
  seconds: float,
) -> Timing:
  """Times `step`, called again and again on its own result.

  Carry and inputs pass a barrier before every step, so that XLA can neither
  take work out of the loop nor leave any out. Two calls go before the first
  timed one.

  Args:
    step: `(models, carry, inputs) -> carry`.
    models: weights, the same in every step, as in a decode loop.
    carry: what the first step gets; donated.
    inputs: what all steps get.
    repeats: timed calls.
    seconds: about how long each of them lasts.
  """

  @functools.partial(jax.jit, donate_argnames="carry")
  def loop(models, carry, inputs, count):
    def once(_, carry):
      carry, held = jax.lax.optimization_barrier((carry, inputs))
      return step(models, carry, held)

    return jax.lax.fori_loop(0, count, once, carry)

  start = time.perf_counter()
  program = loop.lower(models, carry, inputs, jnp.int32(1)).compile()
  compile_seconds = time.perf_counter() - start

  def call(steps: int) -> float:
    nonlocal carry
    count = jax.block_until_ready(jnp.int32(steps))
    start = time.perf_counter()
    carry = jax.block_until_ready(program(models, carry, inputs, count))
    return time.perf_counter() - start

  jax.block_until_ready((models, carry, inputs))
  call(1)
  steps = max(1, math.ceil(seconds / call(1)))
  return Timing(
    times=tuple(1e3 * call(steps) / steps for _ in range(repeats)),
    steps=steps,
    compile_seconds=compile_seconds,
    custom_calls=_custom_calls(program.as_text() or ""),
  )


def _custom_calls(hlo: str) -> tuple[str, ...]:
  """The names of what a compiled program calls, each once."""
  return tuple(sorted(set(re.findall(r'custom_call_target="([^"]+)"', hlo))))

"""The loop over cycles: to the end, or a few cycles at a time to stream."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from d2sd_jax.config import TreeConfig
from d2sd_jax.decoding.cycle import decode_cycle
from d2sd_jax.decoding.placement import WHOLE, model_specs, spread
from d2sd_jax.decoding.policies import POLICIES
from d2sd_jax.decoding.state import DecodeState, Models, state_specs
from d2sd_jax.errors import require
from d2sd_jax.sampling import Sampling
from d2sd_jax.typing import Array, Int


@functools.partial(
  jax.jit, static_argnames=("mode", "config"), donate_argnames="state"
)
def generate(
  models: Models,
  state: DecodeState,
  sampling: Sampling,
  max_cycles: Int[Array, ""] | int,
  *,
  mode: str,
  config: TreeConfig,
) -> DecodeState:
  """Runs cycles until every row has finished, or `max_cycles` more were run.

  One `while_loop` on the device, without a word to the host. All of
  `sampling` and `max_cycles` are traced: one program serves plain generation
  and streaming, every seed and every temperature.

  Args:
    models: target and at least the drafters the mode uses.
    state: from `prefill` or an earlier call; donated.
    sampling: how the target chooses; the same as for `prefill`.
    max_cycles: cycles to run at most.
    mode: a key of `POLICIES`.
    config: static sizes of the tree; ignored by `ar`.

  Returns:
    The state after the last cycle.

  Raises:
    UsageError: the mode is unknown or needs other drafters.
  """
  policy = POLICIES[check_mode(mode, models)]
  models, specs = models.fused(), state_specs(models)

  def run(models, state, sampling, max_cycles):
    last = state.num_cycles + max_cycles

    def go_on(loop):
      unfinished, state = loop
      return unfinished & (state.num_cycles < last)

    def cycle(loop):
      state = decode_cycle(
        models, loop[1], sampling, policy=policy, config=config
      )
      return models.any(~state.finished), state

    loop = models.any(~state.finished), state
    return jax.lax.while_loop(go_on, cycle, loop)[1]

  everywhere = spread(
    run, models.mesh, (model_specs(models), specs, WHOLE, WHOLE), specs
  )
  return everywhere(models, state, sampling, jnp.int32(max_cycles))


def stream(
  models: Models,
  state: DecodeState,
  sampling: Sampling,
  *,
  mode: str,
  config: TreeConfig,
  cycles_per_step: int = 1,
) -> Iterator[DecodeState]:
  """Yields the state after every few cycles of the very same program.

  Read what you need of a state before asking for the next: its buffers are
  donated to the following step.

  Args:
    models: as for `generate`.
    state: as for `generate`.
    sampling: as for `generate`.
    mode: as for `generate`.
    config: as for `generate`.
    cycles_per_step: cycles between two states.

  Yields:
    The state, the last time with every row finished.
  """
  steps = jnp.int32(cycles_per_step)
  while not bool(state.finished.all()):
    state = generate(models, state, sampling, steps, mode=mode, config=config)
    yield state


def check_mode(mode: str, models: Models) -> str:
  """Returns `mode`; a `UsageError` where it or its drafters do not fit."""
  require(mode in POLICIES, "mode", mode, f"one of {', '.join(POLICIES)}")
  needed, given = POLICIES[mode].num_drafters, len(models.drafters)
  require(
    given == needed, "models.drafters", given, f"{needed} for mode {mode}"
  )
  return mode

"""Which device a program is traced for, and what suits it."""

import contextlib
import contextvars
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

from d2sd_jax.typing import Array

# What JAX calls them, by release and maker.
GPUS = ("cuda", "gpu", "rocm")
_SCHEDULING = "xla_gpu_command_buffer_scheduling_mode"
_GRAPHS = "xla_gpu_enable_command_buffer"
# XLA's default, and with it what devices exchange.
_IN_GRAPHS = (
  "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,COLLECTIVES"
)
_interpreted = contextvars.ContextVar("interpreted", default=False)


def target_device() -> jax.Device:
  """The device that what is being traced will run on.

  That is JAX's default device. `with jax.default_device(device)` makes it
  another, also one of a topology that is not there: so programs are compiled
  ahead of time.
  """
  chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
  if chosen is None or isinstance(chosen, str):
    return jax.devices(chosen)[0]
  return chosen


def runs_tpu_kernels() -> bool:
  """Whether a Pallas TPU kernel can run where this is traced."""
  return _interpreted.get() or target_device().platform == "tpu"


def stores_transposed() -> bool:
  """Whether matrices are better stored `[out, in]` where this is traced.

  A GPU then multiplies one row in one kernel, which sums along the matrix's
  rows; stored `[in, out]`, XLA writes all products out before it sums them.
  With many rows both take the same. A CPU is slower with the former.
  """
  return target_device().platform in GPUS


def compiler_options(*, one_device: bool) -> dict[str, Any]:
  """What XLA is told where decoding is compiled.

  On one GPU, that kernels of a CUDA graph that do not need each other may
  overlap: a cycle of small kernels takes 5 % less. On several of one process,
  that their messages are part of the graphs. (docs/performance.md has both.)
  Said otherwise in `XLA_FLAGS`, that holds.

  Args:
    one_device: whether the program is of one device alone.
  """
  processes = 1 if one_device else jax.process_count()
  if target_device().platform not in GPUS or processes > 1:
    return {}
  option = _SCHEDULING if one_device else _GRAPHS
  if option in os.environ.get("XLA_FLAGS", ""):
    return {}
  return {option: "CONCURRENT" if one_device else _IN_GRAPHS}


def in_hbm(x: Array) -> Array:
  """Keeps a kernel's operand in main memory, read block by block.

  Left alone, XLA may fetch all of a cache into a TPU's VMEM ahead of a kernel
  that needs a few blocks of it.
  """
  return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def is_transposed(head_dim: int) -> bool:
  """Whether a TPU holds a cache `[B, J, S, H]` with S innermost.

  Its arrays are tiled by 128 in the innermost dimension, and XLA chooses the
  order that wastes less. Kernels must read a cache as it lies, or it is copied.

  Args:
    head_dim: H.
  """
  return head_dim % 128 != 0


@contextlib.contextmanager
def tpu_interpreter(params: pltpu.InterpretParams) -> Iterator[None]:
  """Runs the TPU kernels that are traced inside on a CPU, slowly.

  Args:
    params: of Pallas's interpreter, which plays the TPU's memories and DMAs.
  """
  token = _interpreted.set(True)
  try:
    # It is part of the key of every `jit`, so traces are not shared.
    with pltpu.force_tpu_interpret_mode(params):
      yield
  finally:
    _interpreted.reset(token)

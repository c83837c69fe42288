"""Pallas kernels for NVIDIA GPUs that Triton compiles, and whether they run.

For small kernels, where launches count and not every cycle. JAX means to drop
this part of Pallas: without it XLA's own kernels run, as on other devices.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental import pallas as pl

from d2sd_jax.kernels.device import target_device

try:
  from jax.experimental.pallas import triton as language
except ImportError:
  language = None  # type: ignore[assignment]

DEVICE = "an NVIDIA GPU of Ampere or newer, and a JAX with Pallas for Triton"
_interpreted = contextvars.ContextVar("interpreted", default=False)


def runs_here() -> bool:
  """Whether such a kernel can run where this is traced: NVIDIA, from Ampere on.

  Kernels have no gradient but where they say so: they are decoding's.
  """
  # ROCm names architectures here, such as gfx942.
  capability = str(getattr(target_device(), "compute_capability", ""))
  ampere = capability[:1].isdigit() and float(capability) >= 8
  return language is not None and (ampere or _interpreted.get())


def call(
  kernel: Callable[..., None], *, warps: int, stages: int = 1, **options: Any
) -> Callable[..., Any]:
  """`pallas_call` by Triton.

  Args:
    kernel: a function of refs.
    warps: of each program.
    stages: steps of a loop that are loaded ahead.
    **options: of `pallas_call`.
  """
  return pl.pallas_call(
    kernel,
    compiler_params=language.CompilerParams(num_warps=warps, num_stages=stages),
    interpret=_interpreted.get(),
    **options,
  )


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
  """Runs the kernels that are traced inside on a CPU, by Pallas's interpreter.

  What `jit` has traced outside stays as it is: see `jax.clear_caches`.
  """
  token = _interpreted.set(True)
  try:
    yield
  finally:
    _interpreted.reset(token)

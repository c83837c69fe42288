"""Pallas kernels for NVIDIA GPUs that Triton compiles, and whether they run.

For small kernels, where launches count and not every cycle. JAX means to drop
this part of Pallas: without it XLA's own kernels run, as on other devices.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax.experimental import pallas as pl

from d2sd_jax.kernels.device import target_device

try:
  from jax.experimental.pallas import triton as language
except ImportError:
  language = None  # type: ignore[assignment]

DEVICE = "an NVIDIA GPU of Ampere or newer, and a JAX with Pallas for Triton"
# Of a pass that such kernels serve. More are a prefill's: few launches for much
# work.
MOST_ROWS = 128
_F = TypeVar("_F", bound=Callable[..., Any])
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


def lowered_once(*static: str) -> Callable[[_F], _F]:
  """For functions that call a kernel: calls of one kind share its lowering.

  All layers of a model do. Each would take 0.03 s, and a step has hundreds.

  Args:
    *static: arguments that are no arrays.
  """

  def wrap(function: _F) -> _F:
    # What the interpreter has traced is not for a device. JAX tells functions
    # by identity, so each has a copy.
    copies = {
      by_hand: jax.jit(functools.partial(function), static_argnames=static)
      for by_hand in (False, True)
    }

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
      return copies[_interpreted.get()](*args, **options)

    return call  # type: ignore[return-value]

  return wrap


def pieces(width: int, most: int) -> Iterator[tuple[int, int]]:
  """First elements and sizes, powers of two, as Triton's loads are.

  Args:
    width: elements of a row.
    most: of a piece, a power of two.
  """
  start = 0
  while start < width:
    count = min(most, 1 << (width - start).bit_length() - 1)
    yield start, count
    start += count


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

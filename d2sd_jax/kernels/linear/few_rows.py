"""A few rows times a small matrix on Hopper, with what comes before and after.

For small targets and for drafters, whose products last no longer than a launch:
XLA splits them, and takes kernels of their own for the sum's end, the norm and
the gate. `few_rows_kernel` does all of it in one.
"""

import dataclasses

import jax.numpy as jnp

from d2sd_jax.kernels import hopper
from d2sd_jax.kernels.quantized import QuantizedMatrix
from d2sd_jax.kernels.transposed import Transposed
from d2sd_jax.typing import Array, Float

DTYPES = ("bfloat16",)
MOST_ROWS = 128
# Elements of a matrix up to which it is the default.
MOST_ELEMENTS = 2**22
# Rows of `x` move by eight, as tiles of shared memory do.
CHUNK = 8
# Columns of a step. The copy of a norm takes no more than 256 times as many.
COLUMNS = 64
MOST_COLUMNS = 256 * COLUMNS


@dataclasses.dataclass(frozen=True)
class Plan:
  """How the work is cut.

  Attributes:
    strip: rows of each part of the stored matrix to a block, a multiple of 16.
    rows: rows of `x` to a block, a multiple of `CHUNK`, at most 64.
    warpgroups: they take turns with the columns, and their sums are added.
    stages: steps of a warpgroup whose operands are in shared memory at once.
    registers: whether normed rows go to the tensor cores from registers, as
      they should, or through shared memory, as Pallas' interpreter needs it.
  """

  strip: int
  rows: int
  warpgroups: int
  stages: int
  registers: bool = True


def why_not(x: Array, matrix: Array | Transposed) -> str | None:
  """What the kernel asks for that is not so, or `None`.

  Args:
    x: as for `api.linear`.
    matrix: as for `api.linear`.
  """
  if not hopper.runs_here():
    return "an NVIDIA GPU of compute capability 9.x, and jax 0.11 or newer"
  if not isinstance(matrix, Transposed):
    return "a matrix stored [out, in]"
  if isinstance(matrix.stored, QuantizedMatrix):
    return "a matrix that is not quantized"
  if {x.dtype.name, matrix.stored.dtype.name} - set(DTYPES):
    return f"rows and a matrix of {', '.join(DTYPES)}"
  if not 0 < x.size <= MOST_ROWS * x.shape[-1]:
    return f"1 to {MOST_ROWS} rows"
  if x.shape[-1] % COLUMNS or x.shape[-1] > MOST_COLUMNS:
    return f"rows of a multiple of {COLUMNS}, at most {MOST_COLUMNS}"
  # Halves of a gated product are strips, too.
  if matrix.stored.shape[0] % 32:
    return "a matrix stored as a multiple of 32 rows"
  return None


def wins(x: Array, matrix: Array | Transposed, *, gated: bool = False) -> bool:
  """Whether this is the default: where it can run, and the matrix is small.

  Args:
    x: as for `api.linear`.
    matrix: as for `api.linear`.
    gated: makes no difference.
  """
  if why_not(x, matrix) is not None:
    return False
  whole_chunks = x.size % (CHUNK * x.shape[-1]) == 0
  return whole_chunks and matrix.stored.size <= MOST_ELEMENTS  # type: ignore[union-attr]


def linear(
  x: Float[Array, "... D"],
  stored: Float[Array, "out D"],
  norm: Float[Array, " D"] | None = None,
  eps: float = 0.0,
  gated: bool = False,
  residual: Float[Array, "... out"] | None = None,
  *,
  plan: Plan | None = None,
  interpret: object = None,
) -> Float[Array, "... out"]:
  """See `api.linear`.

  Args:
    x: at most `MOST_ROWS` rows.
    stored: the matrix, transposed.
    norm: see there; rounded to `x`'s dtype.
    eps: see there.
    gated: see there.
    residual: see there; rounded to `x`'s dtype.
    plan: `None` chooses one by the shapes.
    interpret: `InterpretGPUParams` runs the kernel on a CPU.

  Returns:
    As many rows, in `x`'s dtype.
  """
  parts, width = 2 if gated else 1, x.shape[-1]
  size, count = stored.shape[0] // parts, x.size // width
  plan = plan or choose_plan(count, size, width, parts)
  if interpret is not None:
    plan = dataclasses.replace(plan, registers=False)

  def lying(array, *shape):
    return None if array is None else array.astype(x.dtype).reshape(shape)

  def rows(array, width):
    array = lying(array, count, width)
    missing = ((0, -count % CHUNK), (0, 0))
    return None if array is None else jnp.pad(array, missing)

  operands = (
    *(rows(x, width), lying(stored, parts, size, width)),
    *(lying(norm, width), rows(residual, size)),
  )
  # Pallas Mosaic is imported where it runs: few do, and it moves fast.
  from d2sd_jax.kernels.linear import few_rows_kernel

  out = few_rows_kernel.multiply(*operands, plan, eps=eps, interpret=interpret)
  return out[:count].reshape(*x.shape[:-1], size)


def choose_plan(count: int, size: int, width: int, parts: int) -> Plan:
  """The plan for operands of these sizes on a whole H100 or H200.

  Args:
    count: rows of `x`.
    size: columns of the result.
    width: columns of `x`.
    parts: 2 if gated, else 1.
  """
  steps, tiles = width // COLUMNS, -(-count // 64)
  # More blocks than multiprocessors would take turns.
  many = size // 16 * tiles > hopper.MULTIPROCESSORS
  strip = 32 if many and size % 32 == 0 else 16
  chunks = -(-count // CHUNK)
  # Each block reads its rows whole: the fewer, the sooner.
  enough = hopper.MULTIPROCESSORS // (size // strip)
  tiles = max(tiles, min(chunks, enough))
  rows = -(-chunks // tiles) * CHUNK
  # A step takes longer than its bytes.
  warpgroups = max(1, min(4, steps // 4))
  step = COLUMNS * 2 * (64 + parts * strip)
  # Of shared memory, a little is for the rest and for the system.
  left = (warpgroups - 1) * 64 * 4 * (parts * strip + 1)
  room = hopper.SHARED_MEMORY - 4096 - 64 * strip * 2 - width * 2 - left
  return Plan(
    strip=strip,
    rows=rows,
    warpgroups=warpgroups,
    stages=min(-(-steps // warpgroups), room // step // warpgroups),
  )

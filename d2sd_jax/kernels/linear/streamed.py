"""A few rows times a large matrix on Hopper: the matrix is streamed once.

For drafts and verification of models whose weights bind. XLA splits such
products among blocks and sums the parts in another kernel, and another one
gates them; `streamed_kernel` does it in one. The norm goes before: its weights
would have to be in shared memory, where wgmma reads the rows.
"""

import dataclasses

import jax.numpy as jnp

from d2sd_jax.kernels import hopper
from d2sd_jax.kernels.linear import few_rows
from d2sd_jax.kernels.quantized import QuantizedMatrix
from d2sd_jax.kernels.rms_norm import decoding_norm
from d2sd_jax.kernels.transposed import Transposed
from d2sd_jax.typing import Array, Float

MOST_ROWS = few_rows.MOST_ROWS
CHUNK = 8
# Rows of the matrix that a wgmma takes.
TILE = 64
# No block shares its tile with so few; 16 and more were timed.
_XLA_ROWS = CHUNK
# Of 16 to 80 two blocks to a multiprocessor took less than XLA or, with 64 rows
# of gate and up, as long; of 128 more.
_ROWS_OF_TWO = 96


@dataclasses.dataclass(frozen=True)
class Plan:
  """How the work is cut.

  Attributes:
    halves: 2 if two blocks share a tile of the matrix, half of its columns
      each; each of them then finishes half of `x`'s rows.
    columns: of a step, a multiple of 64.
    stages: steps whose operands are in shared memory at once.
  """

  halves: int
  columns: int
  stages: int


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
  if {x.dtype.name, matrix.stored.dtype.name} - set(few_rows.DTYPES):
    return f"rows and a matrix of {', '.join(few_rows.DTYPES)}"
  if not 0 < x.size <= MOST_ROWS * x.shape[-1]:
    return f"1 to {MOST_ROWS} rows"
  # Halves of a gated product are tiles, too.
  if x.shape[-1] % 64 or matrix.stored.shape[0] % (2 * TILE):
    return f"rows of 64 times any, and a multiple of {2 * TILE} of them stored"
  return None


def wins(x: Array, matrix: Array | Transposed, *, gated: bool = False) -> bool:
  """Whether this is the default: where it can run and was faster by much.

  That is for more rows than a chunk, and matrices that are not `few_rows`', of
  a quarter of a block to a whole one for each multiprocessor: of fewer some
  would idle, of more some wait for the others' second blocks. With not too many
  rows it is up to two, side by side.

  Args:
    x: as for `api.linear`.
    matrix: as for `api.linear`.
    gated: as for `api.linear`; a block then has a tile of each half.
  """
  if why_not(x, matrix) is not None:
    return False
  stored: Array = matrix.stored  # type: ignore[union-attr]
  count = x.size // x.shape[-1]
  blocks = stored.shape[0] // (TILE * (2 if gated else 1))
  most = hopper.MULTIPROCESSORS * (2 if count <= _ROWS_OF_TWO else 1)
  one_wave = hopper.MULTIPROCESSORS <= 4 * blocks <= 4 * most
  large = stored.size > few_rows.MOST_ELEMENTS
  return large and one_wave and count > _XLA_ROWS


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
    norm: see there.
    eps: see there.
    gated: see there.
    residual: see there; rounded to `x`'s dtype.
    plan: `None` chooses one by the shapes.
    interpret: `InterpretGPUParams` runs the kernel on a CPU, in clusters of one
      block.

  Returns:
    As many rows, in `x`'s dtype.
  """
  from d2sd_jax.kernels.linear import streamed_kernel

  x = x if norm is None else decoding_norm(x, norm, eps)
  parts, width = 2 if gated else 1, x.shape[-1]
  size, count = stored.shape[0] // parts, x.size // width
  padded = -(-count // CHUNK) * CHUNK
  plan = plan or choose_plan(padded, size, width, parts)

  def rows(array, width):
    array = array.astype(x.dtype).reshape(count, width)
    return jnp.pad(array, ((0, padded - count), (0, 0)))

  out = streamed_kernel.multiply(
    rows(x, width),
    stored.reshape(parts, size, width),
    None if residual is None else rows(residual, size),
    plan,
    interpret=interpret,
  )
  return out[:count].reshape(*x.shape[:-1], size)


def choose_plan(count: int, size: int, width: int, parts: int) -> Plan:
  """The plan for operands of these sizes on a whole H100 or H200.

  Args:
    count: rows of `x`, in whole chunks.
    size: columns of the result.
    width: columns of `x`.
    parts: 2 if gated, else 1.
  """
  blocks = size // TILE
  idle = 2 * blocks <= hopper.MULTIPROCESSORS
  halves = 2 if idle and count > CHUNK and width % 128 == 0 else 1
  each = 2 if 1 < blocks / hopper.MULTIPROCESSORS <= 2 else 1
  # Of shared memory, a little is for barriers and for the system.
  left = ((halves - 1) * parts * 4 + 2) * TILE * half_sizes(count, halves)[0]
  left += 2048
  for columns in (128, 64) if width % (halves * 128) == 0 else (64,):
    step = columns * 2 * (parts * TILE + count)
    stages = (hopper.SHARED_MEMORY // each - left) // step
    stages = min(stages, width // (halves * columns))
    if stages >= 3:
      break
  return Plan(halves=halves, columns=columns, stages=stages)


def half_sizes(count: int, halves: int) -> list[int]:
  """Rows of `x` in each of them: whole chunks, the first no fewer."""
  first = -(-count // (halves * CHUNK)) * CHUNK
  return [first, count - first][:halves]

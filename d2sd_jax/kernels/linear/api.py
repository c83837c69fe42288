"""The public operation: semantics and dispatch."""

from typing import Any

import jax
import jax.numpy as jnp

from d2sd_jax.errors import require
from d2sd_jax.kernels.dot import matmul
from d2sd_jax.kernels.linear import few_rows, lone_row, streamed
from d2sd_jax.kernels.rms_norm import decoding_norm, rms_norm
from d2sd_jax.kernels.transposed import Transposed
from d2sd_jax.typing import Array, Float

# Kernels of our own; the others' products are XLA's.
_KERNELS: dict[str, Any] = {
  "lone_row": lone_row,
  "few_rows": few_rows,
  "streamed": streamed,
}
IMPLEMENTATIONS = (*_KERNELS, "xla")


def linear(
  x: Float[Array, "... D"],
  matrix: Float[Array, "D out"] | Transposed,
  *,
  norm: Float[Array, " D"] | None = None,
  eps: float = 0.0,
  gated: bool = False,
  residual: Float[Array, "... out"] | None = None,
  implementation: str | None = None,
) -> Float[Array, "... out"]:
  """`residual + rms_norm(x) @ matrix`; if gated, `silu(g) * u` of the product.

  Args:
    x: rows.
    matrix: as stored by `as_stored`; int8 too.
    norm: weights of the rows' norm; `None` is none.
    eps: of the norm.
    gated: the product's first half, g, gates its second half, u.
    residual: added to the result; `None` is nothing.
    implementation: one of `IMPLEMENTATIONS`; `None` chooses by device, dtype
      and sizes. Only `xla` has a gradient, and what is chosen for a matrix that
      is not transposed: all else is for decoding.

  Returns:
    As wide as the matrix, or half as wide if `gated`, in `x`'s dtype.

  Raises:
    UsageError: no such implementation, or one that cannot run this.
    TypeError, ValueError: the shapes do not fit each other.
  """
  name = implementation or default_implementation(x, matrix, gated=gated)
  require(name in IMPLEMENTATIONS, "implementation", name, str(IMPLEMENTATIONS))
  if name in _KERNELS:
    kernel = _KERNELS[name]
    reason = kernel.why_not(x, matrix)
    require(reason is None, "implementation", name, f"{reason} for it")
    stored = matrix.stored  # type: ignore[union-attr]
    return kernel.linear(x, stored, norm, eps, gated, residual)
  if norm is not None:
    # A matrix that is not transposed may be in training.
    decoding = implementation is None and isinstance(matrix, Transposed)
    x = (decoding_norm if decoding else rms_norm)(x, norm, eps)
  y = matmul("...d,do->...o", x, matrix)
  if gated:
    gate, up = jnp.split(y, 2, axis=-1)
    y = jax.nn.silu(gate) * up
  return y if residual is None else (residual + y).astype(x.dtype)


def default_implementation(
  x: Array, matrix: Array | Transposed, *, gated: bool = False
) -> str:
  """What runs where none is forced: a kernel that wins here, or `xla`.

  Args:
    x: as for `linear`; shapes and dtypes are enough.
    matrix: likewise.
    gated: as for `linear`.
  """
  for name, kernel in _KERNELS.items():
    if kernel.wins(x, matrix, gated=gated):
      return name
  return "xla"

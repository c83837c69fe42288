"""Matrices stored `[out, in]`, for devices that sum along rows."""

import dataclasses
from typing import Any

import jax

from d2sd_jax.kernels.device import stores_transposed
from d2sd_jax.typing import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Transposed:
  """Stands for a matrix `[in, out]`; see `matmul`.

  Attributes:
    stored: its transpose: an array, or a `QuantizedMatrix`.
  """

  stored: Any


def as_stored(matrix: Float[Array, "in out"]) -> Any:
  """The matrix, in the order that suits the device this is traced for."""
  return Transposed(stored=matrix.T) if stores_transposed() else matrix

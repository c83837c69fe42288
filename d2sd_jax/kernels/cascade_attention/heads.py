"""Heads that lie among others in one array, for a kernel to read in place."""

import dataclasses

import jax
import jax.numpy as jnp

from d2sd_jax.typing import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
  """Stands for `array[..., first : first + count, :]`.

  A product yields queries, keys and values side by side. Taking them apart is
  a copy where what reads them is a kernel of its own, and a launch.

  Attributes:
    array: `[..., heads, H]`.
    first: the first head that is meant.
    count: how many are.
  """

  array: Float[Array, "*positions heads H"]
  first: int = dataclasses.field(metadata={"static": True})
  count: int = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the heads that are meant."""
    return (*self.array.shape[:-2], self.count, self.array.shape[-1])

  @property
  def dtype(self) -> jnp.dtype:
    """Of the array."""
    return self.array.dtype

  def taken(self) -> Float[Array, "*positions count H"]:
    """The heads as an array of their own."""
    return self.array[..., self.first : self.first + self.count, :]


def taken(
  x: Float[Array, "*positions count H"] | Heads,
) -> Float[Array, "*positions count H"]:
  """An array, or heads as one."""
  return x.taken() if isinstance(x, Heads) else x


def in_place(x: Float[Array, "*positions count H"] | Heads) -> Heads:
  """Heads, or all of an array's."""
  if isinstance(x, Heads):
    return x
  return Heads(array=x, first=0, count=x.shape[-2])

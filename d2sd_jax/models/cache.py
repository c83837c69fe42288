"""The key/value cache: one array per layer, filled to a length kept elsewhere.

Rows past a sequence's length are garbage that the length hides; they are
always finite, because caches start at zero and only finite rows are written.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from einops import rearrange

from d2sd_jax.kernels import write_all
from d2sd_jax.kernels.device import runs_tpu_kernels
from d2sd_jax.kernels.write_rows import fits, write_rows
from d2sd_jax.typing import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
  """Keys and values, a tuple with one array per layer.

  The new keys and values a model returns have the same form, with S the
  number of new rows.
  """

  keys: tuple[Float[Array, "B J S H"], ...]
  values: tuple[Float[Array, "B J S H"], ...]

  @classmethod
  def zeros(
    cls,
    num_layers: int,
    shape: tuple[int, int, int, int],
    dtype: jax.typing.DTypeLike,
  ) -> "KVCache":
    """An empty cache; `shape` is `(B, J, S, H)`."""
    layers = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))
    return cls(keys=layers(), values=layers())

  @classmethod
  def from_layers(
    cls,
    layers: Iterable[tuple[Float[Array, "B T J H"], Float[Array, "B T J H"]]],
  ) -> "KVCache":
    """New rows as the layers computed them, tokens before heads."""
    pairs = [
      [rearrange(x, "b t j h -> b j t h") for x in pair] for pair in layers
    ]
    keys, values = zip(*pairs, strict=True) if pairs else ((), ())
    return cls(keys=tuple(keys), values=tuple(values))

  def layer(self, i: int) -> tuple[Array, Array]:
    """Keys and values of layer i."""
    return self.keys[i], self.values[i]

  def __len__(self) -> int:
    """Number of layers."""
    return len(self.keys)


def append(cache: KVCache, rows: KVCache, lengths: Int[Array, " B"]) -> KVCache:
  """Writes new rows behind each sequence's length.

  Args:
    cache: the cache; donate it, so that it is written in place.
    rows: the new rows, the same number for every sequence; `lengths` plus that
      number must not pass the capacity.
    lengths: rows already in use.

  Returns:
    The cache with the rows written; how many of them count is the caller's to
    remember.
  """
  return _write(cache, rows, None, lengths)


def commit_path(
  cache: KVCache,
  nodes: KVCache,
  path: Int[Array, "B P"],
  lengths: Int[Array, " B"],
) -> KVCache:
  """Appends the accepted path's keys and values, and no other node's.

  Args:
    cache: the cache; donate it.
    nodes: keys and values of all R nodes of the tree.
    path: node indices from the anchor down. Entries past the accepted ones may
      be anything: their rows land past the new length.
    lengths: rows already in use.

  Returns:
    The cache with one static slab of P rows written.
  """
  return _write(cache, nodes, path, lengths)


def _write(cache, rows, index, starts):
  """Writes rows `index`, all where that is `None`, from `starts` on."""
  if runs_tpu_kernels() and all(map(fits, cache.keys)):
    pairs = [
      write_rows(cache.layer(i), rows.layer(i), index, starts)
      for i in range(len(cache))
    ]
    keys, values = zip(*pairs, strict=True) if pairs else ((), ())
    return KVCache(keys=keys, values=values)
  held, new = (*cache.keys, *cache.values), (*rows.keys, *rows.values)
  if index is not None:
    at = index[:, None, :, None]
    new = [jnp.take_along_axis(x, at, axis=2) for x in new]
  write = write_all.write_all if write_all.fits(held, new) else _update_slices
  held = write(held, new, starts)
  return KVCache(keys=held[: len(cache)], values=held[len(cache) :])


def _update_slices(caches, rows, starts):
  """`write_all` in XLA: any capacity, and in place except on TPU."""

  def write(cache, rows):
    rows = rows.astype(cache.dtype)
    if len(cache) == 1:
      # Over several rows it is a scatter, which reads what it writes over.
      return jax.lax.dynamic_update_slice(cache, rows, (0, 0, starts[0], 0))
    at = lambda c, r, n: jax.lax.dynamic_update_slice(c, r, (0, n, 0))
    return jax.vmap(at)(cache, rows, starts)

  return tuple(map(write, caches, rows))

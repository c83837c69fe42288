"""One model over several devices: who holds what, and what they exchange.

Attention is split by query head and each device keeps the key heads that its
queries read; feed-forward networks are split by their inner width, embedding
and head by token. Activations are whole everywhere. So a layer exchanges two
sums, the embedding one, and a choice of a token one gather of a score and an
id a device.

Functions that run inside of a model take `axis`, the name of the mesh's axis
that it is split over, and do nothing of the kind where that is `None`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from d2sd_jax.config import DrafterConfig, TargetConfig
from d2sd_jax.errors import require
from d2sd_jax.sharding import TENSOR
from d2sd_jax.typing import Array, Float, Int


def check_split(
  config: TargetConfig | DrafterConfig, size: int, field: str = "mesh"
) -> None:
  """Raises `UsageError` unless so many devices can share the query heads."""
  heads = config.num_heads
  fitting = [n for n in range(1, heads + 1) if heads % n == 0]
  require(
    heads % size == 0,
    f"{field} axis {TENSOR}",
    size,
    f"a divisor of the {heads} query heads: {', '.join(map(str, fitting))}",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
  """What one of `size` devices holds of a model.

  Rows are those of the published tensors, `[out, in]`, in the device's own
  order; -1 is a row of zeros, which fills the last devices' shares up.

  Attributes:
    part: which of them, from 0.
    size: how many share the model.
  """

  config: TargetConfig | DrafterConfig
  part: int
  size: int

  @property
  def heads(self) -> np.ndarray:
    """Query heads."""
    count = self.config.num_heads // self.size
    return np.arange(self.part * count, (self.part + 1) * count)

  @property
  def key_heads(self) -> np.ndarray:
    """The key head of each group of query heads.

    All groups of all devices are equally large, as attention wants them. Where
    key heads and devices do not divide each other, a head's queries lie in
    several groups, and a device may hold it more than once.
    """
    shared = self.config.num_heads // self.config.num_kv_heads
    group = math.gcd(len(self.heads), shared)
    return self.heads[::group] // shared

  @property
  def query_rows(self) -> np.ndarray:
    """Rows of the queries' projection."""
    return self._head_rows(self.heads)

  @property
  def key_rows(self) -> np.ndarray:
    """Rows of the keys' projection, and of the values'."""
    return self._head_rows(self.key_heads)

  @property
  def inner_rows(self) -> np.ndarray:
    """Of a feed-forward network's inner width."""
    return self._equal(self.config.intermediate_size)

  @property
  def vocabulary_rows(self) -> np.ndarray:
    """Of the embedding and the head."""
    return self._equal(self.config.vocab_size)

  def _head_rows(self, heads: np.ndarray) -> np.ndarray:
    width = self.config.head_dim
    return (heads[:, None] * width + np.arange(width)).reshape(-1)

  def _equal(self, length: int) -> np.ndarray:
    """One of `size` equal parts, the last ones filled up."""
    count = -(-length // self.size)
    rows = np.arange(self.part * count, (self.part + 1) * count)
    return np.where(rows < length, rows, -1)


def take_rows(x: Array, rows: np.ndarray, axis: int) -> Array:
  """Rows of an array along an axis; zeros where a row is -1."""
  # To `jnp.take` -1 is the last row, and what lies outside is filled.
  index = np.where(rows < 0, x.shape[axis], rows)
  return jnp.take(x, index, axis, mode="fill", fill_value=0)


def num_key_heads(
  config: TargetConfig | DrafterConfig, axis: str | None
) -> int:
  """Key heads in the cache of the device this is traced for."""
  if axis is None:
    return config.num_kv_heads
  size = jax.lax.axis_size(axis)
  return len(Share(config=config, part=0, size=size).key_heads)


def sum_parts(x: Array, axis: str | None) -> Array:
  """The sum of what the devices have."""
  return x if axis is None else jax.lax.psum(x, axis)


def token_ids(width: int, axis: str | None) -> Int[Array, " V"]:
  """Ids whose scores this device holds, `width` of them."""
  start = 0 if axis is None else jax.lax.axis_index(axis) * width
  return start + jnp.arange(width, dtype=jnp.int32)


def bar_padding(
  logits: Float[Array, "*n V"], vocab_size: int, axis: str | None
) -> Float[Array, "*n V"]:
  """-inf in the place of ids that only fill the devices' shares up."""
  if axis is None or jax.lax.axis_size(axis) * logits.shape[-1] == vocab_size:
    return logits
  real = token_ids(logits.shape[-1], axis) < vocab_size
  return jnp.where(real, logits, -jnp.inf)


def look_up(
  table: Float[Array, "V D"], tokens: Int[Array, "*n"], axis: str | None
) -> Float[Array, "*n D"]:
  """Rows of a table that the devices hold a part of each."""
  if axis is None:
    return jnp.take(table, tokens, axis=0)
  row = tokens - jax.lax.axis_index(axis) * len(table)
  mine = (row >= 0) & (row < len(table))
  rows = jnp.take(table, jnp.where(mine, row, 0), axis=0)
  return sum_parts(jnp.where(mine[..., None], rows, 0), axis)


def largest_score(
  scores: Float[Array, "*n V"], axis: str | None
) -> Float[Array, "*n"]:
  """The largest over the whole vocabulary."""
  largest = scores.max(-1)
  return largest if axis is None else jax.lax.pmax(largest, axis)


def two_best(
  scores: Float[Array, " V"], axis: str | None
) -> Float[Array, " 2"]:
  """The two largest scores, the larger first."""
  best = jax.lax.top_k(scores, 2)[0]
  if axis is None:
    return best
  return jax.lax.top_k(jax.lax.all_gather(best, axis, tiled=True), 2)[0]


def best_token(
  scores: Float[Array, "*n V"], axis: str | None
) -> Int[Array, "*n"]:
  """The id of the largest score; the smallest id of equal ones.

  Of a vocabulary that is split, each device tells its best score and id.
  """
  best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
  if axis is None:
    return best
  score = jnp.take_along_axis(scores, best[..., None], axis=-1)[..., 0]
  token = token_ids(scores.shape[-1], axis)[best]
  bits = jax.lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32)
  told = jax.lax.all_gather(jnp.stack([bits, token], axis=-1), axis)
  score = jax.lax.bitcast_convert_type(told[..., 0], jnp.float32)
  # Devices are in the order of their ids, so the first of equals is right.
  first = jnp.argmax(score, axis=0)
  return jnp.take_along_axis(told[..., 1], first[None], axis=0)[0]

"""Batches of prompts that the target continues, one ahead of the host."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from d2sd_jax.config import TreeConfig
from d2sd_jax.decoding.loop import generate
from d2sd_jax.decoding.state import Models, prefill
from d2sd_jax.sampling import Sampling
from d2sd_jax.typing import Array, Int

_Info = TypeVar("_Info")
_prefill = functools.partial(jax.jit, static_argnames="capacity")(prefill)


@dataclasses.dataclass(frozen=True)
class Written:
  """What the target wrote behind the prompts of a batch.

  Attributes:
    tokens: [B, max_new], a stop id included; then anything.
    lengths: [B], tokens of each row.
  """

  tokens: np.ndarray
  lengths: np.ndarray

  def rows(self) -> list[list[int]]:
    """The tokens of each row."""
    pairs = zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
    return [row[:length] for row, length in pairs]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writer:
  """A target that continues batches of token ids."""

  models: Models
  batch_size: int
  stop_ids: tuple[int, ...]
  seed: int

  def prepare(
    self,
    rows: Sequence[Sequence[int]],
    first_id: int,
    *,
    max_prefix: int,
    max_new: int,
    temperature: float,
    top_p: float = 1.0,
  ) -> Callable[[], Written]:
    """A function that runs a batch on the device and waits for it.

    Args:
      rows: ids of `batch_size` prompts.
      first_id: sequence id of the first row, for sampling noise.
      max_prefix: static length of the prompts.
      max_new: most tokens a row may get, the stop id included.
      temperature: 0 is greedy.
      top_p: as in `Sampling`.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((self.batch_size, max_prefix), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
      padded[: len(row)] = row

    def write() -> Written:
      sampling = Sampling.create(temperature, 0, top_p, self.seed)
      state = _prefill(
        self.models,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        jnp.full(self.batch_size, max_new, jnp.int32),
        jnp.arange(self.batch_size, dtype=jnp.int32) + first_id,
        jnp.array(self.stop_ids, jnp.int32),
        sampling,
        capacity=math.ceil((max_prefix + max_new + 1) / 16) * 16,
      )
      state = generate(
        self.models, state, sampling, max_new, mode="ar", config=TreeConfig()
      )
      vocab_size = self.models.target.config.vocab_size
      packed = _pack(
        state.tokens,
        jnp.asarray(lengths),
        state.lengths,
        max_new=max_new,
        dtype="uint16" if max(vocab_size, max_new) <= 2**16 else "int32",
      )
      result = np.asarray(packed)
      return Written(result[:, 1:], result[:, 0].astype(np.int32))

    return write


@functools.partial(jax.jit, static_argnames=("max_new", "dtype"))
def _pack(
  tokens: Int[Array, "B S"],
  starts: Int[Array, " B"],
  last: Int[Array, " B"],
  *,
  max_new: int,
  dtype: str,
) -> Int[Array, "B columns"]:
  """How many tokens each row got, then the tokens: one small transfer."""
  columns = starts[:, None] + jnp.arange(max_new)
  new = jnp.take_along_axis(tokens, columns, axis=1)
  counts = last + 1 - starts
  return jnp.concatenate([counts[:, None], new], axis=1).astype(dtype)


def one_ahead(
  prepare: Callable[[int], tuple[_Info, Callable[[], Written]]],
  first: int,
  another: Callable[[int], bool],
) -> Iterator[tuple[_Info, Written]]:
  """Yields batch after batch, each with the next one under way.

  The device has a thread of its own: a loop whose length it decides itself
  keeps the thread that launched it waiting.

  Args:
    prepare: given a batch's number, what is known of it and what writes it.
    first: number of the first batch.
    another: whether one more is surely needed, given how many are under way.
  """
  device = ThreadPoolExecutor(1, "device")
  running: collections.deque[tuple[_Info, Future[Written]]]
  running = collections.deque()
  numbers = itertools.count(first)
  try:
    while True:
      while len(running) < 2 and another(len(running)):
        info, write = prepare(next(numbers))
        running.append((info, device.submit(write)))
      if not running:
        return
      info, future = running.popleft()
      yield info, future.result()
  finally:
    device.shutdown(wait=False, cancel_futures=True)

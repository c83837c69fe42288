"""Decoding prompts with programs compiled ahead of time, and timing them."""

import concurrent.futures
import copy
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from d2sd_jax.config import TreeConfig
from d2sd_jax.decoding.loop import generate
from d2sd_jax.decoding.policies import POLICIES
from d2sd_jax.decoding.state import DecodeState, Models, prefill
from d2sd_jax.kernels.cascade_attention.api import default_implementation
from d2sd_jax.models.cache import KVCache
from d2sd_jax.models.target import LlamaTarget
from d2sd_jax.sampling import Sampling

SMALLEST_BUCKET = 64
_T = TypeVar("_T")
_prefill = jax.jit(prefill, static_argnames="capacity")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A prompt in ids, and its index in the input."""

  sequence_id: int
  tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """What became of a request.

  Attributes:
    request: the request.
    mode: how it was decoded.
    tokens: the new ids, a stop id included.
    origins: which pass proposed each of them (`d2sd_jax.tree`).
    accepted_per_cycle: tokens each cycle committed.
    num_verified: tree nodes that were verified, in all cycles.
    prefill_seconds: of the batch the request was in.
    decode_seconds: of the same batch, from its first token to its last.
    batch_rows: requests in that batch.
    implementation: of attention in verification; see `cascade_attention`.
  """

  request: Request
  mode: str
  tokens: list[int]
  origins: list[int]
  accepted_per_cycle: list[int]
  num_verified: int
  prefill_seconds: float
  decode_seconds: float
  batch_rows: int
  implementation: str

  @property
  def cycles(self) -> list[slice]:
    """Where each cycle's tokens are in `tokens`; prefill gave the first."""
    ends = 1 + np.cumsum([0, *self.accepted_per_cycle])
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]


# Called with the new tokens of the only row, and with their origins.
OnStep = Callable[[list[int], list[int]], None]


class Session:
  """One mode's programs, compiled for a known set of requests.

  A program per prompt bucket for prefill, and one for the cycles, which
  streaming and plain decoding share. Nothing compiles after `__init__`.
  """

  def __init__(
    self,
    models: Models,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    mode: str,
    tree: TreeConfig,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    batch_size: int = 1,
    prompt_size: int | None = None,
  ):
    """Compiles.

    Args:
      models: target and as many drafters as the mode needs.
      requests: what will be decoded; only the lengths are used yet, and
        others that are no longer may be decoded as well.
      sampling: how the target chooses.
      mode: a key of `POLICIES`.
      tree: static sizes of the tree.
      max_new_tokens: limit of every answer.
      stop_ids: ids that end an answer.
      batch_size: rows decoded together; no more than there are requests.
      prompt_size: one static length for all prompts, and one program; `None`
        is one for each power of two that occurs.
    """
    self.mode = mode
    self.models, self.sampling, self.tree = models, sampling, tree
    self._bucket = bucket if prompt_size is None else lambda _: prompt_size
    self._max_new_tokens = max_new_tokens
    self._stop_ids = np.asarray(stop_ids, np.int32)
    self._requests = list(requests)
    self._batch_size = min(batch_size, len(self._requests))
    longest = max(len(r.tokens) for r in self._requests)
    path = POLICIES[mode].max_path(tree)
    self._capacity = max(
      self._bucket(longest), _capacity(longest + max_new_tokens + path)
    )
    self._prefill, self._generate = self._compile(tree)

  def with_sampling(self, sampling: Sampling) -> "Session":
    """The same programs, for another temperature or seed."""
    other = copy.copy(self)
    other.sampling = sampling
    return other

  def batches(self) -> Iterator[list[Request]]:
    """The requests in input order, as many together as a batch holds."""
    for i in range(0, len(self._requests), self._batch_size):
      yield self._requests[i : i + self._batch_size]

  def warm_up(self) -> None:
    """Runs each kind of program once, so that a first timing is a fair one."""
    for size, program in self._prefill.items():
      state = program(*self._prefill_arguments([], size))
    # Without requests every row has finished; a cycle needs one that has not.
    state = dataclasses.replace(state, finished=~state.finished)
    timed(
      functools.partial(
        self._generate, self.models, state, self.sampling, jnp.int32(1)
      )
    )

  def start(self, requests: Sequence[Request]) -> tuple[DecodeState, float]:
    """The state of one batch before its first cycle, and prefill's seconds."""
    size = self._bucket(max(len(r.tokens) for r in requests))
    arguments = self._prefill_arguments(requests, size)
    return timed(lambda: self._prefill[size](*arguments))

  def decode(
    self, requests: Sequence[Request], on_step: OnStep | None = None
  ) -> list[Answer]:
    """Decodes one batch.

    Args:
      requests: at most `batch_size` of them; the other rows are idle.
      on_step: called after prefill and after every cycle, between the timed
        spans; for a single request.

    Returns:
      One answer per request.
    """
    state, prefill_seconds = self.start(requests)
    limit = jnp.int32(1 if on_step else self._max_new_tokens)
    decode_seconds, seen = 0.0, 0

    while True:
      rows = _read(state, requests)
      if on_step:
        on_step(rows[0].tokens[seen:], rows[0].origins[seen:])
        seen = len(rows[0].tokens)
      if all(row.finished for row in rows):
        break
      step = functools.partial(
        self._generate, self.models, state, self.sampling, limit
      )
      state, seconds = timed(step)
      decode_seconds += seconds

    return [
      Answer(
        request=request,
        mode=self.mode,
        tokens=row.tokens,
        origins=row.origins,
        accepted_per_cycle=row.accepted,
        num_verified=row.num_verified,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        batch_rows=len(requests),
        implementation=self.implementation,
      )
      for request, row in zip(requests, rows, strict=True)
    ]

  def _compile(self, tree: TreeConfig) -> tuple[dict[int, Any], Any]:
    """Prefill by bucket, and the cycles."""
    sizes = sorted(
      {
        self._bucket(max(len(r.tokens) for r in batch))
        for batch in self.batches()
      }
    )
    traced = [
      _prefill.trace(
        *self._prefill_arguments([], size), capacity=self._capacity
      )
      for size in sizes
    ]
    state = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), traced[0].out_info
    )
    self.implementation = self._implementation(state.target_cache)
    cycles = generate.trace(
      self.models,
      state,
      self.sampling,
      jnp.int32(1),
      mode=self.mode,
      config=tree,
    )
    lowered = [program.lower() for program in (cycles, *traced)]
    compiled = interruptible(lambda: _compile_all(lowered))
    return dict(zip(sizes, compiled[1:], strict=True)), compiled[0]

  def _implementation(self, cache: KVCache) -> str:
    """What the target's attention runs when it verifies a tree."""
    target = self.models.target
    if not isinstance(target, LlamaTarget):
      return "unknown"
    keys, heads = cache.keys[0], target.config.num_heads
    num_nodes = POLICIES[self.mode].num_nodes(self.tree)
    query: Any = jax.ShapeDtypeStruct(
      (keys.shape[0], 1, num_nodes, heads, keys.shape[3]), keys.dtype
    )
    return target.implementation or default_implementation(
      query, keys, target.layers[0].sinks
    )

  def _prefill_arguments(
    self, requests: Sequence[Request], size: int
  ) -> tuple[Any, ...]:
    """Arguments of `prefill`; rows without a request are finished at once."""
    tokens = np.zeros((self._batch_size, size), np.int32)
    lengths = np.ones((self._batch_size,), np.int32)
    limits, ids = np.zeros_like(lengths), np.zeros_like(lengths)
    for row, request in enumerate(requests):
      lengths[row] = len(request.tokens)
      tokens[row, : lengths[row]] = request.tokens
      limits[row], ids[row] = self._max_new_tokens, request.sequence_id
    # Fresh arrays every time: the state they end up in is donated.
    host = (tokens, lengths, limits, ids, self._stop_ids)
    return (self.models, *map(jnp.array, host), self.sampling)


def _compile_all(lowered: Sequence[Any]) -> list[Any]:
  """Compiles two programs at a time."""
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    return list(pool.map(lambda program: program.compile(), lowered))


def bucket(size: int) -> int:
  """The static length a prompt is padded to: 64, 128, 256, ..."""
  return max(SMALLEST_BUCKET, 1 << (size - 1).bit_length())


def _capacity(size: int) -> int:
  """Cache rows for `size` tokens: 64, 96, 128, 192, 256, 384, ..."""
  whole = bucket(size)
  return 3 * whole // 4 if size <= 3 * whole // 4 else whole


def timed(call: Callable[[], _T]) -> tuple[_T, float]:
  """The call's result, all of it computed, and the seconds that took."""
  start = time.perf_counter()
  result = interruptible(lambda: jax.block_until_ready(call()))
  return result, time.perf_counter() - start


def interruptible(call: Callable[[], _T]) -> _T:
  """Runs `call` in another thread, so that Ctrl-C is heard while it runs.

  Python hears nothing while XLA compiles or computes. After an interrupt the
  call goes on unheard: leave with `cli.exit_with`, which does not wait.
  """
  future: concurrent.futures.Future[_T] = concurrent.futures.Future()

  def work():
    try:
      future.set_result(call())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=work, daemon=True).start()
  return future.result()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
  tokens: list[int]
  origins: list[int]
  accepted: list[int]
  num_verified: int
  finished: bool


def _read(state: DecodeState, requests: Sequence[Request]) -> list[_Row]:
  """What every request's row holds so far, on the host."""
  host = jax.device_get(
    (
      *(state.tokens, state.origins, state.accepted),
      *(state.lengths, state.finished, state.num_cycles),
      state.num_verified,
    )
  )
  tokens, origins, accepted, lengths, finished, cycles, verified = host
  rows = []
  for i, request in enumerate(requests):
    new = slice(len(request.tokens), int(lengths[i]) + 1)
    counts = accepted[i, :cycles]
    rows.append(
      _Row(
        tokens=tokens[i, new].tolist(),
        origins=origins[i, new].tolist(),
        accepted=counts[counts > 0].tolist(),
        num_verified=int(verified[i]),
        finished=bool(finished[i]),
      )
    )
  return rows

"""Decoding prompts with programs compiled ahead of time, and timing them."""

import concurrent.futures
import copy
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from d2sd_jax.config import TreeConfig
from d2sd_jax.decoding.answers import Answer, Request, read_rows, steps
from d2sd_jax.decoding.loop import generate
from d2sd_jax.decoding.placement import ROWS, WHOLE, put
from d2sd_jax.decoding.policies import POLICIES
from d2sd_jax.decoding.state import (
  DecodeState,
  Models,
  prefill,
  state_specs,
)
from d2sd_jax.kernels.cascade_attention.api import default_implementation
from d2sd_jax.kernels.device import compiler_options
from d2sd_jax.models.cache import KVCache
from d2sd_jax.models.target import LlamaTarget
from d2sd_jax.sampling import Sampling
from d2sd_jax.sharding import DATA

SMALLEST_BUCKET = 64
# Streamed cycles go together until they last half of it: a call costs some
# milliseconds beside them, where a cycle of a small target takes one.
STREAM_SECONDS = 0.1
_T = TypeVar("_T")
_prefill = jax.jit(prefill, static_argnames="capacity")
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
      batch_size: rows decoded together; no more than there are requests, but
        of a mesh that splits the batch a multiple.
      prompt_size: one static length for all prompts, and one program; `None`
        is one for each power of two that occurs.
    """
    self.mode = mode
    self.models, self.tree = models, tree
    self.sampling = self._put(sampling, WHOLE)
    self._bucket = bucket if prompt_size is None else lambda _: prompt_size
    self._max_new_tokens = max_new_tokens
    self._stop_ids = np.asarray(stop_ids, np.int32)
    self._requests = list(requests)
    # As many rows on every device; what is too many stays idle.
    split = 1 if models.mesh is None else models.mesh.shape[DATA]
    rows = min(batch_size, len(self._requests))
    self._batch_size = -(-rows // split) * split
    longest = max(len(r.tokens) for r in self._requests)
    path = POLICIES[mode].max_path(tree)
    self._capacity = max(
      self._bucket(longest), _capacity(longest + max_new_tokens + path)
    )
    self._prefill, self._generate = self._compile(tree)

  def with_sampling(self, sampling: Sampling) -> "Session":
    """The same programs, for another temperature or seed."""
    other = copy.copy(self)
    other.sampling = self._put(sampling, WHOLE)
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
        self._generate, self.models, state, self.sampling, self._number(1)
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
      on_step: called for prefill and then once for every cycle, between the
        timed spans: after each of them or, where they are short, after several
        (`STREAM_SECONDS`); for a single request.

    Returns:
      One answer per request.
    """
    state, prefill_seconds = self.start(requests)
    limit = 1 if on_step else self._max_new_tokens
    decode_seconds, told = 0.0, 0
    # By their own clocks processes would not run the same programs.
    alone = jax.process_count() == 1

    while True:
      rows = read_rows(state, requests)
      if on_step:
        parts = steps(rows[0].accepted)
        for part in parts[told:]:
          on_step(rows[0].tokens[part], rows[0].origins[part])
        told = len(parts)
      if all(row.finished for row in rows):
        break
      cycles = self._number(limit)
      step = functools.partial(
        self._generate, self.models, state, self.sampling, cycles
      )
      state, seconds = timed(step)
      decode_seconds += seconds
      if on_step and alone and seconds < STREAM_SECONDS / 2:
        limit *= 2

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
    state = self._state_shapes(traced[0].out_info)
    self.implementation = self._implementation(state.target_cache)
    cycles = generate.trace(
      self.models,
      state,
      self.sampling,
      self._number(1),
      mode=self.mode,
      config=tree,
    )
    lowered = [program.lower() for program in (cycles, *traced)]
    # Of jax 0.11's CPU compiler, programs for several devices crash each other.
    simulated = self.models.mesh is not None and jax.default_backend() == "cpu"
    at_once = 1 if simulated else 2
    options = compiler_options(one_device=self.models.mesh is None)
    compiled = interruptible(lambda: _compile_all(lowered, at_once, options))
    return dict(zip(sizes, compiled[1:], strict=True)), compiled[0]

  def _state_shapes(self, state: Any) -> DecodeState:
    """A state's shapes and, on a mesh, where its arrays lie."""
    mesh, specs = self.models.mesh, state_specs(self.models)
    place = lambda spec: None if mesh is None else NamedSharding(mesh, spec)
    return jax.tree.map(
      lambda spec, x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=place(spec)
      ),
      jax.tree.broadcast(specs, state),
      state,
    )

  def _put(self, values: _T, spec: PartitionSpec) -> _T:
    """Fresh arrays where the models are."""
    specs = jax.tree.map(lambda _: spec, values)
    return put(self.models.mesh, values, specs)

  def _number(self, value: int) -> Any:
    return self._put(np.int32(value), WHOLE)

  def _implementation(self, cache: KVCache) -> str:
    """What the target's attention runs when it verifies a tree."""
    target = self.models.target
    if not isinstance(target, LlamaTarget):
      return "unknown"
    mesh, heads = self.models.mesh, target.config.num_heads
    whole = cache.keys[0]
    rows, kv_heads, size, head_dim = whole.shape
    if mesh is not None:  # Each device has its own part of both.
      rows //= mesh.shape[DATA]
    if mesh is not None and target.axis is not None:
      kv_heads //= mesh.shape[target.axis]
      heads //= mesh.shape[target.axis]
    num_nodes = POLICIES[self.mode].num_nodes(self.tree)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, whole.dtype)
    query: Any = shape(rows, 1, num_nodes, heads, head_dim)
    keys: Any = shape(rows, kv_heads, size, head_dim)
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
    rows = self._put((tokens, lengths, limits, ids), ROWS)
    stop_ids = self._put(self._stop_ids, WHOLE)
    return (self.models, *rows, stop_ids, self.sampling)


def _compile_all(
  lowered: Sequence[Any], at_once: int, options: dict[str, Any]
) -> list[Any]:
  """Compiles so many programs at a time."""
  compiled = lambda program: program.compile(compiler_options=options)
  with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
    return list(pool.map(compiled, lowered))


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
  # Not a future, whose lock an interrupt can leave in disorder.
  ended: queue.SimpleQueue[tuple[_T | None, BaseException | None]]
  ended = queue.SimpleQueue()

  def work():
    try:
      ended.put((call(), None))
    except BaseException as error:
      ended.put((None, error))

  threading.Thread(target=work, daemon=True).start()
  result, error = ended.get()
  if error is not None:
    raise error
  return cast(_T, result)

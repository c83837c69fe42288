"""Rows written into a cache on TPU, through Pallas's interpreter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.pallas import tpu as pltpu

from d2sd_jax import KVCache, Models, Sampling, TreeConfig, decode_cycle
from d2sd_jax.decoding.policies import POLICIES
from d2sd_jax.kernels.device import tpu_interpreter
from d2sd_jax.models.cache import append, commit_path

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _on_tpu():
  return tpu_interpreter(pltpu.InterpretParams(detect_races=True))


def _cache(rng, layers, *shape, dtype=np.float32):
  draw = lambda: tuple(
    jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(layers)
  )
  return KVCache(keys=draw(), values=draw())


@pytest.mark.parametrize(
  ("width", "capacity", "size", "starts", "dtype"),
  [
    # Within a block, over a block's edge, up to the cache's very end.
    (128, 48, 5, [2, 13, 43], jnp.float32),
    (128, 64, 16, [0, 48, 33], jnp.bfloat16),
    # Small heads lie the other way round, in blocks of 128.
    (8, 384, 19, [120, 3, 365], jnp.float32),
    # One block for all, and neither whole blocks nor small: XLA's way.
    (8, 37, 5, [2, 13, 32], jnp.float32),
    (8, 300, 5, [2, 126, 295], jnp.float32),
  ],
)
def test_a_path_is_written_and_nothing_else(
  width, capacity, size, starts, dtype
):
  rng = np.random.default_rng(0)
  cache = _cache(rng, 1, 3, 2, capacity, width, dtype=dtype)
  nodes = _cache(rng, 1, 3, 2, 23, width, dtype=dtype)
  path = rng.integers(0, 23, (3, size)).astype(np.int32)
  expected = jax.tree.map(np.array, cache)
  for old, new in zip(
    jax.tree.leaves(expected), jax.tree.leaves(nodes), strict=True
  ):
    for b, start in enumerate(starts):
      old[b, :, start : start + size] = np.asarray(new)[b][:, path[b]]
  with _on_tpu():
    commit = jax.jit(commit_path).trace(cache, nodes, path, jnp.asarray(starts))
    assert ("write_rows" in str(commit.jaxpr)) == (capacity != 300)
    got = commit.lower().compile()(cache, nodes, path, jnp.asarray(starts))
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_all_rows_in_order():
  rng = np.random.default_rng(1)
  cache, rows = _cache(rng, 1, 2, 3, 32, 8), _cache(rng, 1, 2, 3, 4, 8)
  with _on_tpu():
    got = jax.jit(append)(cache, rows, jnp.array([28, 3]))
  expected = append(cache, rows, jnp.array([28, 3]))
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.slow
def test_a_cycle_by_the_tpu_kernels_is_the_cycle_by_xla():
  # One layer each: three kernels of attention, and three that write.
  small = {"num_layers": 1, "num_target_layers": 1, "target_layer_ids": (0,)}
  drafter = dataclasses.replace(tiny.DFLASH, **small)
  models = Models(
    target=tiny.target(config=dataclasses.replace(tiny.TARGET, num_layers=1)),
    drafters=(tiny.drafter(drafter), tiny.drafter(drafter, seed=1)),
  )
  state = tiny.start(models, [[5, 9, 2], [7], [3, 1, 4, 1, 5]])
  config = TreeConfig(block_size=5, num_branches=2)

  @jax.jit
  def cycle(models, state):
    return decode_cycle(
      models,
      state,
      Sampling.create(),
      policy=POLICIES["d2sd"],
      config=config,
    )

  expected = cycle(models, state)
  with _on_tpu():
    assert "cascade_attention" in str(cycle.trace(models, state).jaxpr)
    got = cycle(models, state)
  np.testing.assert_array_equal(got.tokens, expected.tokens)
  np.testing.assert_array_equal(got.accepted, expected.accepted)
  assert (got.lengths > state.lengths).all()
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, got.target_cache, expected.target_cache)
  jax.tree.map(close, got.drafter_caches, expected.drafter_caches)

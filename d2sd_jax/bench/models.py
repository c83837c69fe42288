"""Random models, caches and trees, drawn where they will be used."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from d2sd_jax.bench.config import BenchConfig
from d2sd_jax.config import TargetConfig
from d2sd_jax.decoding.state import DecodeState, Models, prefill
from d2sd_jax.models.drafter import INIT_STD, Drafter
from d2sd_jax.models.layers import LayerWeights
from d2sd_jax.models.target import LlamaTarget
from d2sd_jax.sampling import Sampling
from d2sd_jax.tree import PrefixTree, chain_tree
from d2sd_jax.typing import Array

# Longest run without a branch in a tree that is only timed.
_TRUNK = 16


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
  """Normal noise; jitted, so that nothing but the result takes memory."""
  return jax.random.normal(key, shape, dtype)


class Draws:
  """Random arrays, each from a key of its own."""

  def __init__(self, seed: int, dtype: str):
    """Draws of one seed; `dtype` is that of real numbers."""
    self._key, self._count = jax.random.key(seed), 0
    self.dtype = jnp.dtype(dtype)

  def key(self) -> Array:
    """A new key."""
    self._count += 1
    return jax.random.fold_in(self._key, self._count)

  def noise(self, *shape: int) -> Array:
    """Normal noise."""
    return normal(self.key(), shape, self.dtype)

  def tokens(self, vocab_size: int, *shape: int) -> Array:
    """Ids of a vocabulary."""
    return jax.random.randint(self.key(), shape, 0, vocab_size, jnp.int32)


def random_models(config: BenchConfig) -> Models:
  """A target and two drafters with random weights, on the default device."""
  draws = Draws(config.seed, config.dtype_name)
  make = lambda: Drafter(
    config.drafter, rngs=nnx.Rngs(draws.key()), dtype=draws.dtype
  )
  target = _target(config.target, draws, config.implementation)
  models = Models(target=target, drafters=(make().fuse(), make().fuse()))
  int8 = config.drafter_weights == "int8"
  return models.with_int8_drafting() if int8 else models


def _target(c: TargetConfig, draws: Draws, implementation: str | None):
  """A target whose every matrix and norm is random."""
  matrix = lambda *shape: INIT_STD * draws.noise(*shape)
  norm = lambda size: 1 + INIT_STD * draws.noise(size)
  width, mlp, head = c.hidden_size, c.intermediate_size, c.head_dim
  query, key = c.num_heads * head, c.num_kv_heads * head

  def layer() -> LayerWeights:
    return LayerWeights(
      input_norm=norm(width),
      qkv_proj=matrix(width, query + 2 * key),
      o_proj=matrix(query, width),
      q_norm=norm(head) if c.qk_norm else None,
      k_norm=norm(head) if c.qk_norm else None,
      post_norm=norm(width),
      gate_up_proj=matrix(width, 2 * mlp),
      down_proj=matrix(mlp, width),
    )

  return LlamaTarget(
    embedding=matrix(c.vocab_size, width),
    layers=tuple(layer() for _ in range(c.num_layers)),
    norm=norm(width),
    lm_head=None if c.tied_head else matrix(c.vocab_size, width),
    config=c,
    implementation=implementation,
  )


def random_state(
  models: Models, config: BenchConfig, batch: int, cache: int
) -> DecodeState:
  """A state in the midst of decoding: caches full but for one path.

  No row ever finishes.
  """
  draws = Draws(config.seed + 1, config.dtype_name)
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  shapes = jax.eval_shape(
    functools.partial(prefill, capacity=cache),
    *(models, ints(batch, 1), *[ints(batch)] * 3, ints(2)),
    Sampling.create(),
  )
  zeros = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype),
    dataclasses.replace(shapes, target_cache=(), drafter_caches=()),
  )
  caches = jax.tree.map(
    lambda s: draws.noise(*s.shape),
    (shapes.target_cache, shapes.drafter_caches),
  )
  used = cache - config.tree.branch_size - 1
  return dataclasses.replace(
    zeros,
    tokens=draws.tokens(config.vocab_size, batch, cache),
    lengths=jnp.full((batch,), used, jnp.int32),
    last_positions=jnp.full((batch,), 2**30, jnp.int32),
    stop_ids=jnp.array([-1, -1], jnp.int32),
    sequence_ids=jnp.arange(batch, dtype=jnp.int32),
    target_cache=caches[0],
    drafter_caches=caches[1],
  )


def random_tree(config: BenchConfig, batch: int, nodes: int) -> PrefixTree:
  """A trunk, and chains that hang at random places below it."""
  draws = Draws(config.seed + 2, config.dtype_name)
  rng = np.random.default_rng(config.seed)
  parents = np.arange(-1, nodes - 1)
  for first in range(_TRUNK, nodes, _TRUNK):
    parents[first] = rng.integers(0, _TRUNK)
  depths = np.zeros(nodes, int)
  for node in range(1, nodes):
    depths[node] = depths[parents[node]] + 1
  tree = chain_tree(draws.tokens(config.vocab_size, batch, nodes))
  wide = lambda x: jnp.broadcast_to(jnp.array(x, jnp.int32), (batch, nodes))
  return dataclasses.replace(tree, parents=wide(parents), depths=wide(depths))

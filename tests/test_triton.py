"""Small kernels by Pallas's interpreter: alone, and in whole decodings."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from d2sd_jax import Models, Sampling, TreeConfig, generate
from d2sd_jax.decoding.placement import put_drafter
from d2sd_jax.io import hf_tensors
from d2sd_jax.kernels import rotary, transposed, triton
from d2sd_jax.kernels.cascade_attention.merge_triton import merge
from d2sd_jax.kernels.write_all import fits
from d2sd_jax.models.cache import KVCache, commit_path


def _draw(seed, *shapes, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("batch", "path"), [(1, 1), (3, 5)])
def test_rows_go_into_all_caches(batch, path, dtype):
  shape, size = (batch, 3, 40, 32), (batch, 3, 7, 32)
  arrays = _draw(batch, *[shape] * 4, *[size] * 4, dtype=dtype)
  caches, rows = tuple(arrays[:4]), tuple(arrays[4:])
  rng = np.random.default_rng(path)
  starts = rng.permutation(shape[2] - path)[:batch]
  index = rng.integers(0, size[2], (batch, path))
  expected = np.stack(caches)
  for b in range(batch):
    at = slice(starts[b], starts[b] + path)
    expected[:, b, :, at] = np.stack(rows)[:, b][:, :, index[b]]
  halves = lambda x: KVCache(keys=x[:2], values=x[2:])
  with triton.interpreter():
    got = commit_path(
      *(halves(caches), halves(rows), jnp.asarray(index), jnp.asarray(starts))
    )
  np.testing.assert_array_equal(np.stack((*got.keys, *got.values)), expected)


def test_which_caches_are_written_so():
  cache, rows = jnp.zeros((2, 3, 40, 32)), jnp.zeros((2, 3, 7, 32))
  assert not fits((cache,) * 2, (rows,) * 2)
  with triton.interpreter():
    assert fits((cache,) * 2, (rows,) * 2)
    assert not fits((), ())
    assert not fits((cache, cache[:, :, :39]), (rows,) * 2)
    assert not fits((cache[..., :24],) * 2, (rows[..., :24],) * 2)
    long = jnp.zeros((2, 3, 129, 32))
    assert not fits((cache,) * 2, (long,) * 2)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm_and_rotation(normed, dtype):
  heads, query, key = _draw(3, (2, 3, 5, 9, 16), (16,), (16,), dtype=dtype)
  (angles,) = _draw(4, (2, 3, 5, 8))
  exact, turn = np.asarray(heads[..., :7, :], np.float64), np.float64(angles)
  if normed:
    scale = np.sqrt((exact**2).mean(-1, keepdims=True) + 0.25)
    weights = np.stack([np.float64(query)] * 5 + [np.float64(key)] * 2)
    exact = exact / scale * weights
  turned = exact[..., :8] + 1j * exact[..., 8:]
  turned = turned * np.exp(1j * turn)[..., None, :]
  exact = np.concatenate([turned.real, turned.imag], -1)
  with triton.interpreter():
    assert rotary.fits(heads)
    got = rotary.norm_and_rotate(
      *(heads, jnp.cos(angles), jnp.sin(angles)),
      (query, key) if normed else None,
      0.25,
      num_heads=5,
      num_kv_heads=2,
    )
  assert got.dtype == dtype
  tolerance = 1e-5 if dtype == jnp.float32 else 2**-7
  np.testing.assert_allclose(np.float64(got), exact, tolerance, tolerance)


@pytest.mark.parametrize(
  ("splits", "batch", "kv_heads", "share", "nodes", "dim"),
  [(3, 2, 3, 3, 13, 64), (1, 1, 2, 4, 1, 128), (5, 1, 2, 1, 8, 64)],
)
def test_splits_are_merged(splits, batch, kv_heads, share, nodes, dim):
  chunks = -(-nodes // 8)
  # The kernel's rows fill whole tiles; what no node stands for may be anything.
  rows = -(-chunks * share * 8 // 64) * 64
  shape = (splits, batch, kv_heads, rows)
  outputs, logs = _draw(splits, (*shape, dim), shape)
  logs = 5 * logs
  weights = np.exp2(np.asarray(logs, np.float64))[..., None]
  exact = (outputs * weights).sum(0) / weights.sum(0)
  exact = exact[:, :, : chunks * share * 8].reshape(
    batch, kv_heads, chunks, share, 8, dim
  )
  exact = np.moveaxis(exact, (2, 4), (1, 2)).reshape(
    batch, -1, kv_heads * share, dim
  )
  with triton.interpreter():
    got = merge(
      *(outputs, logs),
      nodes=nodes,
      chunk=8,
      share=share,
      dtype=jnp.float32,
    )
  np.testing.assert_allclose(got, exact[:, :nodes], 1e-5, 1e-6)


@pytest.fixture
def interpreted(monkeypatch):
  """Decodings that run the kernels; the names of those that were traced."""
  for module in (hf_tensors, transposed):
    monkeypatch.setattr(module, "stores_transposed", lambda: True)
  names, call = Counter(), triton.call

  def noted(*args, name, **options):
    names[name] += 1
    return call(*args, name=name, **options)

  monkeypatch.setattr(triton, "call", noted)
  jax.clear_caches()
  with triton.interpreter():
    yield names
  jax.clear_caches()


def _decode(mode):
  config = tiny.TARGET
  tensors = tiny.target_tensors(config, 0)
  target = hf_tensors.target_from_tensors(config, tensors, jnp.float32)
  drafters = (tiny.drafter(tiny.DFLASH, 1), tiny.drafter(tiny.VP, 2))
  drafters = tuple(put_drafter(d, None) for d in drafters if mode == "d2sd")
  models = Models(target=target, drafters=drafters)
  prompts = [[3, 9, 4]]
  state = tiny.start(models, prompts, max_new=[9], capacity=32)
  state = generate(
    *(models, state, Sampling.create(0.8, seed=2), jnp.int32(20)),
    mode=mode,
    config=TreeConfig(block_size=4, num_branches=2),
  )
  return tiny.answers(state, prompts)


def test_decoding(request):
  expected = _decode("ar")
  names = request.getfixturevalue("interpreted")
  assert _decode("ar") == expected
  layers = tiny.TARGET.num_layers
  # The step's four products a layer, and one write; none of the prefill's.
  assert names["lone_row"] == 4 * layers
  assert names["norm_and_rotate"] >= layers
  assert names["write_all"] >= 1
  names.clear()
  assert _decode("d2sd") == expected
  assert names["lone_row"] == 0
  assert names["norm_and_rotate"] >= layers
  assert names["write_all"] >= 1

"""Small kernels, by Pallas's interpreter or on a GPU, and whole decodings."""

import contextlib
import dataclasses
import functools
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny

from d2sd_jax import Models, Sampling, TreeConfig, generate
from d2sd_jax.decoding.placement import put_drafter
from d2sd_jax.io import hf_tensors
from d2sd_jax.kernels import rms_norm, rotary, transposed, triton
from d2sd_jax.kernels.cascade_attention import Heads, cascade_attention
from d2sd_jax.kernels.cascade_attention.api import default_implementation
from d2sd_jax.kernels.cascade_attention.merge_triton import merge
from d2sd_jax.kernels.linear import linear
from d2sd_jax.kernels.write_all import fits
from d2sd_jax.models.cache import KVCache, commit_path
from d2sd_jax.timing import custom_calls

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(
  params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)]
)
def kernels(request):
  """The kernels run: interpreted, or as they are."""
  by_hand = request.param == "interpreter"
  with triton.interpreter() if by_hand else contextlib.nullcontext():
    yield


def _draw(seed, *shapes, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("batch", "path"), [(1, 1), (3, 5)])
def test_rows_go_into_all_caches(kernels, batch, path, dtype):
  shape, size = (batch, 3, 40, 32), (batch, 3, 7, 32)
  arrays = _draw(batch, *[shape] * 4, *[size] * 4, dtype=dtype)
  caches, rows = tuple(arrays[:4]), tuple(arrays[4:])
  rng = np.random.default_rng(path)
  # The last rows, rows before them, and rows that would pass the end.
  last = shape[2] - path
  asked = np.array([last, 3, last + 2])[:batch]
  starts = np.minimum(asked, last)
  index = rng.integers(0, size[2], (batch, path))
  expected = np.stack(caches)
  for b in range(batch):
    at = slice(starts[b], starts[b] + path)
    expected[:, b, :, at] = np.stack(rows)[:, b][:, :, index[b]]
  halves = lambda x: KVCache(keys=x[:2], values=x[2:])
  assert fits(caches, rows)
  got = commit_path(
    *(halves(caches), halves(rows), jnp.asarray(index), jnp.asarray(asked))
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
    assert not fits((jnp.zeros((2, 3, 200, 32)),) * 2, (long,) * 2)
    assert not fits((cache[:, :, :6],) * 2, (rows,) * 2)
    assert not fits((cache,) * 2, (rows[:, :, :0],) * 2)
    assert not fits((cache, cache.astype(jnp.bfloat16)), (rows,) * 2)


# Less than a load; a load and a piece; two loads.
@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    ((1, 2, 64), jnp.bfloat16),
    ((2, 5, 576), jnp.float32),
    ((3, 8192), jnp.bfloat16),
  ],
)
def test_rows_are_normed(kernels, shape, dtype):
  x, weight = _draw(shape[-1], shape, shape[-1:], dtype=dtype)
  exact = oracles.rms_norm(np.float64(x), np.float64(weight), 0.25)
  assert rms_norm.fits(x)
  got = rms_norm.rms_norm_rows(x, weight, 0.25)
  assert got.dtype == dtype
  tolerance = 1e-6 if dtype == jnp.float32 else 2**-8
  np.testing.assert_allclose(np.float64(got), exact, tolerance, 1e-6)


def test_which_rows_are_normed_so():
  x = jnp.zeros((2, 64, 16))
  assert not rms_norm.fits(x)
  with triton.interpreter():
    assert rms_norm.fits(x)
    assert not rms_norm.fits(x[:1, :1])
    assert not rms_norm.fits(jnp.zeros((129, 16)))
    assert not rms_norm.fits(x[:0])


@pytest.mark.parametrize("rows", [3, 5])
def test_a_product_of_rows_has_them_normed_so(interpreted, rows):
  x, norm, stored = _draw(rows, (rows, 24), (24,), (7, 24))
  exact = oracles.rms_norm(*map(np.float64, (x, norm)), 0.25)
  run = functools.partial(linear, x, norm=norm, eps=0.25)
  decoding, training = transposed.Transposed(stored=stored), stored.T
  for matrix, name, times in (
    (training, None, 0),
    (decoding, "xla", 0),
    (decoding, None, 1),
  ):
    got = run(matrix, implementation=name)
    np.testing.assert_allclose(got, exact @ np.float64(stored).T, 1e-4, 1e-4)
    assert interpreted["rms_norm"] == times
  # What may be trained has a gradient.
  for matrix, name in ((training, None), (decoding, "xla")):
    loss = lambda x, m=matrix, n=name: linear(
      x, m, norm=norm, implementation=n
    ).sum()
    assert np.isfinite(jax.grad(loss)(x)).all()


@pytest.mark.parametrize(
  ("rows", "heads", "each"),
  [(1, 40, 1), (25, 40, 1), (26, 40, 8), (120, 12, 4)],
)
def test_programs_of_one_head_or_some(rows, heads, each):
  assert rotary._heads_each(rows, heads) == each


# 16 heads of which a program has one; two of eight; four of four.
@pytest.mark.parametrize(("programs", "most"), [(1000, 8), (1, 8), (1, 4)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm_and_rotation(kernels, monkeypatch, programs, most, normed, dtype):
  monkeypatch.setattr(rotary, "MOST_PROGRAMS", programs)
  monkeypatch.setattr(rotary, "MOST_HEADS", most)
  jax.clear_caches()
  heads, query, key = _draw(3, (2, 3, 5, 19, 16), (16,), (16,), dtype=dtype)
  (angles,) = _draw(4, (2, 3, 5, 8))
  exact, turn = np.asarray(heads[..., :16, :], np.float64), np.float64(angles)
  if normed:
    scale = np.sqrt((exact**2).mean(-1, keepdims=True) + 0.25)
    weights = np.stack([np.float64(query)] * 11 + [np.float64(key)] * 5)
    exact = exact / scale * weights
  turned = exact[..., :8] + 1j * exact[..., 8:]
  turned = turned * np.exp(1j * turn)[..., None, :]
  exact = np.concatenate([turned.real, turned.imag], -1)
  assert rotary.fits(heads)
  got = rotary.queries_and_keys(
    *(heads, jnp.cos(angles), jnp.sin(angles)),
    (query, key) if normed else None,
    0.25,
    num_heads=11,
    num_kv_heads=5,
  )
  assert got.dtype == dtype
  tolerance = 1e-5 if dtype == jnp.float32 else 2**-7
  np.testing.assert_allclose(np.float64(got), exact, tolerance, tolerance)


@pytest.mark.parametrize(
  ("splits", "batch", "kv_heads", "share", "nodes", "dim"),
  [(3, 2, 3, 3, 13, 64), (1, 1, 2, 4, 1, 128), (5, 1, 2, 1, 8, 64)],
)
def test_splits_are_merged(kernels, splits, batch, kv_heads, share, nodes, dim):
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
  got = merge(
    *(outputs, logs), nodes=nodes, chunk=8, share=share, dtype=jnp.float32
  )
  np.testing.assert_allclose(got, exact[:, :nodes], 1e-5, 1e-6)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
  ("batch", "kv_heads", "share", "size", "dim", "options"),
  [
    (1, 3, 3, 200, 64, {}),
    (2, 2, 4, 300, 128, {"window": 7, "sinks": True}),
    (3, 1, 8, 40, 64, {"sinks": True, "itself": False}),
    (2, 2, 1, 130, 16, {"window": 150, "itself": False}),
  ],
)
def test_a_lone_node(
  kernels, batch, kv_heads, share, size, dim, options, apart
):
  heads = kv_heads * share
  shapes = [(batch, 1, 1, heads, dim), (batch, kv_heads, size, dim)]
  shapes += [shapes[1], *[(batch, 1, 1, kv_heads, dim)] * 2, (heads,)]
  *arrays, sinks = _draw(size, *shapes, dtype=jnp.bfloat16)
  # A key past a block, nothing of the prefix, all of it.
  ends = jnp.asarray(np.array([min(129, size - 1), 0, size])[:batch, None])
  start = None
  if "window" in options:
    start = (ends - options["window"])[:, :, None]  # May lie before the first.
  options = {
    "prefix_end": ends,
    "prefix_start": start,
    "local_mask": jnp.full((1, 1, 1, 1), options.get("itself", True)),
    "sinks": sinks if options.get("sinks") else None,
  }
  exact = oracles.cascade_attention(
    *(np.asarray(a, np.float64) for a in arrays),
    **{k: v if v is None else np.asarray(v) for k, v in options.items()},
  )
  query, *prefix, keys, values = arrays
  if not apart:
    together = jnp.concatenate([query, keys, values], axis=3)
    query, keys, values = (
      Heads(array=together, first=first, count=count)
      for first, count in (
        (0, heads),
        (heads, kv_heads),
        (heads + kv_heads, kv_heads),
      )
    )
  got = cascade_attention(
    *(query, *prefix, keys, values), **options, implementation="lone_node"
  )
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(got), exact, 2**-6, 2**-6)


def test_a_lone_nodes_gradient_is_that_of_xla():
  shapes = [(2, 1, 1, 4, 16), *[(2, 2, 20, 16)] * 2, *[(2, 1, 1, 2, 16)] * 2]
  arrays = _draw(5, *shapes, dtype=jnp.bfloat16)

  def loss(arrays, name):
    ends = jnp.asarray([7, 20])
    out = cascade_attention(*arrays, prefix_end=ends, implementation=name)
    return (out.astype(jnp.float32) ** 2).sum()

  slope = jax.jit(jax.grad(loss), static_argnums=1)
  with triton.interpreter():
    got = slope(arrays, "lone_node")
  for x, y in zip(got, slope(arrays, "xla"), strict=True):
    np.testing.assert_allclose(*map(np.float64, (x, y)), 2**-5, 2**-5)


@pytest.mark.parametrize(
  ("capability", "runs"),
  [("9.0", True), ("8.0", True), ("7.5", False), ("gfx942", False)],
)
def test_the_devices_that_run_them(monkeypatch, capability, runs):
  device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
  monkeypatch.setattr(triton, "target_device", lambda: device)
  assert triton.runs_here() == runs


def test_programs_tell_their_kernels():
  hlo = """
    %a = f32[1] custom-call(%x), custom_call_target="__cublas$gemm"
    %b = f32[1] custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(f)/while/body/lone_row/pallas_call"}
    %c = f32[1] fusion(%x), metadata={op_name="jit(f)/merge/pallas_call"}
    %d = f32[1] custom-call(%x), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(f)/jit(multiply)/few_rows/mpmd_map"}
  """
  assert custom_calls(hlo + hlo) == {
    **{"__cublas$gemm": 2, "few_rows": 2, "lone_row": 2}
  }


def test_when_a_lone_node_is_attended_so():
  def chosen(nodes=1, size=512, dtype=jnp.bfloat16, heads=6):
    query = jnp.zeros((2, 1, nodes, heads, 32), dtype)
    return default_implementation(query, jnp.zeros((2, 2, size, 32), dtype))

  assert chosen() == "xla"
  with triton.interpreter():
    assert chosen() == "lone_node"
    for other in ({"nodes": 2}, {"size": 513}, {"dtype": jnp.float32}):
      assert chosen(**other) == "xla"
    assert chosen(heads=34) == "xla"


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


def _decode(mode, config=tiny.TARGET, dtype=jnp.float32):
  tensors = tiny.target_tensors(config, 0)
  target = hf_tensors.target_from_tensors(config, tensors, dtype)
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


@pytest.mark.slow
def test_decoding(request):
  expected = _decode("ar")
  names = request.getfixturevalue("interpreted")
  assert _decode("ar") == expected
  # A layer's four products, which the others share, and none of the prefill's.
  assert names["lone_row"] == 4
  assert names["norm_and_rotate"] >= 1
  assert names["write_all"] >= 1
  names.clear()
  assert _decode("d2sd") == expected
  assert names["lone_row"] == 0
  assert names["norm_and_rotate"] >= 1
  assert names["write_all"] >= 1


def test_decoding_in_bfloat16(interpreted):
  """Kernels of 16-bit operands; their tokens may differ where two are close."""
  config = dataclasses.replace(tiny.GGUF_TARGET, head_dim=16)
  for mode, names in {
    "ar": ("lone_row", "lone_node"),
    "prompt_lookup": (),
  }.items():
    interpreted.clear()
    (tokens,) = _decode(mode, config, jnp.bfloat16)
    assert len(tokens) == 9
    assert max(tokens) < config.vocab_size
    for name in (*names, "norm_and_rotate", "write_all"):
      assert interpreted[name] >= 1, (mode, name)

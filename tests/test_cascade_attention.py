"""One suite that every implementation of cascade attention passes."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.experimental.pallas import tpu as pltpu

from d2sd_jax import UsageError, cascade_attention
from d2sd_jax.kernels.cascade_attention import (
  CAUSAL,
  IMPLEMENTATIONS,
  cudnn,
  mosaic_tpu,
  xla,
)
from d2sd_jax.kernels.cascade_attention.api import default_implementation
from d2sd_jax.kernels.device import tpu_interpreter

pytestmark = pytest.mark.usefixtures("quick_compilation")

# cuDNN itself needs a GPU; all that is ours around it runs here as well.
_DENSE = "cudnn around XLA"
# Hopper's kernel takes other sizes, and is slow here: test_mosaic_gpu.py. One
# takes lone nodes alone: test_triton.py.
_WITH_SINKS = sorted(
  set(IMPLEMENTATIONS) - {"cudnn", "lone_node", "mosaic_gpu"}
)
_EVERY = pytest.mark.parametrize("implementation", [*_WITH_SINKS, _DENSE])


def _every(names, cases, *, on_tpu, implementations=(*_WITH_SINKS, _DENSE)):
  """All cases by every implementation; the TPU's kernel is slow here.

  Of its cases those of `on_tpu` are run by default.
  """
  return pytest.mark.parametrize(
    (*names, "implementation"),
    [
      pytest.param(*case, name, marks=marks)
      for case in cases
      for name in implementations
      for marks in [
        [pytest.mark.slow]
        if name == "mosaic_tpu" and case not in on_tpu
        else []
      ]
    ],
  )


# Far beyond any real key or value, and finite in bfloat16 too.
_POISON = 1e30


@pytest.fixture(autouse=True)
def _dense(monkeypatch):
  attend = functools.partial(jax.nn.dot_product_attention, implementation="xla")
  dense = functools.partial(cudnn.cascade_attention, attend=attend)
  monkeypatch.setitem(IMPLEMENTATIONS, _DENSE, dense)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
  # The prefixes below are longer than a block, and no multiple of one.
  monkeypatch.setattr(mosaic_tpu, "BLOCK_KEYS", 8)


def _interpreter(implementation):
  """Where a kernel needs one here; from jax 0.12 on, a race is an error."""
  if implementation != "mosaic_tpu":
    return contextlib.nullcontext()
  return tpu_interpreter(pltpu.InterpretParams(detect_races=True))


def _inputs(
  seed=0, *, batch=3, groups=1, nodes=5, share=3, kv_heads=2, size=11, dim=8
):
  """Random operands, rows of different lengths, a random local mask."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  arrays = (
    2 * draw(batch, groups, nodes, kv_heads * share, dim),
    2 * draw(batch, kv_heads, size, dim),
    draw(batch, kv_heads, size, dim),
    2 * draw(batch, groups, nodes, kv_heads, dim),
    draw(batch, groups, nodes, kv_heads, dim),
  )
  mask = rng.random((batch, groups, nodes, nodes)) < 0.5
  mask |= np.eye(nodes, dtype=bool)
  ends = np.array([size, 1, 0, size // 2, *range(batch)][:batch], np.int32)
  return arrays, {"prefix_end": ends, "local_mask": mask}


@functools.cache
def _program(implementation):
  """One jitted function: cases of the same shapes share a program."""

  @jax.jit
  def attend(arrays, options):
    return cascade_attention(*arrays, **options, implementation=implementation)

  return attend


def _run(implementation, arrays, options):
  as_jax = lambda x: None if x is None else jnp.asarray(x)
  options = {k: as_jax(v) for k, v in options.items()}
  with _interpreter(implementation):
    attend = _program(implementation)
    return np.asarray(attend([jnp.asarray(x) for x in arrays], options))


def _check(implementation, arrays, options, atol=1e-5):
  got = _run(implementation, arrays, options)
  expected = oracles.cascade_attention(*arrays, **options)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol)
  return got


@_every(
  ("groups", "share", "kv_heads", "dim"),
  [(1, 1, 5, 8), (1, 4, 2, 128), (3, 8, 2, 6), (4, 3, 2, 64), (8, 4, 1, 8)],
  on_tpu=[(1, 4, 2, 128), (3, 8, 2, 6)],
)
def test_shapes_and_ragged_rows(implementation, groups, share, kv_heads, dim):
  # The rows see the full cache, one row of it, and nothing of it.
  arrays, options = _inputs(
    groups=groups, share=share, kv_heads=kv_heads, dim=dim
  )
  assert options["prefix_end"].tolist() == [11, 1, 0]
  _check(implementation, arrays, options)


@_every(["size"], [(0,), (1,), (7,)], on_tpu=[(0,)])
def test_cache_of_any_size_and_all_to_all(implementation, size):
  arrays, options = _inputs(size=size, groups=2)
  options["local_mask"] = None
  _check(implementation, arrays, options)


@_EVERY
def test_one_node(implementation):
  arrays, options = _inputs(nodes=1)
  _check(implementation, arrays, options)


@_EVERY
def test_mask_shared_by_rows_and_groups(implementation):
  arrays, options = _inputs(groups=3)
  options["local_mask"] = np.tri(5, dtype=bool)[None, None]
  _check(implementation, arrays, options)


@_every(("groups", "size"), [(1, 0), (1, 11), (3, 0)], on_tpu=[(1, 11)])
def test_causal_by_name(implementation, groups, size):
  arrays, options = _inputs(groups=groups, size=size)
  options["local_mask"] = np.tri(5, dtype=bool)[None, None]
  expected = _check(implementation, arrays, options)
  causal = functools.partial(
    cascade_attention, local_mask=CAUSAL, implementation=implementation
  )
  with _interpreter(implementation):
    got = jax.jit(causal)(*arrays, prefix_end=options["prefix_end"])
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@_EVERY
def test_every_group_has_its_own_prefix_end(implementation):
  arrays, options = _inputs(groups=4)
  options["prefix_end"] = np.array(
    [[0, 1, 5, 11], [3, 2, 1, 0], [11, 11, 7, 4]], np.int32
  )
  _check(implementation, arrays, options)


@_EVERY
def test_every_node_has_its_own_window(implementation):
  arrays, options = _inputs(groups=2)
  # Node i stands at end + i; a window of 3 is shorter than the block of 5, so
  # the last nodes see nothing of the prefix.
  ends = options["prefix_end"][:, None, None]
  starts = ends + np.arange(5) - 3 + 1
  options["prefix_start"] = np.broadcast_to(
    np.maximum(starts, 0), (3, 2, 5)
  ).astype(np.int32)
  got = _check(implementation, arrays, options)
  options["prefix_start"] = np.zeros((3, 2, 5), np.int32)
  assert not np.allclose(got, _check(implementation, arrays, options))


@_every(["size"], [(0,), (11,)], on_tpu=[(11,)], implementations=_WITH_SINKS)
def test_sinks_join_the_denominator(implementation, size):
  arrays, options = _inputs(size=size)
  without = _check(implementation, arrays, options)
  options["sinks"] = np.linspace(-2, 3, 6).astype(np.float32)
  assert not np.allclose(without, _check(implementation, arrays, options))
  options["sinks"] = np.full(6, 60.0, np.float32)
  assert abs(_check(implementation, arrays, options)).max() < 1e-6


@pytest.mark.parametrize(
  ("implementation", "sinks"),
  [
    (_DENSE, None),
    *[(name, None) for name in _WITH_SINKS],
    *[(name, np.ones(6, np.float32)) for name in _WITH_SINKS],
  ],
)
def test_a_node_that_sees_nothing_is_zero(implementation, sinks):
  arrays, options = _inputs()
  options["local_mask"][:, :, 3] = False
  options["sinks"] = sinks
  got = _check(implementation, arrays, options)
  assert not got[2, :, 3].any()
  assert got[0, :, 3].any()


@_EVERY
def test_one_part_may_outweigh_the_other_by_far(implementation):
  arrays, options = _inputs()
  query, prefix_keys, prefix_values, local_keys, local_values = arrays
  for scaled in (
    (query, 60 * prefix_keys, prefix_values, local_keys, local_values),
    (query, prefix_keys, prefix_values, 60 * local_keys, local_values),
  ):
    _check(implementation, scaled, options, atol=1e-4)


@_EVERY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_lies_past_the_length_is_never_seen(implementation, dtype):
  arrays, options = _inputs()
  arrays = [np.array(jnp.asarray(x, dtype)) for x in arrays]
  clean = _run(implementation, arrays, options)
  for sign in (1, -1):
    for b, end in enumerate(options["prefix_end"]):
      arrays[1][b, :, end:] = sign * _POISON
      arrays[2][b, :, end:] = -sign * _POISON
    np.testing.assert_array_equal(clean, _run(implementation, arrays, options))


@_EVERY
def test_unused_nodes_are_finite_and_unseen(implementation):
  arrays, options = _inputs()
  used = np.tri(5, dtype=bool)[None, None]
  used = used & (np.arange(5) < 3) & (np.arange(5)[:, None] < 3)
  options["local_mask"] = used
  clean = _check(implementation, arrays, options)
  arrays[3][:, :, 3:], arrays[4][:, :, 3:] = 1e4, -1e4
  got = _run(implementation, arrays, options)
  assert np.isfinite(got).all()
  np.testing.assert_array_equal(clean[:, :, :3], got[:, :, :3])


@_EVERY
def test_bfloat16(implementation):
  arrays, options = _inputs(groups=2, dim=64)
  arrays = [np.array(jnp.asarray(x, jnp.bfloat16)) for x in arrays]
  got = _run(implementation, arrays, options)
  assert got.dtype == jnp.bfloat16
  expected = oracles.cascade_attention(
    *(x.astype(np.float64) for x in arrays), **options
  )
  np.testing.assert_allclose(got.astype(float), expected, atol=0.03)


def test_long_groups_go_through_in_slices(monkeypatch):
  arrays, options = _inputs(nodes=6, groups=2)
  options["prefix_start"] = np.tile(np.arange(6, dtype=np.int32), (3, 2, 1))
  options["sinks"] = np.linspace(-1, 1, 6).astype(np.float32)
  # 6 is cut into 3 slices of 2; 4 does not divide it: one piece.
  for most in (2, 4):
    monkeypatch.setattr(xla, "MAX_NODES", most)
    _program.cache_clear()
    _check("xla", arrays, options)
  _program.cache_clear()


@pytest.mark.parametrize(
  ("most", "tile"),
  [
    pytest.param(6, (1, 2), marks=pytest.mark.slow),
    (40, (2, 6)),
    pytest.param(1024, (4, 6), marks=pytest.mark.slow),
  ],
)
def test_nodes_go_through_the_tpu_in_tiles(monkeypatch, most, tile):
  arrays, options = _inputs(nodes=6, groups=4, size=21)
  rng = np.random.default_rng(2)
  options["prefix_end"] = rng.integers(0, 22, (3, 4)).astype(np.int32)
  options["prefix_start"] = rng.integers(0, 22, (3, 4, 6)).astype(np.int32)
  options["sinks"] = np.linspace(-1, 1, 6).astype(np.float32)
  monkeypatch.setattr(mosaic_tpu, "MAX_ROWS", most)
  assert mosaic_tpu._tile(4, 6, 3) == tile
  _program.cache_clear()
  _check("mosaic_tpu", arrays, options)
  _program.cache_clear()


def test_the_tpu_needs_only_the_blocks_that_are_seen():
  bounds = jnp.array(
    [
      [[[0, 9], [0, 9]], [[0, 8], [3, 8]], [[0, 0], [0, 0]]],
      [[[17, 20], [9, 20]], [[30, 20], [16, 17]], [[20, 20], [21, 20]]],
    ]
  )
  first, last = mosaic_tpu._needed_blocks(bounds, 8)
  assert first.tolist() == [[0, 0, 0], [1, 2, 0]]
  assert last.tolist() == [[2, 1, 0], [3, 3, 0]]
  # What is outside of them is not even multiplied by zero.
  arrays, options = _inputs(size=40, batch=2)
  ends = options["prefix_end"] = np.array([20, 31], np.int32)
  starts = ends[:, None, None] - np.arange(5) - 2
  options["prefix_start"] = starts.astype(np.int32)
  for cache in arrays[1:3]:
    cache[0, :, :8] = cache[0, :, 24:] = np.nan
    cache[1, :, :24] = cache[1, :, 32:] = np.nan
  _check("mosaic_tpu", arrays, options)


@pytest.mark.parametrize(
  ("size", "sinks"),
  [
    pytest.param(0, False, marks=pytest.mark.slow),
    pytest.param(0, True, marks=pytest.mark.slow),
    (11, False),
    pytest.param(11, True, marks=pytest.mark.slow),
  ],
)
def test_gradients_are_those_of_the_reference(size, sinks):
  arrays, options = _inputs(size=size, groups=2)
  options["local_mask"][:, :, 3] = False  # Row 2 sees nothing there at all.
  arrays = [jnp.asarray(x) for x in arrays]
  arrays += [jnp.linspace(-1, 1, 6)] if sinks else []
  weights = jnp.asarray(
    np.random.default_rng(1).standard_normal(arrays[0].shape)
  )

  def gradients(implementation):
    def loss(arrays):
      output = cascade_attention(
        *arrays[:5],
        prefix_end=jnp.asarray(options["prefix_end"]),
        local_mask=jnp.asarray(options["local_mask"]),
        sinks=arrays[5] if sinks else None,
        implementation=implementation,
      )
      return (weights * output).sum()

    return jax.jit(jax.grad(loss))(arrays)

  expected = gradients("reference")
  both = ("xla", "mosaic_tpu")
  for implementation in both if sinks else (*both, _DENSE):
    with _interpreter(implementation):
      got = gradients(implementation)
    for a, b in zip(got, expected, strict=True):
      assert np.isfinite(a).all()
      assert a.size == 0 or np.abs(b).max() > 0.01
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not got[0][2, :, 3].any()


def test_the_default_is_one_of_the_implementations():
  arrays, options = _inputs()
  _check(None, arrays, options)


def test_cudnn_says_why_it_cannot_run():
  arrays, options = _inputs()
  with pytest.raises(UsageError, match="float32': expected bfloat16"):
    _run("cudnn", arrays, options)
  arrays = [np.array(jnp.asarray(x, jnp.bfloat16)) for x in arrays]
  if not cudnn.is_available():
    with pytest.raises(UsageError, match="cudnn': expected an NVIDIA GPU"):
      _run("cudnn", arrays, options)


def test_the_tpu_kernel_says_why_it_cannot_run(monkeypatch):
  arrays, options = _inputs()
  attend = functools.partial(
    cascade_attention,
    prefix_end=options["prefix_end"],
    implementation="mosaic_tpu",
  )
  with pytest.raises(UsageError, match=r"mosaic_tpu': expected a TPU"):
    attend(*arrays)
  with _interpreter("mosaic_tpu"):
    with pytest.raises(UsageError, match="expected float32 or bfloat16"):
      attend(*(x.astype(np.float16) for x in arrays))
    mixed = [x.astype(jnp.bfloat16) for x in arrays[1:3]]
    with pytest.raises(UsageError, match="cache in the query's float32"):
      attend(arrays[0], *mixed, *arrays[3:])
    monkeypatch.setattr(mosaic_tpu, "MAX_LOCAL_KEYS", 4)
    with pytest.raises(UsageError, match="groups of at most 4 nodes, not 5"):
      attend(*arrays)
    monkeypatch.setattr(mosaic_tpu, "MAX_LOCAL_KEYS", 5)
    monkeypatch.setattr(mosaic_tpu, "MAX_ROWS", 2)
    with pytest.raises(UsageError, match="2 query heads to a key head, not 3"):
      attend(*arrays)
    monkeypatch.setattr(mosaic_tpu, "MAX_HEAD_DIM", 7)
    with pytest.raises(UsageError, match="heads of at most 7, not 8"):
      attend(*arrays)


def test_the_default_on_a_tpu(monkeypatch):
  name = lambda query, keys, dtype=jnp.bfloat16: default_implementation(
    jax.ShapeDtypeStruct(query, jnp.bfloat16), jax.ShapeDtypeStruct(keys, dtype)
  )
  query, keys = (1, 1, 70, 6, 64), (1, 2, 99, 64)
  assert name(query, keys) == "xla"
  with _interpreter("mosaic_tpu"):
    assert name(query, keys) == "mosaic_tpu"
    assert name(query, keys, jnp.float32) == "xla"
    assert name(query, (1, 2, 0, 64)) == "xla"  # Prefill.
    assert name((1, 512, 16, 6, 64), keys) == "xla"  # Training.


@pytest.mark.parametrize(
  ("available", "dtype", "nodes", "size", "name"),
  [
    (True, jnp.bfloat16, 64, 8, "cudnn"),
    (False, jnp.bfloat16, 64, 8, "xla"),
    (True, jnp.float32, 64, 8, "xla"),
    (True, jnp.bfloat16, 63, 8, "xla"),
    (True, jnp.bfloat16, 64, 7, "xla"),
  ],
)
def test_the_default_by_device_dtype_and_sizes(
  monkeypatch, available, dtype, nodes, size, name
):
  monkeypatch.setattr(cudnn, "is_available", lambda: available)
  query = jax.ShapeDtypeStruct((1, 2, nodes, 3, 64), dtype)
  keys = jax.ShapeDtypeStruct((1, 1, size, 64), dtype)
  assert default_implementation(query, keys) == name
  sinks = jax.ShapeDtypeStruct((3,), jnp.float32)
  assert default_implementation(query, keys, sinks) == "xla"


def test_unknown_implementation_is_refused_by_name():
  arrays, options = _inputs()
  with pytest.raises(UsageError, match=r"implementation='cuda'.*reference"):
    _run("cuda", arrays, options)


@pytest.mark.parametrize(
  ("index", "shape", "message"),
  [
    (1, (3, 2, 11, 9), "prefix"),
    (1, (3, 3, 11, 8), "prefix"),
    (2, (3, 2, 10, 8), "prefix"),
    (3, (3, 1, 4, 2, 8), "local"),
    (4, (2, 1, 5, 2, 8), "local"),
    (0, (3, 1, 5, 5, 8), "share"),
  ],
)
def test_shapes_that_do_not_fit_are_refused(index, shape, message):
  arrays, options = _inputs()
  arrays = list(arrays)
  arrays[index] = np.zeros(shape, np.float32)
  with pytest.raises(ValueError, match=message):
    _run("reference", arrays, options)

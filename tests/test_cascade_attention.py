"""One suite that every implementation of cascade attention passes."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from d2sd_jax import UsageError, cascade_attention
from d2sd_jax.kernels.cascade_attention import IMPLEMENTATIONS, xla

_EVERY = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
# Far beyond any real key or value, and finite in bfloat16 too.
_POISON = 1e30


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


def _run(implementation, arrays, options):
  as_jax = lambda x: None if x is None else jnp.asarray(x)
  options = {k: as_jax(v) for k, v in options.items()}

  @jax.jit
  def attend(arrays, options):
    return cascade_attention(*arrays, **options, implementation=implementation)

  return np.asarray(attend([jnp.asarray(x) for x in arrays], options))


def _check(implementation, arrays, options, atol=1e-5):
  got = _run(implementation, arrays, options)
  expected = oracles.cascade_attention(*arrays, **options)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol)
  return got


@_EVERY
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
  ("share", "kv_heads", "dim"), [(1, 5, 8), (3, 2, 64), (4, 1, 8), (8, 2, 6)]
)
def test_shapes_and_ragged_rows(implementation, groups, share, kv_heads, dim):
  # The rows see the full cache, one row of it, and nothing of it.
  arrays, options = _inputs(
    groups=groups, share=share, kv_heads=kv_heads, dim=dim
  )
  assert options["prefix_end"].tolist() == [11, 1, 0]
  _check(implementation, arrays, options)


@_EVERY
@pytest.mark.parametrize("size", [0, 1, 7])
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


@_EVERY
@pytest.mark.parametrize("size", [0, 11])
def test_sinks_join_the_denominator(implementation, size):
  arrays, options = _inputs(size=size)
  without = _check(implementation, arrays, options)
  options["sinks"] = np.linspace(-2, 3, 6).astype(np.float32)
  assert not np.allclose(without, _check(implementation, arrays, options))
  options["sinks"] = np.full(6, 60.0, np.float32)
  assert abs(_check(implementation, arrays, options)).max() < 1e-6


@_EVERY
@pytest.mark.parametrize("sinks", [None, np.ones(6, np.float32)])
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
    _check("xla", arrays, options)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("size", [0, 11])
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

  got, expected = gradients("xla"), gradients("reference")
  for a, b in zip(got, expected, strict=True):
    assert np.isfinite(a).all()
    assert a.size == 0 or np.abs(b).max() > 0.01
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert not got[0][2, :, 3].any()


def test_the_default_is_one_of_the_implementations():
  arrays, options = _inputs()
  _check(None, arrays, options)


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

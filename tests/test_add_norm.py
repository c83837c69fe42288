"""The residual sum with its norm: Hopper's kernel against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sd_jax.kernels import add_norm as module
from d2sd_jax.kernels.add_norm import add_norm
from d2sd_jax.kernels.cascade_attention import mosaic_gpu

needs_kernels = pytest.mark.skipif(
  not mosaic_gpu.has_kernels(), reason="needs jax 0.11 or newer"
)


def _inputs(width, rows=(1, 3)):
  rng = np.random.default_rng(width)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
  return draw(*rows, width), draw(*rows, width), 2 + draw(width)


def _interpreter():
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.InterpretGPUParams(detect_races=True)


def _check(got, x, update, weight):
  total, normed = got
  assert total.dtype == normed.dtype == x.dtype
  assert total.shape == normed.shape == x.shape
  exact = x if update is None else x + update
  np.testing.assert_array_equal(total, exact)
  wide = np.asarray(exact, np.float64)
  scale = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.25)
  expected = wide * scale * np.asarray(weight, np.float64)
  np.testing.assert_allclose(np.float64(normed), expected, 2**-7)


@needs_kernels
@pytest.mark.parametrize("with_update", [True, False])
# Whole warpgroups; some elements left over; of odd parts; just one over.
@pytest.mark.parametrize("width", [128, 576, 1000, 264])
def test_kernel(width, with_update):
  x, update, weight = _inputs(width)
  update = update if with_update else None
  got = add_norm(x, update, weight, 0.25, _interpreter())
  _check(got, x, update, weight)


def test_xla():
  x, update, weight = _inputs(24)
  _check(add_norm(x, update, weight, 0.25), x, update, weight)
  _check(add_norm(x, None, weight, 0.25), x, None, weight)


@needs_kernels
def test_gradient_is_that_of_xla():
  operands = _inputs(136)
  loss = lambda interpret: (
    lambda *xs: sum(
      (y.astype(jnp.float32) ** 2).sum() for y in add_norm(*xs, 0.25, interpret)
    )
  )
  every = (0, 1, 2)
  got = jax.grad(loss(_interpreter()), every)(*operands)
  expected = jax.grad(loss(None), every)(*operands)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(np.float64(a), np.float64(b), 0.05, 0.1)


def test_default(monkeypatch):
  x = jnp.zeros((2, 128, 128), jnp.bfloat16)
  assert not module.wins(x)
  monkeypatch.setattr(mosaic_gpu, "is_available", lambda: True)
  assert module.wins(x)
  assert not module.wins(x.astype(jnp.float32))
  assert not module.wins(jnp.zeros((257, 128), jnp.bfloat16))
  assert not module.wins(jnp.zeros((1, 120), jnp.bfloat16))

"""Products of rows, with norm, gate and residual, and what they should be."""

import jax.numpy as jnp
import numpy as np

EPS = 0.25


def operands(count, width, size, *, normed, gated, added):
  """x, the stored matrix, a norm and a residual, or `None` for these."""
  rng = np.random.default_rng(count)
  draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.bfloat16)
  out = size // 2 if gated else size
  return (
    *(draw(1, count, width), 0.1 * draw(size, width)),
    draw(width) if normed else None,
    draw(1, count, out) if added else None,
  )


def check(got, x, stored, norm, residual, gated):
  """Compares with float64."""
  x, stored, norm, residual = (
    None if a is None else np.asarray(a, np.float64)
    for a in (x, stored, norm, residual)
  )
  if norm is not None:
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * norm
  exact = x @ stored.T
  if gated:
    gate, up = np.split(exact, 2, axis=-1)
    exact = gate / (1 + np.exp(-gate)) * up
  exact = exact if residual is None else exact + residual
  assert got.dtype == jnp.bfloat16
  assert got.shape == exact.shape
  tolerance = 2**-7
  largest = np.abs(exact).max()
  np.testing.assert_allclose(
    np.float64(got), exact, tolerance, tolerance * largest
  )

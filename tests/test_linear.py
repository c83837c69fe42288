"""Products with their norm, gate and residual sum, against float64."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sd_jax import UsageError
from d2sd_jax.kernels import hopper, triton
from d2sd_jax.kernels.linear import few_rows, linear, lone_row
from d2sd_jax.kernels.quantized import quantize
from d2sd_jax.kernels.transposed import Transposed

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = 0.25
# Normed, gated, added to.
AROUND = (
  (False, False, False),
  (True, False, True),
  (False, True, True),
  (True, True, False),
)
# Inner size and matrix rows: pieces of 512 and 64, of 512 alone, of 64.
SIZES = ((576, 96), (1536, 160), (64, 32))


def _draw(dtype, *shapes):
  rng = np.random.default_rng(len(shapes[0]))
  return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def _operands(dtype, rows, width, size, normed, gated, added):
  """x, the stored matrix, a norm and a residual, or `None` for these."""
  out = size // 2 if gated else size
  x, stored, norm, residual = _draw(
    *(dtype, (1, rows, width), (size, width), (width,), (1, rows, out))
  )
  return x, stored, norm if normed else None, residual if added else None


def _oracle(x, stored, norm, residual, gated):
  x, stored, norm, residual = (
    None if a is None else np.asarray(a, np.float64)
    for a in (x, stored, norm, residual)
  )
  if norm is not None:
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * norm
  y = x @ stored.T
  if gated:
    gate, up = np.split(y, 2, axis=-1)
    y = gate / (1 + np.exp(-gate)) * up
  return y if residual is None else y + residual


def _check(got, exact, dtype):
  assert got.dtype == dtype
  assert got.shape == exact.shape
  tolerance = 1e-6 if dtype == jnp.float32 else 2**-8
  largest = np.abs(exact).max()
  np.testing.assert_allclose(
    np.float64(got), exact, 2 * tolerance, tolerance * largest
  )


@pytest.mark.parametrize(("normed", "gated", "added"), AROUND)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_xla(dtype, normed, gated, added):
  operands = _operands(dtype, 3, 576, 96, normed, gated, added)
  x, stored, norm, residual = operands
  exact = _oracle(*operands, gated)
  for matrix in (stored.T, Transposed(stored=stored)):
    got = linear(x, matrix, norm=norm, eps=EPS, gated=gated, residual=residual)
    _check(got, exact, dtype)


@pytest.mark.parametrize(("normed", "gated", "added"), AROUND)
@pytest.mark.parametrize(("width", "size"), SIZES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lone_row(dtype, width, size, normed, gated, added):
  operands = _operands(dtype, 1, width, size, normed, gated, added)
  x, stored, norm, residual = operands
  with triton.interpreter():
    got = lone_row.linear(x, stored, norm, EPS, gated, residual)
  _check(got, _oracle(*operands, gated), dtype)


@pytest.mark.parametrize("rows", [(), (1, 1), (1, 1, 1)])
def test_a_lone_row_may_have_any_rank(rows):
  x, stored = _draw(jnp.float32, (*rows, 64), (24, 64))
  with triton.interpreter():
    got = lone_row.linear(x, stored)
  _check(got, _oracle(x, stored, None, None, False), jnp.float32)


@pytest.mark.parametrize(
  ("rows", "size", "dtype", "wins"),
  [
    (1, 2**12, jnp.bfloat16, True),
    (1, 2**12, jnp.float32, True),
    (1, 2**12, jnp.int32, False),
    (1, 2**12 + 8, jnp.bfloat16, False),
    (2, 2**12, jnp.bfloat16, False),
    (0, 2**12, jnp.bfloat16, False),
  ],
)
def test_what_runs_where(monkeypatch, rows, size, dtype, wins):
  x = jnp.zeros((rows, 1024), dtype)
  matrix = Transposed(stored=jnp.zeros((size, 1024), dtype))
  assert not lone_row.wins(x, matrix)
  with triton.interpreter():
    assert lone_row.wins(x, matrix) == wins
    assert not lone_row.wins(x, matrix.stored.T)
    if dtype != jnp.int32:
      assert not lone_row.wins(x, quantize(matrix, summed=0))
    monkeypatch.setattr(triton, "language", None)
    assert not lone_row.wins(x, matrix)


def test_what_cannot_run_says_why():
  x, stored = _draw(jnp.bfloat16, (2, 64), (32, 64))
  matrix = Transposed(stored=stored)
  with pytest.raises(UsageError, match=r"implementation=.*few_rows"):
    linear(x, matrix, implementation="dense")
  with pytest.raises(UsageError, match=r"few_rows.*capability 9.x"):
    linear(x, matrix, implementation="few_rows")
  with pytest.raises(UsageError, match=r"lone_row.*an NVIDIA GPU"):
    linear(x, matrix, implementation="lone_row")
  with triton.interpreter():
    with pytest.raises(UsageError, match=r"lone_row.*one row alone"):
      linear(x, matrix, implementation="lone_row")
    with pytest.raises(UsageError, match=r"lone_row.*\[out, in\]"):
      linear(x, stored.T, implementation="lone_row")
  np.testing.assert_array_equal(
    linear(x, matrix, implementation="xla"), linear(x, stored.T)
  )


@pytest.mark.parametrize(
  ("change", "wins"),
  [
    ({}, True),
    ({"rows": 8}, True),
    ({"rows": 128}, True),
    ({"rows": 7}, False),
    ({"rows": 136}, False),
    ({"size": 2**12 + 32}, False),
    ({"size": 48}, False),
    ({"width": 96}, False),
    ({"dtype": jnp.float32}, False),
    ({"capability": "8.0"}, False),
    ({"capability": "10.0"}, False),
    ({"has_kernels": False}, False),
  ],
)
def test_when_a_few_rows_have_a_kernel(monkeypatch, change, wins):
  case = {"rows": 72, "width": 1024, "size": 64, "dtype": jnp.bfloat16}
  case |= {"capability": "9.0", "has_kernels": True} | change
  device = types.SimpleNamespace(
    platform="gpu", compute_capability=case["capability"]
  )
  monkeypatch.setattr(hopper, "target_device", lambda: device)
  monkeypatch.setattr(hopper, "has_kernels", lambda: case["has_kernels"])
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, case["dtype"])
  x = shape(1, case["rows"], case["width"])
  matrix = Transposed(stored=shape(case["size"], case["width"]))
  assert few_rows.wins(x, matrix) == wins
  assert not few_rows.wins(x, matrix.stored)


@pytest.mark.parametrize("wrong", ["matrix", "norm", "residual"])
@pytest.mark.parametrize("implementation", ["lone_row", "xla"])
def test_what_does_not_fit_is_refused(implementation, wrong):
  sizes = {"matrix": 64, "norm": 64, "residual": 32} | {wrong: 48}
  x, stored, norm, residual = _draw(
    *(jnp.bfloat16, (1, 64), (32, sizes["matrix"]), (sizes["norm"],)),
    (1, sizes["residual"]),
  )
  with triton.interpreter(), pytest.raises((TypeError, ValueError)):
    linear(
      *(x, Transposed(stored=stored)),
      **{"norm": norm, "eps": EPS, "residual": residual},
      implementation=implementation,
    )
  with pytest.raises(TypeError):
    few_rows.linear(x, stored, norm, EPS, False, residual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  ("width", "size", "normed", "gated", "added"),
  [
    # SmolLM2's four products, Qwen3-8B's, and widths that do not divide.
    (576, 960, True, False, False),
    (576, 576, False, False, True),
    (576, 3072, True, True, False),
    (1536, 576, False, False, True),
    (4096, 6144, True, False, False),
    (4096, 24_576, True, True, False),
    (12_288, 4096, False, False, True),
    (2880, 5120, True, False, False),
    (5120, 736, True, True, True),
  ],
)
def test_on_a_gpu(dtype, width, size, normed, gated, added):
  operands = _operands(dtype, 1, width, size, normed, gated, added)
  x, stored, norm, residual = operands
  got = linear(
    *(x, Transposed(stored=stored)),
    **{"norm": norm, "eps": EPS, "gated": gated, "residual": residual},
    implementation="lone_row",
  )
  _check(got, _oracle(*operands, gated), dtype)

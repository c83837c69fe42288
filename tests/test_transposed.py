"""Matrices stored `[out, in]`: the numbers are those of `[in, out]`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from d2sd_jax import Models, Sampling, TreeConfig, generate
from d2sd_jax.decoding.placement import put_drafter
from d2sd_jax.io import hf_tensors
from d2sd_jax.kernels import transposed
from d2sd_jax.kernels.dot import dot_float32, matmul
from d2sd_jax.kernels.quantized import QuantizedMatrix, quantize
from d2sd_jax.kernels.transposed import Transposed

pytestmark = pytest.mark.usefixtures("quick_compilation")

_SPEC = "...d,do->...o"


@pytest.fixture
def stored(monkeypatch):
  """Says how models that are made from then on hold their matrices."""

  def store(turned):
    for module in (hf_tensors, transposed):
      monkeypatch.setattr(module, "stores_transposed", lambda: turned)

  return store


def _models(config):
  tensors = tiny.target_tensors(config, 0)
  drafters = (tiny.drafter(tiny.DFLASH, 1), tiny.drafter(tiny.VP, 2))
  return Models(
    target=hf_tensors.target_from_tensors(config, tensors, jnp.float32),
    drafters=tuple(put_drafter(drafter, None) for drafter in drafters),
  )


@pytest.mark.parametrize("rows", [(1,), (2, 5), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products(rows, dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((*rows, 640)), dtype)
  matrix = jnp.asarray(rng.standard_normal((640, 31)), dtype)
  turned = Transposed(stored=matrix.T)
  exact = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
  got = matmul(_SPEC, x, turned)
  assert got.dtype == dtype
  tolerance = 1e-5 if dtype == jnp.float32 else 2**-8
  np.testing.assert_allclose(np.float64(got), exact, tolerance, 1e-4)
  wide = dot_float32(_SPEC, x, turned)
  assert wide.dtype == jnp.float32
  np.testing.assert_allclose(wide, exact, 1e-5, 1e-4)
  small, turned = (quantize(m, summed=0) for m in (matrix, turned))
  np.testing.assert_array_equal(turned.stored.values.T, small.values)
  np.testing.assert_array_equal(turned.stored.scales, small.scales)
  got, exact = (np.float64(matmul(_SPEC, x, m)) for m in (turned, small))
  np.testing.assert_allclose(got, exact, 2 * tolerance, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("config", [tiny.TARGET, tiny.GPT_OSS])
def test_decoding(stored, config, int8):
  made = []
  for turned in (False, True):
    stored(turned)
    models = _models(config)
    made.append(models.with_int8_drafting() if int8 else models)
  plain, turned = made
  layers = (turned.target.layers[0], turned.drafters[1].layers[0])
  for layer in layers:
    assert isinstance(layer.qkv_proj, Transposed)
    assert isinstance(layer.o_proj, Transposed)
  assert isinstance(turned.drafters[0].fc.stored, QuantizedMatrix) == int8
  sizes = [sum(x.nbytes for x in jax.tree.leaves(m)) for m in made]
  assert sizes[0] == sizes[1]
  sampling = Sampling.create(0.0)
  states = []
  for models in (plain, turned):
    state = tiny.start(
      models, [[3, 9, 4], [5], [1, 2, 3, 4, 5]], max_new=[14, 3, 9], capacity=40
    )
    states.append(
      generate(
        *(models, state, sampling, jnp.int32(40)),
        mode="d2sd",
        config=TreeConfig(block_size=5, num_branches=2),
      )
    )
  for name in ("tokens", "lengths", "accepted", "origins"):
    one, other = (getattr(state, name) for state in states)
    np.testing.assert_array_equal(one, other)
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, 1e-4, 1e-4),
    *(state.drafter_caches for state in states),
  )


def test_a_cpu_stores_none():
  is_turned = lambda x: isinstance(x, Transposed)
  leaves = jax.tree.leaves(_models(tiny.TARGET), is_leaf=is_turned)
  assert not any(map(is_turned, leaves))

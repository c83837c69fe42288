"""MXFP4 against hand-computed values, the definition and transformers."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from d2sd_jax.io.mxfp4 import dequantize

_VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def _halves(low, high):
  """A byte of two codes."""
  return low | high << 4


def test_values_by_hand():
  # The first code of a byte is its low half; 127 is a scale of one.
  blocks = np.zeros((2, 1, 16), np.uint8)
  blocks[0, 0, :8] = [_halves(i, i + 8) for i in range(8)]
  blocks[1, 0, 0] = _halves(7, 1)
  scales = np.array([[127], [124]], np.uint8)
  values = np.asarray(dequantize(blocks, scales, jnp.float32))
  assert values.shape == (2, 32)
  expected = [x for v in _VALUES for x in (v, -v)]
  assert values[0].tolist() == expected + [0.0] * 16
  assert values[1].tolist() == [6 / 8, 0.5 / 8] + [0.0] * 30


def test_rows_are_runs_of_blocks():
  rng = np.random.default_rng(0)
  blocks = rng.integers(256, size=(2, 3, 5, 16), dtype=np.uint8)
  scales = rng.integers(100, 150, size=(2, 3, 5), dtype=np.uint8)
  values = dequantize(blocks, scales, jnp.float32)
  assert values.shape == (2, 3, 160)
  np.testing.assert_array_equal(values, oracles.mxfp4(blocks, scales))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_code_at_every_scale(dtype):
  scales = np.arange(1, 253, dtype=np.uint8)[:, None]
  codes = [_halves(2 * (i % 8), 2 * (i % 8) + 1) for i in range(16)]
  blocks = np.broadcast_to(np.array(codes, np.uint8), (252, 1, 16))
  values = jax.jit(dequantize, static_argnums=2)(blocks, scales, dtype)
  assert values.dtype == dtype
  got = np.asarray(values, np.float64)
  expected = oracles.mxfp4(blocks, scales)
  # A float32 below its normal numbers may be flushed to zero.
  normal = np.abs(expected) >= 2.0**-126
  np.testing.assert_array_equal(got[normal], expected[normal])
  assert np.abs(got[~normal]).max() < 2.0**-126
  # The smallest scale of all gives nothing else.
  zero = np.zeros((1, 1), np.uint8)
  assert not np.asarray(dequantize(blocks[:1], zero, dtype)).any()


def test_transformers_reads_the_same():
  golden = goldens.load("tiny_gpt_oss")
  name = "model.layers.0.mlp.experts.down_proj"
  packed = (golden[f"{name}_{kind}"] for kind in ("blocks", "scales"))
  values = dequantize(*packed, jnp.float32).swapaxes(1, 2)
  np.testing.assert_array_equal(values, golden["dequantised"])
  assert np.unique(values).size > 20

"""What the device reaches by itself: copies, reads and products."""

import math

import jax.numpy as jnp

from d2sd_jax.bench.config import BenchConfig
from d2sd_jax.bench.floors import Rates
from d2sd_jax.bench.models import Draws
from d2sd_jax.bench.results import Results
from d2sd_jax.kernels.dot import matmul
from d2sd_jax.timing import time_step


def measure_rates(config: BenchConfig, results: Results) -> Rates:
  """Copies, reads and multiplies large arrays, as the floors' measure."""
  draws = Draws(config.seed, config.dtype_name)
  itemsize, side = draws.dtype.itemsize, config.gemm_size
  columns = min(4096, side)
  rows = max(1, config.copy_megabytes * 2**20 // (columns * itemsize))
  size = rows * columns * itemsize
  found = []
  for name, step, carry, inputs, amount in (
    ("rates/copy", _copy_step, draws.noise(rows, columns), None, 2 * size),
    *(
      (
        "rates/read",
        _read_step,
        draws.noise(columns),
        draws.noise(rows, columns),
        size,
      ),
      (
        "rates/product",
        _product_step,
        draws.noise(side, side),
        jnp.sign(draws.noise(side, side)),
        2 * side**3,
      ),
    ),
  ):
    timing = time_step(
      *(step, None, carry, inputs),
      repeats=config.repeats,
      seconds=config.seconds,
    )
    rate = amount / (timing.median / 1e3)
    results.add(name, {**timing.record(), "per_second": rate})
    found.append(rate)
  return Rates(bytes=max(found[:2]), flops=found[2])


def _copy_step(_, carry, inputs):
  """Reads all of an array and writes as much."""
  del inputs
  return -carry


def _read_step(_, carry, inputs):
  """Reads all of a matrix, and keeps one number of each column."""
  return jnp.maximum(carry, inputs.max(axis=0))


def _product_step(_, carry, inputs):
  """A product of two square matrices."""
  # Random ±1 of n rows: sums of about √n.
  scale = 1 / math.sqrt(inputs.shape[0])
  return (matmul("ij,jk->ik", carry, inputs) * scale).astype(carry.dtype)

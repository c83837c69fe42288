"""The benchmark at sizes that a CPU measures in seconds: a check that it runs.

    python -m d2sd_jax.bench --config=configs/bench_tiny.py --out=tiny.json

Its times say nothing about anything else.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """See `d2sd_jax.bench.config.BenchConfig`; the rest has its default."""
  return ConfigDict(
    {
      "vocab_size": 61,
      "hidden_size": 24,
      "intermediate_size": 40,
      "num_layers": 4,
      "num_heads": 6,
      "num_kv_heads": 2,
      "head_dim": 8,
      "drafter_layers": 1,
      "num_taps": 1,
      "block_size": 5,
      "num_branches": 2,
      "batches": (1, 3),
      "caches": (48,),
      "verify_nodes": (7, 18),
      "grid_nodes": 7,
      "op_shapes": ("1x7@48",),
      "op_implementations": ("xla", "jax.nn"),
      "repeats": 3,
      "seconds": 0.001,
      "copy_megabytes": 1,
      "gemm_size": 64,
      "out": "results/bench_tiny.json",
    },
    type_safe=False,
  )

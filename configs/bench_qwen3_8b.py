"""Qwen3-8B's shapes with two drafters of five layers, random weights.

    python -m d2sd_jax.bench --config=configs/bench_qwen3_8b.py

It is meant for one GPU of 141 GB. Of 16 rows and 32,768 keys, verification and
cycle need more of it than JAX takes by default: set
XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 (the cycle has not run so). All others fit
in 80. Expect half an hour for everything; `--minutes=9` measures what fits in
nine, and the same command goes on from there.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """See `d2sd_jax.bench.config.BenchConfig`; the rest has its default."""
  return ConfigDict(
    {
      "vocab_size": 151_936,
      "hidden_size": 4096,
      "intermediate_size": 12_288,
      "num_layers": 36,
      "num_heads": 32,
      "num_kv_heads": 8,
      "head_dim": 128,
      "dtype": "bfloat16",
      "op_shapes": (
        "1x16@8192",
        "1x80@1024",
        "1x80@8192",
        "1x80@32768",
        "8x80@4096",
      ),
      "op_implementations": (
        "mosaic_gpu",
        "xla",
        "cudnn",
        "jax.nn",
        "jax.nn_cudnn",
      ),
      "out": "results/bench_qwen3_8b.json",
    },
    type_safe=False,
  )

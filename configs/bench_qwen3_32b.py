"""Qwen3-32B's shapes with two drafters of five layers, random weights.

    python -m d2sd_jax.bench --config=configs/bench_qwen3_32b.py --mesh=tensor:4

Target and drafters are 76 GB in bfloat16. On four devices each has 27 GB of
that, the drafters whole, or 19 GB with `--shard_drafters`; on one device of
141 GB leave `--mesh` out, and give each mesh its own `--out`. What is expected
of it: `docs/scaling.md`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """See `d2sd_jax.bench.config.BenchConfig`; the rest has its default."""
  return ConfigDict(
    {
      "vocab_size": 151_936,
      "hidden_size": 5120,
      "intermediate_size": 25_600,
      "num_layers": 64,
      "num_heads": 64,
      "num_kv_heads": 8,
      "head_dim": 128,
      "dtype": "bfloat16",
      "caches": (1024, 8192),
      "out": "results/bench_qwen3_32b.json",
    },
    type_safe=False,
  )

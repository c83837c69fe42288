"""GPT-OSS-20B with its published DFlash drafter: the paper's second target.

    python decode.py --config=configs/gpt_oss_20b.py --prompt="Why blue?"

The experts are published in MXFP4, 13.8 GB in all, and are dequantised as they
are loaded: 41.8 GB for the target's weights in bfloat16. Needs the network on
the first run; `--target=FOLDER --drafter=FOLDER` name what is on disk instead.
No variable-prefix drafter is published for it; see `qwen3_8b.py`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """See `d2sd_jax.decoding.decode_config`; the rest has its default."""
  return ConfigDict(
    {
      "target": "openai/gpt-oss-20b",
      "drafter": "z-lab/gpt-oss-20b-DFlash",
      "mode": "dflash",
      "max_new_tokens": 2048,
    },
    type_safe=False,
  )

"""Qwen3-8B with its published DFlash drafter: the paper's first target.

    python decode.py --config=configs/qwen3_8b.py --prompt="Why blue?"

Needs 16.4 GB for the weights in bfloat16, and the network on the first
run; `--target=FOLDER --drafter=FOLDER` name what is on disk instead. No
variable-prefix drafter is published for it: `--mode=reuse` puts the first in
the place of the second, which the paper's ablation does too, and `--mode=d2sd
--vp_drafter=FOLDER` takes one that `train.py` made.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """See `d2sd_jax.decoding.decode_config`; the rest has its default."""
  return ConfigDict(
    {
      "target": "Qwen/Qwen3-8B",
      "drafter": "z-lab/Qwen3-8B-DFlash-b16",
      "mode": "dflash",
      "block_size": 16,
      "max_new_tokens": 2048,
    },
    type_safe=False,
  )

r"""The ladder of the shipped drafters on SmolLM2-135M-Instruct.

Every policy on seven tasks, T=0 and T=1, 256 new tokens:

    python -m d2sd_jax.eval.ladder --config=configs/ladder_smollm2.py \
        --out=runs/ladder.json
    python -m d2sd_jax.eval.pictures runs/ladder.json

`results/ladder_smollm2.json`, the default, is of one H200, and takes no rows of
another device or of other versions.

This measures in bfloat16 on a GPU. `--dtype=float32` adds the rows that show
that greedy output is identical, and `--sets=gsm8k --policies=d2sd
--temperatures=0` a single one. It is meant for a data-centre GPU; on a CPU try
`--num_prompts=2 --timing_prompts=1 --max_new_tokens=16 --out=FILE`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """See `d2sd_jax.eval.bench.LadderConfig`; the rest has its default."""
  return ConfigDict(
    {
      "target": "smollm2-135m",
      "drafter": "smollm2-135m-dflash",
      "vp_drafter": "smollm2-135m-vp",
      "temperatures": (0.0, 1.0),
      "num_prompts": 40,
      "max_new_tokens": 256,
      "out": "results/ladder_smollm2.json",
    },
    type_safe=False,
  )

"""Drafter 2 (variable prefix) for SmolLM2-135M-Instruct.

On the corpus of `smollm2_dflash.py`, warm-started from its result:

    python train.py --config=configs/smollm2_vp.py --workdir=runs/vp

The drafter is exported to `runs/vp/export`. What this reached, and how long it
took on which device, stands in the drafter's model card,
`checkpoints/smollm2-135m-vp/README.md`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """One run of `train.py`; see `d2sd_jax.config.TrainConfig`."""
  return ConfigDict(
    {
      "target": "smollm2-135m",
      "role": "vp_drafter",
      "init_from": "runs/dflash/export",
      "corpus": "runs/corpus.jsonl",
      "heldout": "runs/heldout.jsonl",
      "num_layers": 5,
      "block_size": 16,
      "mask_token_id": 16,
      "num_anchors": 32,
      "max_length": 384,
      "batch_size": 64,
      "num_steps": 4000,
      "optimizer": "muon",
      "learning_rate": 1e-3,
      "prefix_decay": 0.9,
      "seed": 1,
    },
    type_safe=False,
  )

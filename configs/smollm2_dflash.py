"""Drafter 1 (DFlash) for SmolLM2-135M-Instruct.

First let the target write a corpus (see `corpus_smollm2.py`), then distill:

    python -m d2sd_jax.training.corpus --config=configs/corpus_smollm2.py
    python train.py --config=configs/smollm2_dflash.py --workdir=runs/dflash

The drafter is exported to `runs/dflash/export`. How the one that ships
was made and what it reaches stands in its model card,
`checkpoints/smollm2-135m-dflash/README.md`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """One run of `train.py`; see `d2sd_jax.training.train_config.TrainConfig`."""
  return ConfigDict(
    {
      "target": "smollm2-135m",
      "role": "dflash",
      "corpus": "runs/corpus.jsonl",
      "heldout": "runs/heldout.jsonl",
      "num_layers": 5,
      "block_size": 16,
      # <empty_output>: a special id that the model never produces.
      "mask_token_id": 16,
      "num_anchors": 32,
      "max_length": 384,
      "batch_size": 64,
      "num_steps": 4000,
      "optimizer": "muon",
      "learning_rate": 1e-3,
      # After 1,500 steps from random weights α was 0.08 above exponential
      # weights' (results/ablation_smollm2.md). `loss: distillation` gave 0.10
      # more there, for a dearer step, and nothing from the shipped pair on.
      "slot_weighting": "d_pace",
      "seed": 0,
    },
    type_safe=False,
  )

"""Drafter 2 (variable prefix) for SmolLM2-135M-Instruct.

With the recipe and on the corpus of `smollm2_dflash.py`, from whose result it
starts:

    python train.py --config=configs/smollm2_vp.py --workdir=runs/vp

The drafter is exported to `runs/vp/export`. How the one that ships was made
and what it reaches stands in its model card,
`checkpoints/smollm2-135m-vp/README.md`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_DFLASH = Path(__file__).with_name("smollm2_dflash.py")


def get_config() -> ConfigDict:
  """One run of `train.py`; see `d2sd_jax.training.train_config.TrainConfig`."""
  config = runpy.run_path(str(_DFLASH))["get_config"]()
  config.update(
    {
      "role": "vp_drafter",
      "init_from": "runs/dflash/export",
      "prefix_decay": 0.9,
      "seed": 1,
    }
  )
  return config

"""SmolLM2-135M-Instruct with its two shipped drafters; `decode.py`'s default.

    python decode.py --prompt="Explain speculative decoding to a child."
    python decode.py --config=configs/smollm2.py --mode=compare \
        --prompt="Explain speculative decoding to a child."

Expect the same text in every mode, and fewer cycles than tokens in `dflash`
and fewer still in `d2sd`. On a CPU every row of a pass costs time, so the
block is shorter and the branches are fewer than an accelerator would like.
"""

import jax
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """See `d2sd_jax.config.DecodeConfig`; what is left out has its default."""
  on_cpu = jax.default_backend() == "cpu"
  return ConfigDict(
    {
      "target": "smollm2-135m",
      "drafter": "smollm2-135m-dflash",
      "vp_drafter": "smollm2-135m-vp",
      "mode": "d2sd",
      # None is the block that the drafter was trained with.
      "block_size": 6 if on_cpu else None,
      "num_branches": 2 if on_cpu else 4,
    },
    type_safe=False,
  )

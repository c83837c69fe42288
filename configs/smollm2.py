"""SmolLM2-135M-Instruct with its two shipped drafters; `decode.py`'s default.

    python decode.py --prompt="Explain speculative decoding to a child."
    python decode.py --config=configs/smollm2.py --mode=compare \
        --prompt="Explain speculative decoding to a child."

Expect the same text in every mode, and fewer cycles than tokens in `dflash`
and fewer still in `d2sd`. Mode `auto` takes what is fastest on this device: on
a CPU every row of a pass costs time, so the block is shorter there.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """See `d2sd_jax.decoding.decode_config`; the rest has its default."""
  return ConfigDict(
    {
      "target": "smollm2-135m",
      "drafter": "smollm2-135m-dflash",
      "vp_drafter": "smollm2-135m-vp",
      "mode": "auto",
    }
  )

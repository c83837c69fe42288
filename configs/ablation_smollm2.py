"""What each choice in training SmolLM2-135M-Instruct's drafters is worth.

On the corpus of `corpus_smollm2.py`, each arm 1,500 steps on the same batches:

    python -m d2sd_jax.training.ablation --config=configs/ablation_smollm2.py
    python -m d2sd_jax.training.ablation --config=configs/ablation_smollm2.py \
        --arms='layers_*' --minutes=9

It is meant for a data-centre GPU: at the 33 ms a step of an H200, 50 s of
training an arm, besides compiling and decoding. `--list` prints the arms.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """See `d2sd_jax.training.ablation_config.AblationConfig`."""
  vp = {"role": "vp_drafter"}
  warm = {**vp, "init_from": "arm:dflash"}
  return ConfigDict(
    {
      "base": "smollm2_dflash",
      "overrides": {
        "num_steps": 1500,
        "batch_size": 32,
        "eval_sequences": 256,
      },
      "arms": {
        "dflash": {},
        "layers_4": {"num_layers": 4},
        "layers_3": {"num_layers": 3},
        "exponential": {"slot_weighting": "exponential"},
        "distillation": {"loss": "distillation"},
        "vp_scratch": vp,
        "vp_warm": warm,
        # The released code's prior, without l = 0.
        "vp_prefix_1": {**warm, "min_prefix_length": 1},
        # Prefixes that end where drafter 1 fails, in three blocks of four.
        "vp_failing": {**warm, "first_drafter": "arm:dflash"},
      },
      "decodings": {
        "vp_may_repeat": {"arm": "vp_warm", "forbid_repeat": False},
      },
      # The first of each is its baseline.
      "groups": {
        "layers": ("dflash", "layers_4", "layers_3"),
        "slot_weighting": ("dflash", "exponential"),
        "loss": ("dflash", "distillation"),
        "start": ("vp_scratch", "vp_warm"),
        "min_prefix_length": ("vp_warm", "vp_prefix_1"),
        "first_drafter": ("vp_warm", "vp_failing"),
        "forbid_repeat": ("vp_warm", "vp_may_repeat"),
      },
      "drafter": "arm:dflash",
      "num_prompts": 128,
      "max_new_tokens": 128,
      "out": "results/ablation_smollm2.json",
    },
    type_safe=False,
    # Leaves arms and groups in this order.
    convert_dict=False,
  )

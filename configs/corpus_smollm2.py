"""A corpus that SmolLM2-135M-Instruct writes itself, to train drafters on.

    python -m d2sd_jax.eval.prompts all --follow_ups \
        --out=runs/evaluation.jsonl
    python -m d2sd_jax.training.corpus --config=configs/corpus_smollm2.py

The first command fetches the evaluation prompts, which are kept out. Expect
more than 20 M answer tokens in `runs/corpus.jsonl`, about 300 MB; how fast
they were written stands in `runs/corpus.manifest.json`. Stopped, the same
command goes on. On a CPU, try `--num_conversations=64 --batch_size=16`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """See `d2sd_jax.training.corpus_config`; the rest has its default."""
  return ConfigDict(
    {
      "target": "smollm2-135m",
      "out": "runs/corpus.jsonl",
      "heldout": "runs/heldout.jsonl",
      "exclude": "runs/evaluation.jsonl",
      "num_conversations": 120_000,
      "num_heldout": 1024,
      "batch_size": 2048,
      "seed": 0,
      # Questions, passages and options from pinned packages, read as data.
      "share_nq_open": 0.03,
      "share_boolq": 0.06,
      "share_mmlu": 0.02,
      # Needs the extra: pip install 'd2sd-jax[corpus]'; 0.09 is a good share.
      "share_reasoning_gym": 0.0,
    },
    type_safe=False,
  )

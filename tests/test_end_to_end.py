"""The shipped drafters on the real target, through the real script."""

import json

import pytest

import decode
from d2sd_jax import cli, load_drafter
from d2sd_jax.io.fetch import SMOLLM2_135M

PROMPTS = (
  "Explain speculative decoding to a child.",
  "Write a Python function that reverses a string.",
)


@pytest.mark.parametrize("role", ["dflash", "vp"])
def test_shipped_drafters_fit_the_default_target(role):
  drafter = load_drafter(f"smollm2-135m-{role}", SMOLLM2_135M)
  mode = {"dflash": "dflash", "vp": "vp_drafter"}[role]
  assert drafter.config.training_mode == mode
  assert drafter.config.block_size == 16
  assert drafter.config.target_layer_ids == (1, 8, 14, 20, 27)
  assert drafter.config.mask_token_id == 16


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_compare_is_lossless_and_drafts_are_accepted(
  smollm2_path, tmp_path, temperature
):
  prompts = tmp_path / "prompts.jsonl"
  lines = [json.dumps({"prompt": prompt}) for prompt in PROMPTS]
  prompts.write_text("\n".join(lines))
  out = tmp_path / "out.json"
  flags = [
    f"--target={smollm2_path}",
    "--mode=compare",
    f"--prompts_file={prompts}",
    "--batch_size=2",
    "--max_new_tokens=24",
    "--dtype=float32",
    "--block_size=6",
    "--num_branches=2",
    f"--temperature={temperature}",
    f"--json={out}",
  ]
  assert cli.run(decode.main, flags) == 0
  rows = json.loads(out.read_text())
  by_mode = {
    mode: [r for r in rows if r["mode"] == mode]
    for mode in ("ar", "dflash", "d2sd")
  }
  tokens = {mode: [r["tokens"] for r in rs] for mode, rs in by_mode.items()}
  # No near-tie within these few tokens: the margins are far above 1e-3.
  assert tokens["dflash"] == tokens["ar"]
  assert tokens["d2sd"] == tokens["ar"]
  cycles = {mode: sum(r["cycles"] for r in rs) for mode, rs in by_mode.items()}
  assert cycles["d2sd"] <= cycles["dflash"] < cycles["ar"]

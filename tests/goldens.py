"""What recorded arrays must equal; shared by recordings, new and old.

How they were made: `data/record_tiny.py`, `data/record_dflash.py`.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from safetensors.numpy import save_file

from d2sd_jax import (
  Models,
  Sampling,
  TreeConfig,
  build_prefix_tree,
  generate,
  load_drafter,
)
from d2sd_jax.io.hf_config import target_config_from_hf
from d2sd_jax.io.hf_names import target_tensors
from d2sd_jax.io.hf_tensors import target_from_tensors
from d2sd_jax.models.cache import append

DATA = Path(__file__).parent / "data"
# Of logits, of drafters' outputs, and of features, there relative.
TOLERANCE = 1e-3
_CYCLES = jnp.int32(10**6)


def load(name):
  with np.load(DATA / f"{name}.npz") as file:
    return dict(file)


def target(golden):
  """Config and published tensors of a recorded model."""
  config = target_config_from_hf(json.loads(str(golden["config"])), "golden")
  if config.num_experts:  # whose weights were drawn as the published are
    config = dataclasses.replace(config, mxfp4=True)
  return config, {k: golden[k] for k in target_tensors(config)}


def relative(got, expected):
  """The largest error, of each vector in units of its largest entry."""
  scale = np.abs(expected).max(-1, keepdims=True)
  return float((np.abs(np.asarray(got) - expected) / scale).max())


def check_target(golden):
  """Logits and every layer's output; returns the largest errors of both."""
  config, tensors = target(golden)
  model = target_from_tensors(config, tensors, jnp.float32)
  # Every layer, so that a tap that is one off is seen.
  taps = tuple(range(config.num_layers))
  run = jax.jit(type(model).prefill, static_argnums=3)
  logits = features = 0.0
  for length in range(1, golden["ids"].shape[1] + 1):
    # Rows that are shorter end where they end: one call checks all of them.
    lengths = np.minimum(length, golden["lengths"])
    ids = jnp.asarray(golden["ids"])
    output = run(model, ids, jnp.asarray(lengths), taps)
    for row, n in enumerate(lengths):
      expected = golden["logits"][row, n - 1]
      logits = max(logits, float(np.abs(output.logits[row] - expected).max()))
  for row, n in enumerate(golden["lengths"]):
    for layer in taps:
      got = output.features[row, :n, layer]
      features = max(features, relative(got, golden["hidden"][layer, row, :n]))
  assert logits < TOLERANCE
  assert features < TOLERANCE
  return logits, features


def check_tree(golden):
  """Nodes of a trunk with branches, behind 1 to 9 tokens; the largest error.

  The trunk is the longest prompt's own text, so that its logits are recorded.
  """
  config, tensors = target(golden)
  model = target_from_tensors(config, tensors, jnp.float32)
  ids = jnp.asarray(golden["ids"][:1])
  prefill = jax.jit(type(model).prefill, static_argnums=3)
  kv = prefill(model, ids, jnp.asarray(golden["lengths"][:1]), ()).kv
  zero = jnp.zeros((1,), jnp.int32)
  cache = append(model.init_cache(1, 19), kv, zero)
  run = jax.jit(type(model).score_tree, static_argnums=4)
  error = 0.0
  for start in range(1, 10):
    trunk = ids[:, start : start + 4]
    others = (trunk[:, None] + jnp.array([[1], [2]])) % config.vocab_size
    tree = build_prefix_tree(trunk, others, jnp.array([[0, 2]]), 8)
    scores = run(model, tree, cache, zero + start, ())
    expected = golden["logits"][0, start : start + 4]
    error = max(error, float(np.abs(scores.logits[0, :4] - expected).max()))
  assert error < TOLERANCE
  return error


def check_greedy(golden):
  """64 tokens that follow each prompt, through the decode loop."""
  config, tensors = target(golden)
  models = Models(target=target_from_tensors(config, tensors, jnp.float32))
  prompts = [
    ids[:n].tolist()
    for ids, n in zip(golden["ids"], golden["lengths"], strict=True)
  ]
  prompts.append([3, 1])  # A row that only fills the batch.
  new = golden["greedy_ids"].shape[1]
  assert new == 64
  state = tiny.start(
    models, prompts, max_new=[new] * 3 + [0], pad_to=16, capacity=16 + new
  )
  state = generate(
    models, state, Sampling.create(), _CYCLES, mode="ar", config=TreeConfig()
  )
  assert tiny.answers(state, prompts)[:3] == golden["greedy_ids"].tolist()
  assert state.lengths[3] == 2


def check_drafter(golden, folder):
  """Every block behind every context; returns the largest error."""
  raw = json.loads(str(golden["config"]))
  (folder / "config.json").write_text(json.dumps(raw))
  weights = {k: v for k, v in golden.items() if k.endswith(".weight")}
  save_file(weights, folder / "model.safetensors")
  drafter = load_drafter(folder)
  fill = jax.jit(lambda drafter, *args: drafter.context_kv(*args))
  denoise = jax.jit(lambda drafter, *args: drafter(*args))
  cache, length, error = drafter.init_cache(1, 23), 0, 0.0
  for block, count, expected in zip(
    golden["embeddings"], golden["accepted"], golden["outputs"], strict=True
  ):
    positions = length + jnp.arange(count)
    new = golden["features"][length : length + count]
    rows = fill(drafter, jnp.asarray(new)[None], positions[None])
    cache = append(cache, rows, jnp.array([length]))
    length += int(count)
    at = length + jnp.arange(len(block))
    slots = jnp.asarray(block)[None, None]
    output = denoise(drafter, slots, at[None, None], cache, jnp.array([length]))
    error = max(error, float(np.abs(output[0, 0] - expected).max()))
  assert error < TOLERANCE
  for i in range(drafter.config.num_layers):
    keys, values = (x[0, :, :length] for x in cache.layer(i))
    np.testing.assert_allclose(keys, golden["keys"][i], atol=TOLERANCE)
    np.testing.assert_allclose(values, golden["values"][i], atol=TOLERANCE)
  return error

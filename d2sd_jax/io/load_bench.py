"""Times the loading of a full-size folder, then decodes with what was loaded.

    python -m d2sd_jax.io.load_bench --folder=DIR

writes a target of Qwen3-8B's layout with random weights into DIR (16 GB, kept
and used again), times a plain sequential read of its files plus a copy of the
bytes to the device, then `load_target`. The files are in the page cache both
times. Random drafters then decode in mode `d2sd`; and a target of the first
layers alone, in float32, shows that `d2sd` gives the tokens of `ar`.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from d2sd_jax import cli
from d2sd_jax.config import (
  DrafterConfig,
  TargetConfig,
  TreeConfig,
  default_target_layer_ids,
)
from d2sd_jax.decoding.answers import Request
from d2sd_jax.decoding.session import Session
from d2sd_jax.decoding.state import Models
from d2sd_jax.errors import require
from d2sd_jax.io.hf_config import target_config_from_hf
from d2sd_jax.io.hf_folder import (
  CONFIG_FILE,
  INDEX_FILE,
  TensorFolder,
  read_json,
)
from d2sd_jax.io.hf_names import target_tensors
from d2sd_jax.io.hf_tensors import target_from_tensors
from d2sd_jax.io.models import load_target
from d2sd_jax.io.paths import atomic_write, user_path
from d2sd_jax.models.drafter import Drafter, FusedDrafter
from d2sd_jax.models.target import LlamaTarget
from d2sd_jax.sampling import Sampling

QWEN3_8B: Mapping[str, Any] = {
  "model_type": "qwen3",
  "vocab_size": 151_936,
  "hidden_size": 4096,
  "intermediate_size": 12_288,
  "num_hidden_layers": 36,
  "num_attention_heads": 32,
  "num_key_value_heads": 8,
  "head_dim": 128,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1e6,
  "max_position_embeddings": 40_960,
  "tie_word_embeddings": False,
}
SHARD_BYTES = 4 * 10**9
_READ_BYTES = 64 * 2**20
EXAMPLES = """\
  python -m d2sd_jax.io.load_bench --folder=/data/random_qwen3_8b
  python -m d2sd_jax.io.load_bench --folder=/data/mine --config_json=config.json
"""


def write_random_target(folder: Path, raw: Mapping[str, Any]) -> None:
  """A folder of a target with random bfloat16 weights, shard by shard.

  Args:
    folder: to be written; the index comes last, so a folder that has one is
      whole.
    raw: what its `config.json` says.
  """
  folder.mkdir(parents=True, exist_ok=True)
  shapes = target_tensors(target_config_from_hf(raw, CONFIG_FILE))
  weight_map: dict[str, str] = {}
  for number, names in enumerate(_shards(shapes)):
    shard = f"model-{number + 1:05}.safetensors"
    tensors = {name: _random(name, shapes[name]) for name in names}
    with atomic_write(folder / shard) as temporary:
      save_file(tensors, temporary)
    weight_map |= dict.fromkeys(names, shard)
  for name, value in (
    (CONFIG_FILE, dict(raw)),
    (INDEX_FILE, {"weight_map": weight_map}),
  ):
    with atomic_write(folder / name) as temporary:
      temporary.write_text(json.dumps(value))


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
  """Names, as many together as fit into a shard."""
  names: list[str] = []
  size = 0
  for name, shape in shapes.items():
    num_bytes = 2 * int(np.prod(shape))
    if names and size + num_bytes > SHARD_BYTES:
      yield names
      names, size = [], 0
    names.append(name)
    size += num_bytes
  yield names


def _random(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Norms near one, all else small; drawn on the device."""
  seed = int.from_bytes(name.encode()[-8:], "little") % 2**31
  draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
  value = draw(jax.random.key(seed), shape, jnp.bfloat16)
  scaled = 1 + 0.1 * value if len(shape) == 1 else 0.02 * value
  return np.asarray(scaled)


def plain_seconds(folder: Path) -> tuple[float, float, int]:
  """A sequential read of all shards, and a copy of the bytes to the device.

  Returns:
    Seconds of either, and the bytes.
  """
  buffer = np.empty(_READ_BYTES, np.uint8)
  reading = copying = 0.0
  total = 0
  for path in sorted(folder.glob("*.safetensors")):
    with path.open("rb", buffering=0) as file:
      while True:
        start = time.perf_counter()
        count = file.readinto(buffer.data)
        read = time.perf_counter()
        if not count:
          break
        jax.device_put(buffer[:count]).block_until_ready()
        copying += time.perf_counter() - read
        reading += read - start
        total += count
  return reading, copying, total


def random_drafters(
  target: TargetConfig, dtype: Any
) -> tuple[FusedDrafter, ...]:
  """Two drafters of the published shape, with random weights."""
  layers = 5 if target.num_layers >= 10 else 1
  config = DrafterConfig(
    vocab_size=target.vocab_size,
    hidden_size=target.hidden_size,
    intermediate_size=target.intermediate_size,
    num_layers=layers,
    num_heads=target.num_heads,
    num_kv_heads=target.num_kv_heads,
    head_dim=target.head_dim,
    rope_theta=target.rope_theta,
    rms_norm_eps=1e-6,
    max_length=target.max_length,
    block_size=16,
    mask_token_id=target.vocab_size - 1,
    target_layer_ids=default_target_layer_ids(target.num_layers, layers),
    num_target_layers=target.num_layers,
  )
  make = lambda seed: Drafter(config, rngs=nnx.Rngs(seed), dtype=dtype).fuse()
  return make(0), make(1)


def decode(
  target: LlamaTarget, drafters: Sequence[FusedDrafter], mode: str, tokens: int
) -> tuple[list[int], float]:
  """Greedy tokens behind a made-up prompt, and milliseconds per cycle."""
  vocabulary = target.config.vocab_size
  prompt = np.random.default_rng(0).integers(0, vocabulary, 50).tolist()
  request = Request(sequence_id=0, tokens=tuple(prompt))
  session = Session(
    Models(target=target, drafters=tuple(drafters) if mode != "ar" else ()),
    [request],
    Sampling.create(),
    mode=mode,
    tree=TreeConfig(),
    max_new_tokens=tokens,
    stop_ids=(),
  )
  session.decode([request])
  (answer,) = session.decode([request])
  cycles = len(answer.accepted_per_cycle)
  return answer.tokens, 1e3 * answer.decode_seconds / cycles


def first_layers(folder: Path, count: int) -> LlamaTarget:
  """A target of the folder's first layers alone, in float32."""
  raw = {**read_json(folder / CONFIG_FILE), "num_hidden_layers": count}
  config, tensors = (
    target_config_from_hf(raw, CONFIG_FILE),
    TensorFolder(folder),
  )
  wanted = {name: tensors[name] for name in target_tensors(config)}
  return target_from_tensors(config, wanted, jnp.float32)


def main(arguments: Sequence[str]) -> None:
  """Writes the folder if need be, then times, decodes and compares.

  Args:
    arguments: of the command line.
  """
  parser = cli.FlagParser(
    "-m d2sd_jax.io.load_bench", str(__doc__).split("\n")[0], EXAMPLES
  )
  add = parser.add_argument
  add("--folder", required=True, help="of the random target, made if absent")
  add("--config_json", help="another target's; default Qwen3-8B's")
  add("--tokens", type=cli.whole_number, default=64, help="to decode")
  add("--layers", type=cli.whole_number, default=4, help="of the float32 slice")
  flags, _ = parser.parse(arguments)
  for name in ("tokens", "layers"):
    require(getattr(flags, name) > 1, name, getattr(flags, name), "2 or more")
  folder = user_path(flags.folder)
  cli.setup_jax_cache()

  if not (folder / INDEX_FILE).is_file():
    given = flags.config_json
    raw = QWEN3_8B if given is None else read_json(user_path(given))
    write_random_target(folder, raw)
  plain_seconds(folder)
  reading, copying, total = plain_seconds(folder)
  start = time.perf_counter()
  target = jax.block_until_ready(load_target(folder, jnp.bfloat16))
  loading = time.perf_counter() - start
  print(
    f"{total / 1e9:.2f} GB: plain read {reading:.2f} s, copy {copying:.2f} s,"
    f" load {loading:.2f} s, {loading / (reading + copying):.2f} of both"
    f" ({jax.devices()[0].device_kind})",
    flush=True,
  )
  drafters = random_drafters(target.config, jnp.bfloat16)
  tokens, ms = decode(target, drafters, "d2sd", flags.tokens)
  print(f"d2sd: {len(tokens)} tokens, {ms:.3f} ms a cycle", flush=True)
  del target, drafters

  few = first_layers(folder, flags.layers)
  drafters = random_drafters(few.config, jnp.float32)
  answers = [
    decode(few, drafters, mode, flags.tokens)[0] for mode in ("ar", "d2sd")
  ]
  same = "identical" if answers[0] == answers[1] else "different"
  print(f"float32, {flags.layers} layers: d2sd and ar are {same}")


if __name__ == "__main__":
  cli.exit_with(cli.run(main))

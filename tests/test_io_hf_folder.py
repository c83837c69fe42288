"""Targets from Hugging Face folders, good and bad."""

import json
import os
import subprocess
import sys

import hf_folders
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hf_folders import QWEN3, write_target
from safetensors.numpy import load_file, save_file

from d2sd_jax import Drafter, DrafterConfig, UsageError, cli
from d2sd_jax.io import models as io_models
from d2sd_jax.io.drafter_format import save_drafter
from d2sd_jax.io.hf_config import target_config_from_hf
from d2sd_jax.io.hf_folder import INDEX_FILE, WEIGHTS_FILE, TensorFolder
from d2sd_jax.io.hf_names import HEAD
from d2sd_jax.io.hf_tensors import target_from_tensors
from d2sd_jax.io.models import (
  load_target,
  load_tokenizer,
  read_target_config,
  target_path,
  target_sha256,
)
from d2sd_jax.io.paths import find_checkpoint

CONFIG = target_config_from_hf(QWEN3, "config")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_its_tensors(tmp_path, shards):
  tensors = hf_folders.random_tensors(CONFIG)
  folder = write_target(tmp_path / "target", shards=shards, tensors=tensors)
  found = TensorFolder(folder)
  assert set(found) == set(tensors)
  for name, value in tensors.items():
    np.testing.assert_array_equal(found[name], value)
    assert found[name].dtype == ml_dtypes.bfloat16
  assert read_target_config(folder) == CONFIG
  loaded = load_target(folder, "float32")
  expected = target_from_tensors(CONFIG, tensors, jnp.float32)
  jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_large_tensors_are_read_in_parts(tmp_path, monkeypatch):
  monkeypatch.setattr("d2sd_jax.io.hf_folder._CHUNK", 1000)
  value = np.random.default_rng(0).normal(size=(57, 91)).astype(np.float32)
  save_file({"a": value[:3], "b": value}, tmp_path / WEIGHTS_FILE)
  np.testing.assert_array_equal(TensorFolder(tmp_path)["b"], value)


def test_a_part_of_a_tensor_is_what_is_asked_for(tmp_path):
  value = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)
  save_file({"a": value[:2], "b": value}, tmp_path / WEIGHTS_FILE)
  folder = TensorFolder(tmp_path)
  for index in (
    (slice(2, 5),),
    (slice(None), slice(1, 3)),
    (slice(6, 9), slice(None), slice(2, None)),
  ):
    np.testing.assert_array_equal(folder.part("b", index), value[index])


# Devices are simulated in a process of its own.
_SHARDED = """
import sys
from pathlib import Path
import jax, numpy as np
from d2sd_jax import UsageError
from d2sd_jax.decoding.placement import shardings, weight_specs
from d2sd_jax.io.hf_folder import TensorFolder
from d2sd_jax.io.hf_tensors import target_from_tensors
from d2sd_jax.io.models import load_target, read_target_config
from d2sd_jax.sharding import DECODING_AXES, make_mesh

CONFIG = read_target_config(sys.argv[1])

mesh = make_mesh("data:2,tensor:2", DECODING_AXES)
largest, part = {}, TensorFolder.part

def noted(self, name, index):
  found = part(self, name, index)
  largest[name] = max(largest.get(name, 0), found.size)
  return found

TensorFolder.part = noted

folder = sys.argv[1]
plain = load_target(folder, "float32")
largest.clear()
split = load_target(folder, "float32", mesh=mesh)
specs = jax.tree.leaves(shardings(mesh, weight_specs(split)))
for leaf, place in zip(jax.tree.leaves(split), specs, strict=True):
  assert leaf.sharding.is_equivalent_to(place, leaf.ndim), leaf
layer, whole = split.layers[1], plain.layers[1]
equal = np.testing.assert_array_equal
# Six query heads, two key heads and two value heads, each of ten columns.
q, k, v = np.split(np.asarray(whole.qkv_proj), (60, 80), axis=1)
gate, up = np.split(np.asarray(whole.gate_up_proj), 2, axis=1)
for shard in layer.qkv_proj.addressable_shards:
  i = shard.device.id % 2
  own = [q[:, 30 * i :][:, :30], k[:, 10 * i :][:, :10], v[:, 10 * i :][:, :10]]
  equal(shard.data, np.concatenate(own, axis=1))
for shard in layer.gate_up_proj.addressable_shards:
  half = slice(20 * (shard.device.id % 2), 20 * (shard.device.id % 2) + 20)
  equal(shard.data, np.concatenate([gate[:, half], up[:, half]], axis=1))
for name in ("o_proj", "down_proj", "input_norm", "q_norm"):
  equal(getattr(layer, name), getattr(whole, name))
equal(split.embedding, plain.embedding)
equal(split.lm_head, plain.lm_head)
assert [s.data.shape for s in layer.o_proj.addressable_shards] == [(30, 24)] * 4
assert largest["model.layers.1.self_attn.q_proj.weight"] == 30 * 24
assert largest["model.layers.1.mlp.up_proj.weight"] == 20 * 24
try:
  raw = TensorFolder(Path(folder))
  name = "model.layers.1.self_attn.q_proj.weight"
  raw.tensors[name] = raw.tensors["lm_head.weight"]
  target_from_tensors(CONFIG, raw, "float32", mesh=mesh)
except UsageError as error:
  print("same", error)
"""


@pytest.mark.slow
def test_each_device_reads_its_own_part(tmp_path):
  folder = write_target(tmp_path / "target", shards=2)
  flag = "--xla_force_host_platform_device_count=4"
  done = subprocess.run(
    [sys.executable, "-c", _SHARDED, str(folder)],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag},
  )
  assert done.returncode == 0, done.stderr
  name = "model.layers.1.self_attn.q_proj.weight"
  told = f"target tensor {name}: shape (270, 24), expected (60, 24)"
  assert done.stdout == f"same {told}\n"


def test_checksum_of_a_folder_sees_every_file(tmp_path):
  folder = write_target(tmp_path / "target")
  before = target_sha256(folder)
  assert before == target_sha256(folder)
  (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
  assert target_sha256(folder) != before


def test_a_hub_id_is_for_what_is_no_path(tmp_path, monkeypatch):
  import huggingface_hub

  folder = write_target(tmp_path / "hub")
  asked = []

  def fetch(name, allow_patterns):
    assert allow_patterns == ["*.json", "*.jinja", "*.safetensors"]
    asked.append(name)
    return str(folder)

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
  assert target_path("owner/model") == folder
  assert find_checkpoint("owner/model", "vp_drafter") == folder
  assert asked == ["owner/model"] * 2
  write_target(tmp_path / "owner" / "model")
  assert target_path("owner/model").resolve() == tmp_path / "owner" / "model"

  def fail(name, allow_patterns):
    raise ConnectionError("no\nnetwork")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
  for find, field in ((target_path, "target"), (find_checkpoint, "drafter")):
    with pytest.raises(UsageError, match=rf"^{field}='a/b': .*\(no network\)"):
      find("a/b")


# One process for each, since a peak is a process's.
_PEAK = """
import resource, sys
import numpy as np
from d2sd_jax.io.hf_folder import TensorFolder
folder = TensorFolder(__import__("pathlib").Path(sys.argv[1]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder["small"].sum()
before = peak()
for name in folder:
  assert np.isfinite(folder[name][-1, -1])
print(peak() - before)
"""


def test_no_more_than_a_tensor_is_in_host_memory(tmp_path):
  largest = 96 * 2**20
  shapes = {"large": (largest // 4096, 1024), "small": (4, 8)}
  shapes |= {f"other{i}": (largest // 8192, 1024) for i in range(3)}
  tensors = {k: np.ones(shape, np.float32) for k, shape in shapes.items()}
  save_file(tensors, tmp_path / WEIGHTS_FILE)
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", _PEAK, str(tmp_path)],
    capture_output=True,
    text=True,
    env=environment,
    check=True,
  )
  assert int(done.stdout) < 1.3 * largest


def _change(name, change):
  """Changes one tensor of the only shard."""

  def damage(folder):
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    change(tensors, name)
    save_file(tensors, path)

  return damage


def _settings(**changes):
  def damage(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

  return damage


def _tokenizer(change):
  def damage(folder):
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))

  return damage


def _cut(folder):
  path = folder / WEIGHTS_FILE
  path.write_bytes(path.read_bytes()[:-5])


def _nan(tensors, name):
  tensors[name][0, 1] = np.nan


def _rename(tensors, name):
  tensors[name.replace("q_proj", "query")] = tensors.pop(name)


def _index(change):
  """Splits the weights in two shards, then changes the index."""

  def damage(folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).unlink()
    write_target(folder, shards=2, tensors=tensors)
    path = folder / INDEX_FILE
    listed = json.loads(path.read_text())
    change(listed["weight_map"])
    path.write_text(json.dumps(listed))

  return damage


_Q = "model.layers.2.self_attn.q_proj.weight"
_WORD_LEVEL = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}
BAD = {
  "missing": (_change(_Q, dict.pop), _Q),
  "extra": (
    _change("x.weight", lambda t, n: t.update({n: np.ones(2)})),
    "x.weight",
  ),
  "misshapen": (_change(_Q, lambda t, n: t.update({n: t[n][:-1]})), _Q),
  "transposed": (
    _change(_Q, lambda t, n: t.update({n: np.ascontiguousarray(t[n].T)})),
    _Q,
  ),
  "misnamed": (_change(_Q, _rename), "layers.2.self_attn.q"),
  "codes": (
    _change(_Q, lambda t, n: t.update({n: t[n].astype(np.uint8)})),
    _Q,
  ),
  "whole numbers": (
    _change(_Q, lambda t, n: t.update({n: t[n].astype(np.int64)})),
    _Q,
  ),
  "nan": (_change(HEAD, _nan), HEAD),
  "truncated": (_cut, WEIGHTS_FILE),
  "no weights": (
    lambda folder: (folder / WEIGHTS_FILE).unlink(),
    WEIGHTS_FILE,
  ),
  "absent shard": (_index(lambda m: m.update({_Q: "x.safetensors"})), _Q),
  "escaping shard": (
    _index(lambda m: m.update({_Q: "../target/x.safetensors"})),
    "../target",
  ),
  "unlisted": (_index(lambda m: m.pop(_Q)), _Q),
  "elsewhere": (_index(lambda m: m.update({_Q: m[HEAD]})), _Q),
  "a pickle": (_index(lambda m: m.update({_Q: "pytorch_model.bin"})), _Q),
  "unknown family": (_settings(model_type="mamba"), "mamba"),
  "activation": (_settings(hidden_act="gelu"), "gelu"),
  "rope": (_settings(rope_scaling={"type": "dynamic", "factor": 2}), "dynamic"),
  "wrong vocabulary": (_settings(vocab_size=271), "270"),
  "small vocabulary": (_settings(vocab_size=200), "embedding's 200"),
  "not json": (lambda f: (f / "config.json").write_text("{"), "config.json"),
  "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
  "damaged tokenizer": (
    lambda f: (f / "tokenizer.json").write_text('{"version": "9"}'),
    "tokenizer.json",
  ),
  "no template": (
    lambda f: (f / "tokenizer_config.json").write_text("{}"),
    "chat_template",
  ),
  "stop id": (_settings(eos_token_id=4000), "eos_token_id"),
  "an id of billions": (
    _tokenizer(lambda raw: raw["model"]["vocab"].update(far=2**32 - 1)),
    "tokenizer.json=4294967296: expected a vocabulary",
  ),
  "a panic of the library": (
    _tokenizer(lambda raw: raw["model"].update(continuing_subword_prefix="ab")),
    "tokenizer.json",
  ),
  "an unknown token": (
    _tokenizer(lambda raw: raw.update(model=_WORD_LEVEL)),
    "expected text for the tokenizer",
  ),
  "names of no template": (
    lambda f: (f / "tokenizer_config.json").write_text(
      '{"chat_template": ["a", {"name": []}]}'
    ),
    "chat_template",
  ),
  "beyond float32": (
    _change(_Q, lambda t, n: t.update({n: t[n].astype(np.float64) * 1e300})),
    _Q,
  ),
  "turns alike": (_settings(rope_theta=1), "rope_theta=1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_told_in_one_line(tmp_path, name, capsys):
  damage, culprit = BAD[name]
  tensors = hf_folders.random_tensors(CONFIG)
  folder = write_target(tmp_path / "target", tensors=tensors)
  damage(folder)

  def load(_):
    load_tokenizer(folder)
    load_target(folder, "float32")

  assert cli.run(load, []) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert error.startswith("error: ")
  assert culprit in error


@pytest.fixture
def folders(tmp_path):
  """A target's folder and two drafters' that fit it."""
  target = write_target(tmp_path / "target", shards=2)
  shape = DrafterConfig(
    vocab_size=CONFIG.vocab_size,
    hidden_size=CONFIG.hidden_size,
    intermediate_size=28,
    num_layers=2,
    num_heads=4,
    num_kv_heads=1,
    head_dim=12,
    rope_theta=700.0,
    rms_norm_eps=1e-6,
    max_length=128,
    block_size=5,
    mask_token_id=hf_folders.MARKS.index("<|spare|>"),
    target_layer_ids=(1, 3),
    num_target_layers=CONFIG.num_layers,
  )
  for i in range(2):
    save_drafter(Drafter(shape, rngs=nnx.Rngs(i)), tmp_path / f"drafter{i}")
  return target, tmp_path / "drafter0", tmp_path / "drafter1"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_one_command_for_folders(folders, tmp_path, monkeypatch, capsys):
  import decode

  monkeypatch.setattr(cli, "setup_jax_cache", lambda: None)
  target, drafter, vp_drafter = folders
  output = tmp_path / "out.json"
  flags = [
    *(f"--target={target}", f"--drafter={drafter}"),
    *(f"--vp_drafter={vp_drafter}", "--mode=compare", "--prompt=hey a"),
    *("--max_new_tokens=12", "--dtype=float32", f"--json={output}"),
    *("--num_branches=2", "--block_size=5"),
  ]
  assert cli.run(decode.main, flags) == 0
  records = json.loads(output.read_text())
  assert [r["mode"] for r in records] == ["ar", "dflash", "d2sd"]
  tokenizer = load_tokenizer(target)
  prompt = tokenizer.encode_prompt("hey a")
  for record in records:
    assert record["prompt_tokens"] == prompt
    assert record["tokens"] == records[0]["tokens"]
    assert record["target"] == str(target)
  assert "yes (1 of 1)" in capsys.readouterr().out


def test_a_mask_that_the_template_writes_is_refused(folders, capsys):
  import decode

  target, drafter, vp_drafter = folders
  path = drafter / "config.json"
  raw = json.loads(path.read_text())
  raw["dflash_config"]["mask_token_id"] = hf_folders.MARKS.index("<|turn|>")
  path.write_text(json.dumps(raw))
  flags = [
    *(f"--target={target}", f"--drafter={drafter}"),
    *(f"--vp_drafter={vp_drafter}", "--prompt=hey"),
  ]
  assert cli.run(decode.main, flags) == 2
  assert "mask_token_id=1" in capsys.readouterr().err


def test_the_door_takes_gguf_files_too(tmp_path, monkeypatch):
  monkeypatch.setattr(io_models, "gguf_tokenizer", lambda path: path)
  path = tmp_path / "a.gguf"
  path.touch()
  assert load_tokenizer(tmp_path) == path


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_load_bench_runs(tmp_path, monkeypatch, capsys):
  from d2sd_jax.io import load_bench

  monkeypatch.setattr(cli, "setup_jax_cache", lambda: None)
  monkeypatch.setattr(load_bench, "SHARD_BYTES", 10_000)
  path = tmp_path / "config.json"
  path.write_text(json.dumps({**QWEN3, "num_hidden_layers": 5}))
  flags = [f"--folder={tmp_path / 'made'}", f"--config_json={path}"]
  assert cli.run(load_bench.main, [*flags, "--tokens=6"]) == 0
  output = capsys.readouterr().out
  assert "d2sd: 6 tokens" in output
  assert "4 layers: d2sd and ar are identical" in output
  assert len(list((tmp_path / "made").glob("*.safetensors"))) > 2

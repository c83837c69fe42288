"""What is told of folders and files, down to full-size ones."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
import tiny
from published import (
  GPT_OSS_20B,
  GPT_OSS_20B_BYTES,
  GPT_OSS_20B_LAYERS,
  GPT_OSS_20B_TENSORS,
  QWEN3_8B,
  QWEN3_8B_BYTES,
  QWEN3_8B_LAYERS,
  QWEN3_8B_TENSORS,
)
from safetensors.numpy import load_file, save_file

from d2sd_jax import DrafterConfig, UsageError, cli
from d2sd_jax.io import drafter_format, holdings, inspect, paths
from d2sd_jax.io.drafter_format import drafter_tensors, save_drafter
from d2sd_jax.io.holdings import read_holding

_TARGET_JSON = {
  "model_type": "qwen3",
  "vocab_size": 61,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 3,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "rope_theta": 500.0,
  "rms_norm_eps": 1e-5,
  "max_position_embeddings": 128,
}
_TEXT_FILES = {
  "tokenizer.json": {},
  "tokenizer_config.json": {"chat_template": "{{ messages }}"},
  "generation_config.json": {"eos_token_id": [7, 9]},
}
# Dense weights of the tiny target, counted by hand.
_LAYER = 2 * 24 * 48 + 2 * 24 * 16 + 3 * 24 * 40 + 2 * 24 + 2 * 8
_WEIGHTS = 2 * 61 * 24 + 24 + 3 * _LAYER


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A target and two drafters, in the folder where the user stands."""
  monkeypatch.chdir(tmp_path)
  target = tmp_path / "target"
  target.mkdir()
  for name, value in {"config.json": _TARGET_JSON, **_TEXT_FILES}.items():
    (target / name).write_text(json.dumps(value))
  save_file(
    tiny.target_tensors(tiny.TARGET, seed=0), target / "model.safetensors"
  )
  save_drafter(tiny.drafter(), tmp_path / "one")
  save_drafter(tiny.drafter(tiny.VP), tmp_path / "two", "float32")
  return tmp_path


def _report(capsys, *names):
  assert cli.run(inspect.main, names) == cli.OK
  out, err = capsys.readouterr()
  assert not err
  assert all(len(line) <= 200 for line in out.splitlines())
  return out


def _edit(path, **changes):
  """Changes keys of a JSON file; `...` removes one."""
  raw = {**json.loads(path.read_text()), **changes}
  path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def _rewrite(path, change):
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path)


def test_the_whole_report(folder, capsys):
  assert tiny.drafter(tiny.VP).config.num_kv_heads == 1
  told = _report(capsys, "target", "one", "two").splitlines()
  assert told[:9] == [
    "target: target, qwen3, a Hugging Face folder",
    "  sizes    3 layers of width 24, 6 heads over 2 of size 8, feed-forward"
    " 40",
    "  text     vocabulary 61, context 128",
    "  kind     head of its own, RoPE base 500, norms on queries and keys",
    "  stored   36 tensors: F32 84 kB",
    "  weights  42 kB in bfloat16, 84 kB in float32",
    "  cache    192 kB in bfloat16, 384 kB in float32, per 1,000 tokens of a"
    " row",
    "  missing  nothing",
    "  wrong    nothing",
  ]
  assert 4 * _WEIGHTS == 84_000
  assert 2 * 1000 * 3 * 2 * 2 * 8 == 192_000
  assert told[10:15] == [
    "one: drafter, dflash, for --drafter",
    "  sizes    2 layers of width 24, 4 heads over 1 of size 10, feed-forward"
    " 28",
    "  text     vocabulary 61, context 128",
    "  block    5 slots, mask id 17",
    "  taps     layers 1 of a target's 3",
  ]
  assert "two: drafter, vp_drafter, for --vp_drafter" in told
  assert "  taps     layers 0, 2 of a target's 3" in told
  config = tiny.VP
  count = sum(math.prod(s) for s in drafter_tensors(config).values())
  stored = f"  stored   14 tensors: F32 {4 * count / 1000:.3g} kB"
  assert stored in told
  assert told[-5:-2] == [
    "one fits target",
    "two fits target",
    "target and the drafters that fit it:",
  ]
  # 2 x 8 x 3 layers, 1 x 10 x 2 layers, 1 x 10 x 1 layer; keys and values.
  assert told[-1] == (
    "  cache    312 kB in bfloat16, 624 kB in float32, per 1,000 tokens of a"
    " row"
  )


def test_weights_and_cache_are_those_in_memory(folder):
  """Counted beside the arrays that are really made."""
  target, drafter = read_holding("target"), read_holding("one")
  made = tiny.target()
  arrays = [made.embedding, made.norm, made.lm_head]
  arrays += [
    x for layer in made.layers for x in vars(layer).values() if x is not None
  ]
  assert target.num_weights == sum(x.size for x in arrays) == _WEIGHTS
  for holding, model in ((target, made), (drafter, tiny.drafter())):
    cache = model.init_cache(1, 1000)
    assert (
      sum(x.size for x in jax.tree.leaves(cache)) == 1000 * holding.cache_row
    )


@pytest.mark.parametrize(
  ("key", "value", "told"),
  [
    ("hidden_size", 25, "drafter hidden_size=24: expected the target's 25"),
    ("vocab_size", 62, "drafter vocab_size=61: expected the target's 62"),
    (
      "num_hidden_layers",
      4,
      "drafter num_target_layers=3: expected the target's 4",
    ),
  ],
)
def test_what_does_not_fit_is_told_with_the_reason(
  folder, capsys, key, value, told
):
  _edit(folder / "target" / "config.json", **{key: value})
  lines = _report(capsys, "target", "one").splitlines()
  assert lines[-1] == f"one does not fit target: {told}"


@pytest.mark.parametrize(
  ("spoil", "told"),
  [
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    (lambda f: (f / "tokenizer_config.json").unlink(), "tokenizer_config.json"),
    (
      lambda f: (f / "tokenizer_config.json").write_text("{}"),
      "chat_template.jinja or chat_template of the tokenizer",
    ),
    (
      lambda f: (f / "generation_config.json").unlink(),
      "eos_token_id of generation_config.json",
    ),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    (
      lambda f: _rewrite(
        f / "model.safetensors", lambda t: t.pop("model.norm.weight")
      ),
      "tensor model.norm.weight",
    ),
  ],
)
def test_what_is_missing_is_told(folder, capsys, spoil, told):
  spoil(folder / "target")
  lines = _report(capsys, "target", "one").splitlines()
  assert f"  missing  {told}" in lines
  assert "one would fit target, but see what is amiss in target" in lines


def test_a_template_and_stop_ids_may_stand_elsewhere(folder, capsys):
  target = folder / "target"
  (target / "tokenizer_config.json").write_text("{}")
  (target / "chat_template.jinja").write_text("{{ messages }}")
  (target / "generation_config.json").unlink()
  _edit(target / "config.json", eos_token_id=0)
  assert "missing  nothing" in _report(capsys, "target")


@pytest.mark.parametrize(
  ("change", "told"),
  [
    (
      lambda t: t.update({"lm_head.weight": np.zeros((24, 61), np.float32)}),
      "tensor lm_head.weight: shape (24, 61), expected (61, 24)",
    ),
    (
      lambda t: t.update({"extra.bias": np.zeros(3, np.float32)}),
      "tensor extra.bias: not part of such a model",
    ),
    (
      lambda t: t.update({"model.norm.weight": np.zeros(24, np.uint8)}),
      "tensor model.norm.weight: dtype U8",
    ),
  ],
)
def test_what_is_wrong_is_told(folder, capsys, change, told):
  _rewrite(folder / "target" / "model.safetensors", change)
  lines = _report(capsys, "one", "target").splitlines()
  assert f"  wrong    {told}" in lines
  assert "one would fit target, but see what is amiss in target" in lines


def test_many_missing_tensors_are_counted(folder, capsys):
  keep = "model.norm.weight"
  path = folder / "target" / "model.safetensors"
  save_file({keep: load_file(path)[keep]}, path)
  lines = _report(capsys, "target").splitlines()
  first = lines.index("  missing  tensor lm_head.weight")
  assert lines[first + 1 : first + 5] == [
    "           tensor model.embed_tokens.weight",
    "           tensor model.layers.0.input_layernorm.weight",
    "           tensor model.layers.0.mlp.down_proj.weight",
    "           and 31 more, the last tensor"
    " model.layers.2.self_attn.v_proj.weight",
  ]


def test_a_gguf_target(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  config = dataclasses.replace(tiny.GGUF_TARGET, tied_head=False)
  tensors = tiny.gguf_tensors(config)
  tensors["rope_freqs.weight"] = np.full(4, 2, np.float32)
  metadata = tiny.gguf_metadata(config)
  kinds = {"token_embd.weight": gguf.GGMLQuantizationType.Q8_0}
  path = tiny.write_gguf(
    tmp_path / "model.gguf",
    metadata | tiny.tokenizer_metadata(),
    tensors,
    kinds,
  )
  whole = sum(v.nbytes for v in tensors.values()) - 37 * 64 * 4
  weights = sum(v.size for v in tensors.values())
  told = _report(capsys, ".")
  assert ".: target, llama, a GGUF file" in told
  assert (
    "kind     head of its own, RoPE base 12345 stretched by FrequencyFactors"
  ) in told
  stored = f"stored   22 tensors: F32 {whole / 1000:.3g} kB, Q8_0 2.52 kB"
  assert stored in told
  assert f"{weights * 4 / 1000:.3g} kB in float32" in told
  assert "missing  nothing" in told
  assert "wrong    nothing" in told
  del tensors["blk.0.attn_v.weight"]
  tensors["blk.1.ffn_up.weight"] = np.zeros((64, 96), np.float32)
  tensors["blk.0.attn_q.bias"] = np.zeros(48, np.float32)
  tiny.write_gguf(path, metadata, tensors)
  told = _report(capsys, "model.gguf")
  for line in (
    "missing  metadata tokenizer.ggml.tokens",
    "           metadata tokenizer.chat_template",
    "           tensor blk.0.attn_v.weight",
    "wrong    tensor blk.0.attn_q.bias: not part of such a model",
    "tensor blk.1.ffn_up.weight: shape (64, 96), expected (96, 64)",
  ):
    assert line in told


def _sparse_folder(folder, config, tensors, layers, num_shards):
  """A full-size layout whose files hold nothing but their headers."""
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config))
  named = {
    name.format(i): shape
    for name, shape in tensors.items()
    for i in range(layers if "{}" in name else 1)
  }
  shards = [{} for _ in range(num_shards)]
  weight_map = {}
  for i, (name, shape) in enumerate(named.items()):
    shard = i * num_shards // len(named)
    file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
    shards[shard][name], weight_map[name] = shape, file
  for shard, file in zip(
    shards, dict.fromkeys(weight_map.values()), strict=True
  ):
    header, end = {}, 0
    for name, shape in shard.items():
      codes = name.endswith(("_blocks", "_scales"))
      begin, end = end, end + math.prod(shape) * (1 if codes else 2)
      header[name] = {
        "dtype": "U8" if codes else "BF16",
        "shape": shape,
        "data_offsets": [begin, end],
      }
    text = json.dumps(header).encode()
    (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / file, 8 + len(text) + end)
  (folder / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": weight_map})
  )


def _dflash_folder(folder, target):
  """A full-size drafter of the published layout, without its weights."""
  config = DrafterConfig(
    vocab_size=target["vocab_size"],
    hidden_size=target["hidden_size"],
    intermediate_size=12288,
    num_layers=5,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    max_length=40960,
    block_size=16,
    mask_token_id=151669,
    target_layer_ids=(1, 9, 17, 25, 33),
    num_target_layers=target["num_hidden_layers"],
  )
  folder.mkdir()
  raw = drafter_format._to_json(config, "bfloat16")
  (folder / "config.json").write_text(json.dumps(raw))


def test_full_sizes_are_told_from_headers_alone(tmp_path, monkeypatch, capsys):
  """The paper's two targets, as large as published, without a weight read."""
  monkeypatch.chdir(tmp_path)
  _sparse_folder(
    tmp_path / "qwen", QWEN3_8B, QWEN3_8B_TENSORS, QWEN3_8B_LAYERS, 5
  )
  _sparse_folder(
    tmp_path / "oss", GPT_OSS_20B, GPT_OSS_20B_TENSORS, GPT_OSS_20B_LAYERS, 3
  )
  _dflash_folder(tmp_path / "dflash", QWEN3_8B)
  tracemalloc.start()
  try:
    told = _report(capsys, "qwen", "oss", "dflash")
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 10 * 2**20
  assert f"stored   399 tensors: BF16 {QWEN3_8B_BYTES / 1e9:.3g} GB" in told
  assert "16.4 GB in bfloat16, 32.8 GB in float32" in told
  assert "147 MB in bfloat16, 295 MB in float32, per 1,000 tokens" in told
  qwen, oss = read_holding("qwen"), read_holding("oss")
  assert 2 * qwen.num_weights == QWEN3_8B_BYTES
  assert sum(t.num_bytes for t in oss.stored.values()) == GPT_OSS_20B_BYTES
  assert qwen.wrong == oss.wrong == []
  # 20.9 thousand million weights, as its model card says.
  assert round(oss.num_weights / 1e9, 1) == 20.9
  assert "41.8 GB in bfloat16, 83.7 GB in float32" in told
  assert "attention sinks, windows of 128 in 12 layers" in told
  assert "32 experts, 4 to a token" in told
  assert "stretched by YarnScaling" in told
  assert "dflash would fit qwen, but see what is amiss in dflash and qwen" in (
    told
  )
  assert "dflash does not fit oss: drafter hidden_size=4096" in told
  shard = "model-00002-of-00003.safetensors"
  (tmp_path / "oss" / shard).unlink()
  assert f"missing  {shard}" in _report(capsys, "oss")


def test_shipped_drafters_go_by_their_names(capsys):
  told = _report(capsys, "smollm2-135m-dflash", "smollm2-135m-vp")
  assert "smollm2-135m-dflash: drafter, dflash, for --drafter" in told
  assert "smollm2-135m-vp: drafter, vp_drafter, for --vp_drafter" in told
  assert told.count("missing  nothing") == told.count("wrong    nothing") == 2


def _cut(path, kept):
  path.write_bytes(path.read_bytes()[:kept])


@pytest.mark.parametrize(
  ("spoil", "names", "told"),
  [
    (None, [], "FOLDER"),
    (None, ["nowhere"], "folder='nowhere': no such folder"),
    (None, ["nowhere/at/all"], "no such folder; expected an existing one"),
    (None, ["target", "--colour"], "unknown flag '--colour'"),
    (None, ["."], "expected smollm2-135m, a GGUF file"),
    (None, ["target/model.safetensors"], "begins with 'GGUF'"),
    (
      lambda f: _cut(f / "target" / "config.json", 9),
      ["target"],
      "config.json: expected a file that holds a JSON object",
    ),
    (
      lambda f: _edit(f / "target" / "config.json", model_type="mamba"),
      ["target"],
      "model_type='mamba': expected one of llama, qwen3, gpt_oss",
    ),
    (
      lambda f: _cut(f / "target" / "model.safetensors", -1),
      ["target"],
      "model.safetensors: expected a whole safetensors file",
    ),
    (
      lambda f: _cut(f / "one" / "model.safetensors", 40),
      ["one"],
      "model.safetensors: expected a whole safetensors file",
    ),
    (
      lambda f: _edit(f / "one" / "config.json", use_swa=True),
      ["target", "one"],
      "use_swa=True: expected False",
    ),
    (
      lambda f: _edit(f / "one" / "config.json", num_hidden_layers=10**9),
      ["one"],
      "1000000000 layers: expected at most 1024",
    ),
    (
      lambda f: _edit(f / "target" / "config.json", num_hidden_layers=10**9),
      ["target"],
      "num_hidden_layers=1000000000: expected at most 1024",
    ),
    (
      lambda f: (f / "target" / "tokenizer_config.json").write_text("["),
      ["target"],
      "tokenizer_config.json: expected a file that holds a JSON object",
    ),
    (
      lambda f: (f / "target" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../b.safetensors"}}'
      ),
      ["target"],
      "tensor a: shard '../b.safetensors': expected",
    ),
    (
      lambda f: (f / "target" / "model.safetensors.index.json").write_text(
        '{"weight_map": {}}'
      ),
      ["target"],
      "weight_map: expected names and their shards",
    ),
  ],
)
def test_bad_input_is_told_in_one_line(folder, capsys, spoil, names, told):
  if spoil:
    spoil(folder)
  assert cli.run(inspect.main, names) == cli.USAGE
  out, err = capsys.readouterr()
  assert not out
  assert err.count("\n") == 1
  assert told in err


def test_a_truncated_gguf_file_is_told(tmp_path):
  path = tiny.write_gguf(
    tmp_path / "a.gguf",
    tiny.gguf_metadata(tiny.GGUF_TARGET),
    tiny.gguf_tensors(tiny.GGUF_TARGET),
  )
  _cut(path, -40)
  with pytest.raises(UsageError, match=r"truncated: tensor 'blk\.1\.ffn_down"):
    read_holding(str(path))


def test_a_gguf_tensor_of_no_dimensions_is_told(tmp_path):
  path = tiny.write_gguf(
    tmp_path / "a.gguf",
    tiny.gguf_metadata(tiny.GGUF_TARGET),
    tiny.gguf_tensors(tiny.GGUF_TARGET),
  )
  name = b"output_norm.weight"
  before, after = path.read_bytes().split(name)
  # The number of dimensions, and the one there is.
  path.write_bytes(before + name + bytes(4) + after[12:])
  with pytest.raises(UsageError, match=r"'output_norm\.weight' has no dim"):
    read_holding(str(path))


def test_the_default_target_goes_by_its_name(monkeypatch, smollm2_path):
  monkeypatch.setattr(holdings, "target_path", lambda name: smollm2_path)
  holding = read_holding("smollm2-135m")
  assert holding.num_weights == 134_515_008
  assert not holding.missing
  assert not holding.wrong


def test_help_has_examples(capsys):
  assert cli.run(inspect.main, ["--help"]) == cli.OK
  out, _ = capsys.readouterr()
  assert "usage: python -m d2sd_jax.io.inspect FOLDER [FOLDER ...]" in out
  assert inspect.EXAMPLES in out


def test_it_runs_as_a_module(folder):
  environment = {**os.environ, "PYTHONPATH": str(paths._PACKAGE.parent)}
  done = subprocess.run(
    [sys.executable, "-m", "d2sd_jax.io.inspect", "target", "nowhere"],
    capture_output=True,
    text=True,
    check=False,
    env=environment,
  )
  assert done.returncode == cli.USAGE
  assert done.stdout == ""
  assert done.stderr.startswith("error: folder='nowhere'")

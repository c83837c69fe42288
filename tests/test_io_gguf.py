"""GGUF targets, from tiny files of pairwise distinct sizes."""

import contextlib
import dataclasses
import struct

import gguf
import numpy as np
import pytest
from gguf import quants

from d2sd_jax.config import TargetConfig
from d2sd_jax.errors import UsageError
from d2sd_jax.io import fetch
from d2sd_jax.io.gguf import load_gguf, rotate_half_rows, target_metadata
from d2sd_jax.io.gguf_header import read_header

_TINY = TargetConfig(
  vocab_size=37,
  hidden_size=64,
  intermediate_size=96,
  num_layers=2,
  num_heads=6,
  num_kv_heads=3,
  head_dim=8,
  rope_theta=12_345.0,
  rms_norm_eps=1e-5,
  max_length=77,
  tied_head=True,
)
_QWEN = dataclasses.replace(_TINY, qk_norm=True, tied_head=False)
_Q8 = gguf.GGMLQuantizationType.Q8_0
_Q4 = gguf.GGMLQuantizationType.Q4_1
_HF_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}


def _metadata(config):
  arch = "qwen3" if config.qk_norm else "llama"
  return {
    "general.architecture": arch,
    f"{arch}.block_count": config.num_layers,
    f"{arch}.context_length": config.max_length,
    f"{arch}.embedding_length": config.hidden_size,
    f"{arch}.feed_forward_length": config.intermediate_size,
    f"{arch}.attention.head_count": config.num_heads,
    f"{arch}.attention.head_count_kv": config.num_kv_heads,
    f"{arch}.attention.key_length": config.head_dim,
    f"{arch}.attention.value_length": config.head_dim,
    f"{arch}.rope.freq_base": config.rope_theta,
    f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
  }


def _tensors(config, seed=0):
  """Random float32 tensors, written out by hand under their GGUF names."""
  width, mlp = config.hidden_size, config.intermediate_size
  shapes = {
    "token_embd.weight": (config.vocab_size, width),
    "output_norm.weight": (width,),
  }
  if not config.tied_head:
    shapes["output.weight"] = (config.vocab_size, width)
  for i in range(config.num_layers):
    layer = {
      "attn_norm": (width,),
      "attn_q": (48, width),
      "attn_k": (24, width),
      "attn_v": (24, width),
      "attn_output": (width, 48),
      "ffn_norm": (width,),
      "ffn_gate": (mlp, width),
      "ffn_up": (mlp, width),
      "ffn_down": (width, mlp),
    }
    if config.qk_norm:
      layer |= {"attn_q_norm": (8,), "attn_k_norm": (8,)}
    shapes |= {f"blk.{i}.{k}.weight": v for k, v in layer.items()}
  rng = np.random.default_rng(seed)
  return {
    name: rng.standard_normal(shape, np.float32)
    for name, shape in shapes.items()
  }


def _hf_name(name):
  top = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
  }
  if name in top:
    return top[name]
  _, layer, kind, _ = name.split(".")
  return f"model.layers.{layer}.{_HF_NAMES[kind]}.weight"


def _write(path, metadata, tensors, kinds=None):
  """Writes a GGUF file with the reference writer, quantising by `kinds`."""
  kinds = kinds or {}
  writer = gguf.GGUFWriter(path, metadata.get("general.architecture", "none"))
  for key, value in metadata.items():
    if key == "general.architecture":
      continue
    add = {int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    add[type(value)](key, value)
  for name, value in tensors.items():
    kind = kinds.get(name)
    raw = value if kind is None else quants.quantize(value, kind)
    writer.add_tensor(name, raw, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture
def tiny(tmp_path):
  return _write(tmp_path / "tiny.gguf", _metadata(_TINY), _tensors(_TINY))


def _rope(x, theta, pairs):
  """Rotates pairs of rows of x [H] at position 5; `pairs` lists them."""
  y = x.copy()
  for i, (a, b) in enumerate(pairs):
    angle = 5.0 * theta ** (-2 * i / len(x))
    y[a] = x[a] * np.cos(angle) - x[b] * np.sin(angle)
    y[b] = x[a] * np.sin(angle) + x[b] * np.cos(angle)
  return y


def test_rotate_half_rows_by_hand():
  stored = np.array([[0], [1], [2], [3], [10], [11], [12], [13]])
  got = rotate_half_rows(stored, head_dim=4)
  assert got[:, 0].tolist() == [0, 2, 1, 3, 10, 12, 11, 13]


def test_llama_scores_are_those_of_interleaved_rope(tmp_path):
  """The file's q, k under interleaved RoPE = ours under rotate-half RoPE."""
  tensors = _tensors(_TINY)
  path = _write(tmp_path / "a.gguf", _metadata(_TINY), tensors)
  _, weights = load_gguf(path)
  size, theta = _TINY.head_dim, _TINY.rope_theta
  interleaved = [(2 * i, 2 * i + 1) for i in range(size // 2)]
  halves = [(i, i + size // 2) for i in range(size // 2)]
  x = np.random.default_rng(1).standard_normal(_TINY.hidden_size)
  for layer in range(_TINY.num_layers):
    stored_q = (tensors[f"blk.{layer}.attn_q.weight"] @ x).reshape(-1, size)
    stored_k = (tensors[f"blk.{layer}.attn_k.weight"] @ x).reshape(-1, size)
    prefix = f"model.layers.{layer}.self_attn"
    our_q = (weights[f"{prefix}.q_proj.weight"] @ x).reshape(-1, size)
    our_k = (weights[f"{prefix}.k_proj.weight"] @ x).reshape(-1, size)
    for n in range(_TINY.num_heads):
      # Queries stand at position 5, keys at 0, so only queries turn.
      j = n // 2
      expected = _rope(stored_q[n], theta, interleaved) @ stored_k[j]
      got = _rope(our_q[n], theta, halves) @ our_k[j]
      np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("config", [_TINY, _QWEN], ids=["llama", "qwen3"])
def test_config_and_every_tensor(tmp_path, config):
  tensors = _tensors(config)
  path = _write(tmp_path / "a.gguf", _metadata(config), tensors)
  found, weights = load_gguf(path)
  assert found == target_metadata(path) == config
  assert weights.keys() == {_hf_name(name) for name in tensors}
  for name, expected in tensors.items():
    got = weights[_hf_name(name)]
    assert got.dtype == np.float32
    if not config.qk_norm and ("attn_q" in name or "attn_k" in name):
      expected = rotate_half_rows(expected, config.head_dim)
    np.testing.assert_array_equal(got, expected)


def test_optional_metadata_has_llama_cpps_defaults(tmp_path):
  config = dataclasses.replace(
    _TINY, num_heads=6, num_kv_heads=6, hidden_size=48, rope_theta=10_000.0
  )
  metadata = _metadata(config)
  for key in (
    *("attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "rope.freq_base"),
  ):
    del metadata[f"llama.{key}"]
  embedding = {"token_embd.weight": np.zeros((37, 48), np.float32)}
  path = _write(tmp_path / "a.gguf", metadata, embedding)
  assert target_metadata(path) == config


def test_quantised_tensors(tmp_path):
  tensors = _tensors(_TINY)
  kinds = {
    "token_embd.weight": _Q8,
    "blk.0.attn_q.weight": _Q4,
    "blk.1.ffn_down.weight": _Q4,
    "blk.1.ffn_up.weight": gguf.GGMLQuantizationType.F16,
    "blk.0.attn_v.weight": gguf.GGMLQuantizationType.BF16,
  }
  path = _write(tmp_path / "a.gguf", _metadata(_TINY), tensors, kinds)
  _, weights = load_gguf(path)
  for name, kind in kinds.items():
    packed = quants.quantize(tensors[name], kind)
    expected = quants.dequantize(packed, kind)
    if "attn_q" in name:
      expected = rotate_half_rows(expected, _TINY.head_dim)
    np.testing.assert_array_equal(weights[_hf_name(name)], expected)
    assert weights[_hf_name(name)].dtype == np.float32
  # Q4_1: a block of 32 is its minimum plus 0 to 15 steps.
  blocks = weights[_hf_name("blk.1.ffn_down.weight")].reshape(-1, 32)
  assert max(len(np.unique(block)) for block in blocks) <= 16


def test_weights_outlive_the_file(tiny):
  _, weights = load_gguf(tiny)
  before = weights["model.norm.weight"].copy()
  tiny.write_bytes(bytes(tiny.stat().st_size))
  np.testing.assert_array_equal(weights["model.norm.weight"], before)


def test_header_holds_what_was_written(tmp_path):
  """Against the reference reader, over every kind of value."""
  metadata = _metadata(_TINY) | {
    "a.strings": ["ä", "", "Ġ t"],
    "a.numbers": [3, -1, 2**31 - 1],
    "a.reals": [0.5, -2.0],
    "a.flags": [True, False],
    "a.text": "two\nlines",
  }
  path = _write(tmp_path / "a.gguf", metadata, _tensors(_TINY))
  header, oracle = read_header(path), gguf.GGUFReader(path)
  fields = {
    name: field.contents()
    for name, field in oracle.fields.items()
    if not name.startswith("GGUF.")
  }
  assert header.metadata == fields
  for tensor in oracle.tensors:
    info = header.tensors[tensor.name]
    assert info.start == tensor.data_offset
    assert list(info.shape) == tensor.shape.tolist()[::-1]


def _error(path):
  """The one line that loading the file raises, which names the file."""
  with pytest.raises(UsageError) as caught:
    load_gguf(path)
  message = str(caught.value)
  assert message.startswith(f"{path}: ")
  assert "\n" not in message
  return message


@pytest.mark.parametrize("fraction", [0.0001, 0.01, 0.05, 0.5, 0.9999])
def test_truncated_file(tiny, fraction):
  whole = tiny.read_bytes()
  tiny.write_bytes(whole[: int(fraction * len(whole)) + 4])
  assert "truncated" in _error(tiny)


def test_truncated_file_names_the_tensor(tiny):
  tiny.write_bytes(tiny.read_bytes()[:-40])
  assert "tensor 'blk.1.ffn_down.weight' ends at byte" in _error(tiny)


def test_not_a_gguf_file(tmp_path):
  path = tmp_path / "a.gguf"
  assert "No such file" in _error(path)
  path.write_bytes(b"")
  assert "empty" in _error(path)
  path.write_bytes(b"PK\3\4 a zip file")
  assert "begins with 'GGUF'" in _error(path)
  path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
  assert "version 1: expected 2 or 3" in _error(path)
  path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63))
  assert "truncated" in _error(path)


def test_random_damage_never_escapes_as_another_error(tiny):
  """Any flipped byte of the header loads, or is a `UsageError`."""
  whole = tiny.read_bytes()
  end = min(info.start for info in read_header(tiny).tensors.values())
  rng = np.random.default_rng(0)
  for position in rng.choice(end, 200, replace=False):
    damaged = bytearray(whole)
    damaged[position] ^= int(rng.integers(1, 256))
    tiny.write_bytes(damaged)
    with contextlib.suppress(UsageError):
      load_gguf(tiny)


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.attn_k.weight"])
def test_missing_tensor(tmp_path, name):
  tensors = _tensors(_TINY)
  del tensors[name]
  path = _write(tmp_path / "a.gguf", _metadata(_TINY), tensors)
  assert f"tensor {name!r} is missing" in _error(path)


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias"])
def test_extra_tensor(tmp_path, name):
  tensors = _tensors(_TINY) | {name: np.ones(48, np.float32)}
  path = _write(tmp_path / "a.gguf", _metadata(_TINY), tensors)
  assert f"tensor {name!r} has no place" in _error(path)


def test_wrong_shape(tmp_path):
  name = "blk.1.ffn_down.weight"
  tensors = _tensors(_TINY)
  tensors[name] = tensors[name].T.copy()
  path = _write(tmp_path / "a.gguf", _metadata(_TINY), tensors)
  told = f"tensor {name!r} has shape (96, 64): expected (64, 96)"
  assert told in _error(path)


@pytest.mark.parametrize(
  ("key", "value", "told"),
  [
    ("general.architecture", "gemma3", "expected one of llama, qwen3"),
    ("llama.block_count", 0, "expected a positive integer"),
    ("llama.attention.head_count", [6, 6], "expected a positive integer"),
    ("llama.attention.head_count_kv", 4, "expected a divisor of the 6"),
    ("llama.attention.key_length", 7, "expected"),
    ("llama.attention.value_length", 16, "expected the head size 8"),
    ("llama.rope.dimension_count", 4, "expected the head size 8"),
    ("llama.rope.freq_base", -1.0, "expected a positive number"),
    ("llama.rope.scaling.type", "yarn", "expected RoPE without scaling"),
    ("llama.expert_count", 8, "expected a dense model"),
  ],
)
def test_unsupported_metadata(tmp_path, key, value, told):
  metadata = _metadata(_TINY) | {key: value}
  path = _write(tmp_path / "a.gguf", metadata, _tensors(_TINY))
  assert told in _error(path)


@pytest.mark.parametrize("name", ["block_count", "context_length"])
def test_missing_metadata(tmp_path, name):
  metadata = _metadata(_TINY)
  del metadata[f"llama.{name}"]
  path = _write(tmp_path / "a.gguf", metadata, _tensors(_TINY))
  assert f"llama.{name}=None: expected" in _error(path)


def test_type_that_holds_no_weights(tmp_path):
  tensors = _tensors(_TINY)
  tensors["output_norm.weight"] = np.ones(64, np.int32)
  path = _write(tmp_path / "a.gguf", _metadata(_TINY), tensors)
  told = "tensor 'output_norm.weight' of type I32 cannot be dequantised"
  assert told in _error(path)


def test_the_default_target(smollm2_path):
  config, weights = load_gguf(smollm2_path)
  assert config == fetch.SMOLLM2_135M
  assert sum(w.size for w in weights.values()) == 134_515_008
  assert all(np.isfinite(w).all() for w in weights.values())

"""GGUF targets, from tiny files of pairwise distinct sizes."""

import dataclasses
import struct

import gguf
import numpy as np
import pytest
import tiny
from gguf import quants

from d2sd_jax.errors import UsageError
from d2sd_jax.io import fetch
from d2sd_jax.io.gguf import load_gguf, rotate_half_rows, target_metadata
from d2sd_jax.io.gguf_header import read_header

_TINY = tiny.GGUF_TARGET
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


@pytest.fixture
def tiny_file(tmp_path):
  return tiny.write_gguf(
    tmp_path / "tiny.gguf", tiny.gguf_metadata(_TINY), tiny.gguf_tensors(_TINY)
  )


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
  tensors = tiny.gguf_tensors(_TINY)
  path = tiny.write_gguf(
    tmp_path / "a.gguf", tiny.gguf_metadata(_TINY), tensors
  )
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
  tensors = tiny.gguf_tensors(config)
  path = tiny.write_gguf(
    tmp_path / "a.gguf", tiny.gguf_metadata(config), tensors
  )
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
  metadata = tiny.gguf_metadata(config)
  for key in (
    *("attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "rope.freq_base"),
  ):
    del metadata[f"llama.{key}"]
  embedding = {"token_embd.weight": np.zeros((37, 48), np.float32)}
  path = tiny.write_gguf(tmp_path / "a.gguf", metadata, embedding)
  assert target_metadata(path) == config


def test_quantised_tensors(tmp_path):
  tensors = tiny.gguf_tensors(_TINY)
  kinds = {
    "token_embd.weight": _Q8,
    "blk.0.attn_q.weight": _Q4,
    "blk.1.ffn_down.weight": _Q4,
    "blk.1.ffn_up.weight": gguf.GGMLQuantizationType.F16,
    "blk.0.attn_v.weight": gguf.GGMLQuantizationType.BF16,
  }
  path = tiny.write_gguf(
    tmp_path / "a.gguf", tiny.gguf_metadata(_TINY), tensors, kinds
  )
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


def test_weights_outlive_the_file(tiny_file):
  _, weights = load_gguf(tiny_file)
  before = weights["model.norm.weight"].copy()
  tiny_file.write_bytes(bytes(tiny_file.stat().st_size))
  np.testing.assert_array_equal(weights["model.norm.weight"], before)


def test_header_holds_what_was_written(tmp_path):
  """Against the reference reader, over every kind of value."""
  metadata = tiny.gguf_metadata(_TINY) | {
    "a.strings": ["ä", "", "Ġ t"],
    "a.numbers": [3, -1, 2**31 - 1],
    "a.reals": [0.5, -2.0],
    "a.flags": [True, False],
    "a.text": "two\nlines",
  }
  path = tiny.write_gguf(
    tmp_path / "a.gguf", metadata, tiny.gguf_tensors(_TINY)
  )
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
def test_truncated_file(tiny_file, fraction):
  whole = tiny_file.read_bytes()
  tiny_file.write_bytes(whole[: int(fraction * len(whole)) + 4])
  assert "truncated" in _error(tiny_file)


def test_truncated_file_names_the_tensor(tiny_file):
  tiny_file.write_bytes(tiny_file.read_bytes()[:-40])
  assert "tensor 'blk.1.ffn_down.weight' ends at byte" in _error(tiny_file)


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


def test_random_damage_never_escapes_as_another_error(tiny_file):
  """A flipped byte of the header is told in a line, or does no harm."""
  whole = tiny_file.read_bytes()
  end = min(info.start for info in read_header(tiny_file).tensors.values())
  rng = np.random.default_rng(0)
  loaded, told = 0, []
  for position in rng.choice(end, 200, replace=False):
    damaged = bytearray(whole)
    damaged[position] ^= int(rng.integers(1, 256))
    tiny_file.write_bytes(damaged)
    try:
      config, weights = load_gguf(tiny_file)
    except UsageError as error:
      told.append(str(error))
    else:
      loaded += 1
      embedding = weights["model.embed_tokens.weight"]
      assert embedding.shape == (config.vocab_size, config.hidden_size)
  assert len(told) > loaded > 0
  for message in told:
    assert message.startswith(f"{tiny_file}: ")
    assert "\n" not in message


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.attn_k.weight"])
def test_missing_tensor(tmp_path, name):
  tensors = tiny.gguf_tensors(_TINY)
  del tensors[name]
  path = tiny.write_gguf(
    tmp_path / "a.gguf", tiny.gguf_metadata(_TINY), tensors
  )
  assert f"tensor {name!r} is missing" in _error(path)


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias"])
def test_extra_tensor(tmp_path, name):
  tensors = tiny.gguf_tensors(_TINY) | {name: np.ones(48, np.float32)}
  path = tiny.write_gguf(
    tmp_path / "a.gguf", tiny.gguf_metadata(_TINY), tensors
  )
  assert f"tensor {name!r} has no place" in _error(path)


def test_wrong_shape(tmp_path):
  name = "blk.1.ffn_down.weight"
  tensors = tiny.gguf_tensors(_TINY)
  tensors[name] = tensors[name].T.copy()
  path = tiny.write_gguf(
    tmp_path / "a.gguf", tiny.gguf_metadata(_TINY), tensors
  )
  told = f"tensor {name!r} has shape (96, 64): expected (64, 96)"
  assert told in _error(path)


@pytest.mark.parametrize(
  ("key", "value", "told"),
  [
    ("general.architecture", "gemma3", "expected one of llama, qwen3"),
    ("llama.block_count", 0, "expected a positive integer"),
    ("llama.block_count", 2**32 - 1, "expected at most the file's 20 tensors"),
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
  metadata = tiny.gguf_metadata(_TINY) | {key: value}
  path = tiny.write_gguf(
    tmp_path / "a.gguf", metadata, tiny.gguf_tensors(_TINY)
  )
  assert told in _error(path)


@pytest.mark.parametrize("name", ["block_count", "context_length"])
def test_missing_metadata(tmp_path, name):
  metadata = tiny.gguf_metadata(_TINY)
  del metadata[f"llama.{name}"]
  path = tiny.write_gguf(
    tmp_path / "a.gguf", metadata, tiny.gguf_tensors(_TINY)
  )
  assert f"llama.{name}=None: expected" in _error(path)


def test_type_that_holds_no_weights(tmp_path):
  tensors = tiny.gguf_tensors(_TINY)
  tensors["output_norm.weight"] = np.ones(64, np.int32)
  path = tiny.write_gguf(
    tmp_path / "a.gguf", tiny.gguf_metadata(_TINY), tensors
  )
  told = "tensor 'output_norm.weight' of type I32 cannot be dequantised"
  assert told in _error(path)


def test_the_default_target(smollm2_path):
  config, weights = load_gguf(smollm2_path)
  assert config == fetch.SMOLLM2_135M
  assert sum(w.size for w in weights.values()) == 134_515_008
  assert all(np.isfinite(w).all() for w in weights.values())

"""GGUF targets, from tiny files of pairwise distinct sizes."""

import dataclasses
import struct
import tracemalloc

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gguf import quants

from d2sd_jax.errors import UsageError
from d2sd_jax.io import fetch
from d2sd_jax.io.gguf import load_gguf, rotate_half_rows, target_metadata
from d2sd_jax.io.gguf_header import read_header
from d2sd_jax.io.hf_tensors import target_from_tensors
from d2sd_jax.models.rope import (
  FrequencyFactors,
  LinearScaling,
  Llama3Scaling,
  rotate,
)
from d2sd_jax.models.target import LlamaTarget

_TINY = tiny.GGUF_TARGET
_QWEN = dataclasses.replace(_TINY, qk_norm=True, tied_head=False)
_Q8 = gguf.GGMLQuantizationType.Q8_0
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


# Every type as ggml defines it, one block at a time: (bytes, its numbers).
# https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
def _half(raw):
  return float(np.frombuffer(raw, np.float16)[0])


def _nibbles(raw):
  return [byte & 15 for byte in raw] + [byte >> 4 for byte in raw]


def _f32(raw):
  return np.frombuffer(raw, np.float32)


def _f16(raw):
  return [_half(raw)]


def _bf16(raw):
  return np.frombuffer(b"\0\0" + raw, np.float32)


def _q8_0(raw):
  return [_half(raw[:2]) * q for q in np.frombuffer(raw[2:], np.int8).tolist()]


def _q4_0(raw):
  return [_half(raw[:2]) * (q - 8) for q in _nibbles(raw[2:])]


def _q4_1(raw):
  return [_half(raw[:2]) * q + _half(raw[2:4]) for q in _nibbles(raw[4:])]


def _q4_k(raw):
  d, least, scales, codes = _half(raw[:2]), _half(raw[2:4]), raw[4:16], raw[16:]
  numbers = []
  for group in range(8):  # 32 numbers each, two groups to 32 bytes
    if group < 4:
      scale, minimum = scales[group] & 63, scales[group + 4] & 63
    else:
      low = scales[group + 4]
      scale = low & 15 | scales[group - 4] >> 6 << 4
      minimum = low >> 4 | scales[group] >> 6 << 4
    for byte in codes[group // 2 * 32 :][:32]:
      q = byte >> 4 if group % 2 else byte & 15
      numbers.append(d * scale * q - least * minimum)
  return numbers


def _q6_k(raw):
  low, high, d = raw[:128], raw[128:192], _half(raw[208:])
  scales = np.frombuffer(raw[192:208], np.int8).tolist()
  numbers = []
  for i in range(256):
    half, quarter, j = i // 128, i % 128 // 32, i % 32
    byte = low[64 * half + 32 * (quarter % 2) + j]
    q = byte >> 4 if quarter >= 2 else byte & 15
    q |= (high[32 * half + j] >> 2 * quarter & 3) << 4
    numbers.append(d * scales[i // 16] * (q - 32))
  return numbers


# Where the 16-bit scales of a block are; all other bytes may be anything.
_TYPES = {
  "F32": (_f32, None),
  "F16": (_f16, None),
  "BF16": (_bf16, None),
  "Q8_0": (_q8_0, (0,)),
  "Q4_0": (_q4_0, (0,)),
  "Q4_1": (_q4_1, (0, 2)),
  "Q4_K": (_q4_k, (0, 2)),
  "Q6_K": (_q6_k, (208,)),
}
_WIDE = dataclasses.replace(_TINY, hidden_size=256, vocab_size=5, num_layers=1)


def _blocks(name, shape, rng):
  """Random blocks of a type for a tensor of that shape, as bytes by row."""
  kind = gguf.GGMLQuantizationType[name]
  block, size = gguf.GGML_QUANT_SIZES[kind]
  count = int(np.prod(shape)) // block
  halves = _TYPES[name][1]
  if halves is None:
    numbers = rng.standard_normal((count, 1), np.float32)
    return quants.quantize(numbers, kind).view(np.uint8).reshape(count, size)
  raw = rng.integers(0, 256, (count, size), np.uint8)
  for start in halves:
    scale = rng.uniform(-1, 1, (count, 1)).astype(np.float16)
    raw[:, start : start + 2] = scale.view(np.uint8)
  return raw


@pytest.mark.parametrize("name", _TYPES)
def test_every_type_block_by_block(tmp_path, name):
  """Random blocks, the oracle's numbers, and the reference package's."""
  kind = gguf.GGMLQuantizationType[name]
  oracle, _ = _TYPES[name]
  tensors = tiny.gguf_tensors(_WIDE)
  rng = np.random.default_rng(3)
  packed = {
    k: _blocks(name, tensors[k].shape, rng)
    for k in ("token_embd.weight", "blk.0.ffn_up.weight", "blk.0.attn_v.weight")
  }
  packed["blk.0.attn_q.weight"] = _blocks(name, (48, 256), rng)
  path = tmp_path / "a.gguf"
  tiny.write_gguf(
    path,
    tiny.gguf_metadata(_WIDE),
    {
      k: packed[k].reshape(len(v), -1) if k in packed else v
      for k, v in tensors.items()
    },
    raw_kinds=dict.fromkeys(packed, kind),
  )
  _, weights = load_gguf(path)
  for k, blocks in packed.items():
    shape = tensors[k].shape
    numbers = [oracle(block.tobytes()) for block in blocks]
    expected = np.array(numbers, np.float64).reshape(shape)
    reference = quants.dequantize(blocks.reshape(shape[0], -1), kind)
    if "attn_q" in k:
      expected = rotate_half_rows(expected, _WIDE.head_dim)
      reference = rotate_half_rows(reference, _WIDE.head_dim)
    got = weights[_hf_name(k)]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(got, reference)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantised_weights_are_near_the_original(tmp_path, name):
  kind = gguf.GGMLQuantizationType[name]
  tensors = tiny.gguf_tensors(_QWEN)
  kinds = {k: kind for k, v in tensors.items() if v.shape[-1] % 32 == 0}
  kinds |= {"blk.1.attn_output.weight": gguf.GGMLQuantizationType.F16}
  path = tiny.write_gguf(
    tmp_path / "a.gguf", tiny.gguf_metadata(_QWEN), tensors, kinds
  )
  _, weights = load_gguf(path)
  step = 0.03 if name == "Q8_0" else 0.4
  for k, original in tensors.items():
    np.testing.assert_allclose(weights[_hf_name(k)], original, atol=step)


def test_k_types_ask_for_rows_of_whole_blocks(tmp_path):
  tensors = tiny.gguf_tensors(_TINY)
  name = "blk.0.ffn_up.weight"
  tensors[name] = np.zeros((96, 144), np.uint8)  # as if rows were of 256
  path = tiny.write_gguf(
    tmp_path / "a.gguf",
    tiny.gguf_metadata(_TINY),
    tensors,
    raw_kinds={name: gguf.GGMLQuantizationType.Q4_K},
  )
  assert f"tensor {name!r} has shape (96, 256): expected (96, 64)" in (
    _error(path)
  )
  info = read_header(path).tensors[name]
  whole = path.read_bytes()
  dims = struct.pack("<QQ", 256, 96)
  place = whole.index(dims)
  path.write_bytes(whole.replace(dims, struct.pack("<QQ", 64, 96)))
  assert place < info.start
  assert (
    f"{name!r} of type Q4_K has rows of 64: expected a multiple of 256"
    in (_error(path))
  )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_weight_that_is_no_number_is_told(tmp_path, value, kind):
  tensors = tiny.gguf_tensors(_TINY)
  tensors["blk.1.attn_k.weight"][3, 5] = value
  path = tiny.write_gguf(
    tmp_path / "a.gguf",
    tiny.gguf_metadata(_TINY),
    tensors,
    {"blk.1.attn_k.weight": gguf.GGMLQuantizationType[kind]},
  )
  told = "tensor 'blk.1.attn_k.weight' has a NaN or an infinity"
  assert told in _error(path)


def test_a_scale_that_is_no_number_is_told(tmp_path):
  blocks = np.zeros((96, 2, 34), np.uint8)
  blocks[7, 1, :2] = np.array([np.inf], np.float16).view(np.uint8)
  name = "blk.0.ffn_up.weight"
  path = tiny.write_gguf(
    tmp_path / "a.gguf",
    tiny.gguf_metadata(_TINY),
    {**tiny.gguf_tensors(_TINY), name: blocks.reshape(96, -1)},
    raw_kinds={name: _Q8},
  )
  assert f"tensor {name!r} has a NaN or an infinity" in _error(path)


def test_weights_outlive_the_file(tiny_file):
  """What was read is the caller's; the file is looked at no more."""
  _, weights = load_gguf(tiny_file)
  weight = weights["model.norm.weight"]
  before = weight.copy()
  tiny_file.write_bytes(bytes(tiny_file.stat().st_size))
  np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_one_tensor_is_in_memory_at_a_time(tmp_path, kind):
  """Beyond the largest tensor in float32, only pieces."""
  config = dataclasses.replace(
    _TINY, hidden_size=512, vocab_size=16_384, intermediate_size=4096
  )
  tensors = tiny.gguf_tensors(config)
  kinds = {
    k: gguf.GGMLQuantizationType[kind]
    for k, v in tensors.items()
    if v.shape[-1] % 32 == 0
  }
  path = tiny.write_gguf(
    tmp_path / "a.gguf", tiny.gguf_metadata(config), tensors, kinds
  )
  largest = tensors["token_embd.weight"].nbytes
  del tensors
  tracemalloc.start()
  try:
    _, weights = load_gguf(path)
    for name in weights:
      weights[name]
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert largest < peak < 1.3 * largest


# Llama 3's settings but for the length: a wave is kept, one mixed, two divided.
_LLAMA3 = Llama3Scaling(
  factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=32
)
_THETA = 100.0


def _llama3_file(path, change=None):
  """A file with RoPE's divisors as converters compute and store them."""
  config = dataclasses.replace(_TINY, rope_theta=_THETA)
  divisors = []
  for i in range(4):
    wave = 2 * np.pi * _THETA ** (i / 4)
    mixed = np.clip((32 / wave - 1.0) / (4.0 - 1.0), 0, 1)
    divisors.append(1 / ((1 - mixed) / 8.0 + mixed))
  tensors = tiny.gguf_tensors(config)
  tensors["rope_freqs.weight"] = np.array(divisors, np.float32)
  metadata = tiny.gguf_metadata(config)
  if change:
    change(metadata, tensors)
  return tiny.write_gguf(path, metadata, tensors), divisors


def test_llama_3s_divisors_are_its_scaling(tmp_path):
  path, divisors = _llama3_file(tmp_path / "a.gguf")
  config, weights = load_gguf(path)
  assert target_metadata(path) == config
  hash(config)
  assert config.rope_scaling == FrequencyFactors(
    divisors=tuple(np.float32(divisors).tolist())
  )
  assert (divisors[0], *divisors[2:]) == (1, 8, 8)
  assert 1 < divisors[1] < 8
  assert not any("rope" in name for name in weights)
  x = np.random.default_rng(0).standard_normal((6, 2, 8)).astype(np.float32)
  positions = jnp.array([0, 1, 7, 31, 100, 2000])
  rotate_with = lambda scaling: rotate(
    jnp.asarray(x), positions, _THETA, scaling
  )
  np.testing.assert_allclose(
    rotate_with(config.rope_scaling), rotate_with(_LLAMA3), atol=1e-3
  )
  assert np.abs(rotate_with(None) - rotate_with(_LLAMA3)).max() > 0.5


def test_a_target_of_a_llama_3_file_is_the_published_one(tmp_path):
  """Logits with the file's divisors = with the published settings."""
  path, _ = _llama3_file(tmp_path / "a.gguf")
  config, weights = load_gguf(path)
  tokens = jnp.arange(14)[None] % config.vocab_size
  run = jax.jit(LlamaTarget.prefill, static_argnums=3)
  logits = []
  for scaling in (config.rope_scaling, _LLAMA3, None):
    shape = dataclasses.replace(config, rope_scaling=scaling)
    target = target_from_tensors(
      shape, {k: 0.2 * v for k, v in weights.items()}, jnp.float32
    )
    logits.append(run(target, tokens, jnp.array([14]), (0,)).logits)
  np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)
  assert np.abs(logits[0] - logits[2]).max() > 1e-2


def test_linear_scaling(tmp_path):
  tensors = tiny.gguf_tensors(_TINY)
  for i, (keys, scaling) in enumerate(
    (
      ({"type": "linear", "factor": 2.5}, LinearScaling(factor=2.5)),
      # llama.cpp takes a factor without a type for this one.
      ({"factor": 2.5}, LinearScaling(factor=2.5)),
      ({"type": "linear", "factor": 1.0}, None),
      ({"type": "linear"}, None),
      ({"type": "none", "factor": 2.5}, None),
    )
  ):
    metadata = tiny.gguf_metadata(_TINY)
    metadata |= {f"llama.rope.scaling.{k}": v for k, v in keys.items()}
    path = tiny.write_gguf(tmp_path / f"{i}.gguf", metadata, tensors)
    assert target_metadata(path).rope_scaling == scaling
  metadata = tiny.gguf_metadata(_TINY) | {"llama.rope.scale_linear": 3.0}
  path = tiny.write_gguf(tmp_path / "old.gguf", metadata, tensors)
  assert target_metadata(path).rope_scaling == LinearScaling(factor=3.0)


@pytest.mark.parametrize(
  ("change", "told"),
  [
    (
      lambda m, t: t.update({"rope_freqs.weight": np.ones(5, np.float32)}),
      "tensor 'rope_freqs.weight' has shape (5,): expected (4,)",
    ),
    (
      lambda m, t: t.update({"rope_freqs.weight": np.zeros(4, np.float32)}),
      "tensor 'rope_freqs.weight': expected divisors above 0",
    ),
    (
      lambda m, t: t["rope_freqs.weight"].fill(np.nan),
      "tensor 'rope_freqs.weight' has a NaN",
    ),
    (
      lambda m, t: m.update({"llama.rope.scaling.factor": 2.0}),
      "'rope_freqs.weight': expected no rope.scaling.factor beside it",
    ),
  ],
)
def test_bad_divisors(tmp_path, change, told):
  path, _ = _llama3_file(tmp_path / "a.gguf", change)
  assert told in _error(path)


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
    dict(load_gguf(path)[1])
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
      weights = dict(weights)
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


@pytest.mark.parametrize(
  ("config", "name"),
  # Qwen3 has no divisors of its frequencies.
  [(_TINY, "blk.0.attn_q.bias"), (_QWEN, "rope_freqs.weight")],
)
def test_extra_tensor(tmp_path, config, name):
  tensors = tiny.gguf_tensors(config) | {name: np.ones(4, np.float32)}
  path = tiny.write_gguf(
    tmp_path / "a.gguf", tiny.gguf_metadata(config), tensors
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
    ("llama.rope.scaling.type", "yarn", "expected none or linear"),
    ("llama.rope.scaling.type", "longrope", "expected none or linear"),
    ("llama.rope.scaling.factor", 0.0, "expected a positive number"),
    ("llama.rope.scaling.attn_factor", 2.0, "expected 1.0"),
    ("llama.attention.sliding_window", 8, "layers that see everything"),
    ("llama.attention.scale", 0.5, "expected the scale of the head size"),
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

"""The drafter checkpoint: what is written, what is read, what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from d2sd_jax import UsageError, cli, load_drafter
from d2sd_jax.io import drafter_format
from d2sd_jax.io.drafter_format import (
  drafter_tensors,
  load_drafter_folder,
  read_drafter_config,
  save_drafter,
)

_FIVE_LAYERS = dataclasses.replace(
  tiny.DFLASH, num_layers=5, target_layer_ids=(0, 1, 2)
)
_WIDTH, _QUERY, _KEY, _MLP = 24, 40, 10, 28
_SHAPES = {
  "input_layernorm": (_WIDTH,),
  "post_attention_layernorm": (_WIDTH,),
  "self_attn.q_proj": (_QUERY, _WIDTH),
  "self_attn.k_proj": (_KEY, _WIDTH),
  "self_attn.v_proj": (_KEY, _WIDTH),
  "self_attn.o_proj": (_WIDTH, _QUERY),
  "self_attn.q_norm": (10,),
  "self_attn.k_norm": (10,),
  "mlp.gate_proj": (_MLP, _WIDTH),
  "mlp.up_proj": (_MLP, _WIDTH),
  "mlp.down_proj": (_WIDTH, _MLP),
}


@pytest.fixture(params=[_FIVE_LAYERS, tiny.VP], ids=["dflash", "vp"])
def config(request):
  return request.param


@pytest.fixture
def folder(tmp_path):
  save_drafter(tiny.drafter(tiny.VP), tmp_path)
  return tmp_path


def _edit(folder, **changes):
  """Changes config.json; `dflash_config` is merged, `...` removes a key."""
  path = folder / "config.json"
  raw = json.loads(path.read_text())
  nested = changes.pop("dflash_config", {})
  for settings, new in ((raw, changes), (raw["dflash_config"], nested)):
    settings.update(new)
    for key in [k for k, v in settings.items() if v is ...]:
      del settings[key]
  path.write_text(json.dumps(raw))


def test_names_and_shapes_are_those_of_the_format(tmp_path):
  save_drafter(tiny.drafter(_FIVE_LAYERS), tmp_path)
  expected = {
    f"layers.{i}.{name}.weight": shape
    for i in range(5)
    for name, shape in _SHAPES.items()
  }
  expected |= {"hidden_norm.weight": (_WIDTH,), "norm.weight": (_WIDTH,)}
  expected["fc.weight"] = (_WIDTH, 3 * _WIDTH)
  tensors = load_file(tmp_path / "model.safetensors")
  assert {k: v.shape for k, v in tensors.items()} == expected
  assert len(tensors) == 58
  assert {v.dtype for v in tensors.values()} == {jnp.dtype(jnp.bfloat16)}


def test_tensors_are_the_weights_in_out_in_layout(tmp_path):
  drafter = tiny.drafter(_FIVE_LAYERS)
  save_drafter(drafter, tmp_path)
  tensors = load_file(tmp_path / "model.safetensors")
  for name, value in tiny.drafter_tensors(drafter).items():
    np.testing.assert_array_equal(tensors[name], value.astype(jnp.bfloat16))


def test_config_file_says_what_other_loaders_read(tmp_path, config):
  save_drafter(tiny.drafter(config), tmp_path)
  raw = json.loads((tmp_path / "config.json").read_text())
  assert raw["architectures"] == ["DFlashDraftModel"]
  assert raw["model_type"] == "qwen3"
  assert raw["block_size"] == 5
  assert raw["num_target_layers"] == 3
  assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 700.0
  assert raw["dtype"] == "bfloat16"
  assert raw["layer_types"] == ["full_attention"] * config.num_layers
  dflash = raw["dflash_config"]
  assert dflash["mask_token_id"] == config.mask_token_id
  assert dflash["target_layer_ids"] == list(config.target_layer_ids)
  assert dflash.get("training_mode", "dflash") == config.training_mode
  assert ("prefix_weight_base" in dflash) == (config is tiny.VP)
  for key in (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps"),
    *("vocab_size", "max_position_embeddings", "sliding_window"),
    "tie_word_embeddings",
  ):
    assert key in raw


def test_round_trip_keeps_the_config_and_the_bytes(tmp_path, config):
  first, second = tmp_path / "a", tmp_path / "b"
  save_drafter(tiny.drafter(config), first)
  loaded = load_drafter_folder(first, tiny.TARGET)
  assert loaded.config == config
  save_drafter(loaded, second)
  for name in ("config.json", "model.safetensors"):
    assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_loaded_drafter_computes_the_same(folder, dtype):
  loaded = load_drafter(str(folder), dtype=dtype)
  assert loaded.fc.dtype == dtype
  original = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16).astype(dtype), tiny.drafter(tiny.VP)
  )
  run = jax.jit(lambda model, x: model.context_kv(x, jnp.arange(6)[None]))
  features = jax.random.normal(jax.random.key(0), (1, 6, 2, _WIDTH))
  for a, b in zip(
    jax.tree.leaves(run(loaded, features)),
    jax.tree.leaves(run(original, features)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_then_import_is_bit_equal(tmp_path, config, dtype):
  """Of weights that are kept as they are, and of what is rounded once."""
  drafter = tiny.drafter(config)
  save_drafter(drafter, tmp_path / "a", dtype)
  loaded = load_drafter_folder(tmp_path / "a", tiny.TARGET, dtype)
  assert loaded.config == config
  kept = tiny.drafter_tensors(drafter)
  for name, got in tiny.drafter_tensors(loaded).items():
    assert got.dtype == dtype
    assert got.tobytes() == kept[name].astype(dtype).tobytes()
  save_drafter(loaded, tmp_path / "b", dtype)
  for name in ("config.json", "model.safetensors"):
    first, second = tmp_path / "a" / name, tmp_path / "b" / name
    assert first.read_bytes() == second.read_bytes()
  assert json.loads(second.with_name("config.json").read_text())["dtype"] == (
    dtype
  )


def test_names_and_shapes_are_those_of_the_file(tmp_path, config):
  save_drafter(tiny.drafter(config), tmp_path)
  tensors = load_file(tmp_path / "model.safetensors")
  found = {name: value.shape for name, value in tensors.items()}
  assert drafter_tensors(config) == found


def test_an_export_that_fails_leaves_the_old_folder(folder, monkeypatch):
  before = {p.name: p.read_bytes() for p in folder.iterdir()}

  def fail(tensors, path, metadata):
    path.write_bytes(b"half of it")
    raise OSError("disk full")

  monkeypatch.setattr(drafter_format, "save_file", fail)
  with pytest.raises(OSError, match="disk full"):
    save_drafter(tiny.drafter(_FIVE_LAYERS), folder)
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
  with pytest.raises(UsageError, match="dtype='int8': expected one of float32"):
    save_drafter(tiny.drafter(), folder, "int8")


def test_a_published_config_loads(folder):
  """With every key that published folders have and that changes nothing."""
  _edit(
    folder,
    attention_dropout=0.0,
    auto_map={"AutoModel": "dflash.DFlashDraftModel"},
    bos_token_id=3,
    eos_token_id=4,
    initializer_range=0.02,
    max_window_layers=1,
    rope_parameters=...,
    rope_scaling=None,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.57.3",
    use_cache=True,
    use_sliding_window=False,
    draft_vocab_size=61,
    dflash_config={"block_size": ..., "causal": False, "use_swa": False},
  )
  assert load_drafter_folder(folder, tiny.TARGET).config == tiny.VP


def test_saving_again_replaces_the_files(folder):
  save_drafter(tiny.drafter(_FIVE_LAYERS, seed=3), folder)
  assert load_drafter_folder(folder).config == _FIVE_LAYERS
  assert sorted(p.name for p in folder.iterdir()) == [
    "config.json",
    "model.safetensors",
  ]


def test_rope_theta_is_read_from_either_place(folder):
  _edit(folder, rope_theta=123.0, rope_parameters=...)
  assert read_drafter_config(folder).rope_theta == 123.0
  _edit(folder, rope_theta=..., rope_parameters={"rope_theta": 7})
  assert read_drafter_config(folder).rope_theta == 7.0
  _edit(folder, rope_theta=8.0)
  with pytest.raises(UsageError, match="rope_theta"):
    read_drafter_config(folder)
  _edit(folder, rope_theta=..., rope_parameters=...)
  with pytest.raises(UsageError, match="rope_theta"):
    read_drafter_config(folder)


def test_block_size_is_read_from_either_place(folder):
  _edit(folder, block_size=..., dflash_config={"block_size": 11})
  assert read_drafter_config(folder).block_size == 11
  _edit(folder, block_size=9, dflash_config={"block_size": ...})
  assert read_drafter_config(folder).block_size == 9
  _edit(folder, block_size=...)
  with pytest.raises(UsageError, match="block_size"):
    read_drafter_config(folder)


def test_mask_and_taps_are_read_from_either_place(folder):
  gone = {"mask_token_id": ..., "target_layer_ids": ...}
  _edit(folder, mask_token_id=31, target_layer_ids=[1, 2], dflash_config=gone)
  config = read_drafter_config(folder)
  assert (config.mask_token_id, config.target_layer_ids) == (31, (1, 2))


def test_unknown_keys_are_ignored(folder):
  _edit(folder, use_cache=True, dflash_config={"comment": "hello"})
  assert read_drafter_config(folder) == tiny.VP


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("sliding_attention", {"layer_types": ["sliding_attention"]}),
    ("sliding_window", {"sliding_window": 128}),
    ("attention_bias", {"attention_bias": True}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("causal", {"dflash_config": {"causal": True}}),
    ("causal", {"causal": True}),
    ("is_causal", {"is_causal": True}),
    ("final_logit_softcapping", {"final_logit_softcapping": 30.0}),
    ("input_embedding_scale", {"dflash_config": {"input_embedding_scale": 2}}),
    ("output_multiplier", {"output_multiplier": 0.5}),
    ("selector_rank", {"dflash_config": {"selector_rank": 8}}),
    ("rms_norm_eps", {"rms_norm_eps": 10**400}),
    ("rope_theta", {"rope_theta": 10**400}),
    ("projector_type", {"dflash_config": {"projector_type": "mlp"}}),
    ("use_swa", {"dflash_config": {"use_swa": True}}),
    ("layer_types=3: expected a list", {"layer_types": 3}),
    ("rope_scaling='yarn': expected an object", {"rope_scaling": "yarn"}),
    ("use_sliding_window", {"use_sliding_window": True}),
    ("draft_vocab_size", {"draft_vocab_size": 32}),
    ("yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("linear", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    (
      "llama3",
      {"rope_parameters": {"rope_type": "llama3", "rope_theta": 700.0}},
    ),
  ],
)
def test_what_would_change_the_computation_is_refused(folder, name, changes):
  # Sliding layers above all (mistake 7).
  _edit(folder, **changes)
  with pytest.raises(UsageError, match=name):
    load_drafter_folder(folder)


@pytest.mark.parametrize(
  "key",
  [
    *("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps"),
    *("vocab_size", "max_position_embeddings", "num_target_layers"),
  ],
)
def test_a_missing_setting_is_named(folder, key):
  _edit(folder, **{key: ...})
  with pytest.raises(UsageError, match=key):
    read_drafter_config(folder)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("mask_token_id", ...),
    ("mask_token_id", None),
    ("mask_token_id", 61),
    ("target_layer_ids", ...),
    ("target_layer_ids", [0, 2, 3]),
    ("target_layer_ids", 2),
    ("training_mode", "medusa"),
  ],
)
def test_a_wrong_dflash_setting_is_named(folder, key, value):
  # Above all a mask id: it has no default (mistake 3).
  _edit(folder, dflash_config={key: value})
  with pytest.raises(UsageError, match=key):
    read_drafter_config(folder)


def _rewrite(folder, change):
  path = folder / "model.safetensors"
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path)


@pytest.mark.parametrize(
  ("message", "change"),
  [
    ("fc.weight is missing", lambda t: t.pop("fc.weight")),
    (
      "layers.0.self_attn.k_norm.weight is missing",
      lambda t: t.pop("layers.0.self_attn.k_norm.weight"),
    ),
    (
      "layers.1.mlp.up_proj.weight is not part",
      lambda t: t.update({"layers.1.mlp.up_proj.weight": np.zeros((2, 3))}),
    ),
    (
      "lm_head.weight is not part",
      lambda t: t.update({"lm_head.weight": np.zeros((61, 24))}),
    ),
    (
      r"o_proj.weight has shape \(40, 24\), expected \(24, 40\)",
      lambda t: t.update(
        {"layers.0.self_attn.o_proj.weight": np.zeros((40, 24))}
      ),
    ),
    (
      r"fc.weight has shape \(24, 72\), expected \(24, 48\)",
      lambda t: t.update({"fc.weight": np.zeros((24, 72))}),
    ),
  ],
)
def test_tensors_are_strict_both_ways(folder, message, change):
  _rewrite(folder, change)
  with pytest.raises(UsageError, match=message):
    load_drafter_folder(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -7])
def test_a_truncated_file_is_refused(folder, kept):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(UsageError, match="whole safetensors file") as error:
    load_drafter_folder(folder)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("layers", [10**9, 2**31 - 1])
def test_more_layers_than_there_are_tensors_are_refused_at_once(folder, layers):
  _edit(folder, num_hidden_layers=layers)
  with pytest.raises(UsageError, match=rf"layers\.{layers - 1}\..* is missing"):
    load_drafter_folder(folder)


@pytest.mark.parametrize(
  "text", ["", "{", "[]", '{"dflash_config": 3}', "[" * 100_000]
)
def test_a_damaged_config_is_refused(folder, text):
  (folder / "config.json").write_text(text)
  with pytest.raises(UsageError, match=r"config\.json: expected") as error:
    load_drafter_folder(folder)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
  (folder / name).unlink()
  with pytest.raises(UsageError, match=name):
    load_drafter_folder(folder)


@pytest.mark.parametrize(
  ("field", "named", "value"),
  [
    ("vocab_size", "vocab_size", 62),
    ("hidden_size", "hidden_size", 25),
    ("num_layers", "num_target_layers", 5),
  ],
)
def test_another_target_is_refused_by_name(folder, field, named, value):
  other = dataclasses.replace(tiny.TARGET, **{field: value})
  with pytest.raises(UsageError, match=f"{named}=.*target's {value}"):
    load_drafter_folder(folder, other)


def _poison(name, value):
  """Puts one number into a tensor's middle."""

  def change(tensors):
    tensors[name].reshape(-1)[tensors[name].size // 2] = value

  return lambda folder: _rewrite(folder, change)


def _with(name, array):
  return lambda folder: _rewrite(folder, lambda t: t.update({name: array}))


def _renamed(old, new):
  return lambda folder: _rewrite(folder, lambda t: t.update({new: t.pop(old)}))


def _set(**changes):
  return lambda folder: _edit(folder, **changes)


def _dflash(**changes):
  return _set(dflash_config=changes)


def _cut(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-1])


_BAD = {
  "missing tensor": (
    lambda f: _rewrite(f, lambda t: t.pop("norm.weight")),
    "tensor norm.weight is missing",
  ),
  "extra tensor": (
    _with("lm_head.weight", np.zeros((61, 24), np.float32)),
    "tensor lm_head.weight is not part of a drafter",
  ),
  "draft vocabulary's tensor": (
    _with("d2t", np.zeros(61, np.float32)),
    "tensor d2t is not part of a drafter",
  ),
  "another generation's tensor": (
    _with("markov_head.weight", np.zeros((7, 3), np.float32)),
    "tensor markov_head.weight is not part of a drafter",
  ),
  "misshapen tensor": (
    _with("layers.0.mlp.up_proj.weight", np.zeros((24, 28), np.float32)),
    "up_proj.weight has shape (24, 28), expected (28, 24)",
  ),
  "misnamed tensor": (
    _renamed("fc.weight", "model.fc.weight"),
    "tensor fc.weight is missing",
  ),
  "misnamed layer": (
    _renamed("layers.0.mlp.up_proj.weight", "layers.0.mlp.w1.weight"),
    "tensor layers.0.mlp.up_proj.weight is missing",
  ),
  "whole numbers": (
    _with("norm.weight", np.ones(24, np.uint8)),
    "tensor norm.weight has dtype U8, expected one of BF16, F16, F32",
  ),
  "unknown dtype": (
    _with("norm.weight", np.ones(24, np.int16)),
    "tensor norm.weight: dtype I16",
  ),
  "not a number": (
    _poison("layers.0.self_attn.o_proj.weight", np.nan),
    "tensor layers.0.self_attn.o_proj.weight has a NaN",
  ),
  "infinity": (
    _poison("hidden_norm.weight", -np.inf),
    "tensor hidden_norm.weight has a NaN or an infinity",
  ),
  "truncated file": (_cut, "model.safetensors: expected a whole"),
  "no weights": (
    lambda f: (f / "model.safetensors").unlink(),
    "expected a folder with model.safetensors",
  ),
  "no config": (
    lambda f: (f / "config.json").unlink(),
    "expected a folder with config.json",
  ),
  "another vocabulary": (_set(vocab_size=62), "drafter vocab_size=62"),
  "another width": (_set(hidden_size=25), "drafter hidden_size=25"),
  "another depth": (
    _set(num_target_layers=4),
    "drafter num_target_layers=4: expected the target's 3",
  ),
  "mask id": (_dflash(mask_token_id=61), "mask_token_id=61"),
  "negative mask id": (_dflash(mask_token_id=-1), "mask_token_id=-1"),
  "tap": (_dflash(target_layer_ids=[0, 3]), "target_layer_ids=(0, 3)"),
  "negative tap": (_dflash(target_layer_ids=[-1]), "target_layer_ids=(-1,)"),
  "no taps": (_dflash(target_layer_ids=[]), "target_layer_ids=()"),
  "causal": (_dflash(causal=True), "causal=True"),
  "hidden causal": (
    _set(causal=True, dflash_config={"causal": False}),
    "causal=True",
  ),
  "projector": (_dflash(projector_type="mlp"), "projector_type='mlp'"),
  "sliding layers": (
    _set(layer_types=["sliding_attention"]),
    "layer_types='sliding_attention'",
  ),
  "draft vocabulary": (_set(draft_vocab_size=32), "draft_vocab_size=32"),
  "another family": (_set(model_type="llama"), "model_type='llama'"),
  "another architecture": (
    _set(architectures=["DFlash2DraftModel"]),
    "architectures=['DFlash2DraftModel']",
  ),
  "partial rotation": (
    _set(partial_rotary_factor=0.5),
    "partial_rotary_factor=0.5",
  ),
  "two bases": (_set(rope_theta=8.0), "rope_theta=[8.0, 700.0]"),
  "base of text": (
    _set(rope_theta="1e6", rope_parameters=...),
    "rope_theta=['1e6']",
  ),
  "scaled embeddings": (
    _dflash(input_embedding_scale=2.0),
    "input_embedding_scale=2.0: expected 1",
  ),
  "scaled logits": (_set(output_multiplier=0.5), "output_multiplier=0.5"),
  "capped logits": (
    _dflash(final_logit_softcapping=30.0),
    "final_logit_softcapping=30.0",
  ),
  "causal layers": (_set(is_causal=True), "is_causal=True"),
  "convolutions": (_dflash(conv_kernel_size=3), "conv_kernel_size=3"),
  "a selector": (_dflash(selector_rank=8), "selector_rank=8"),
  "two mask ids": (_set(mask_token_id=5), "mask_token_id=[5, 23]"),
  "two block sizes": (_set(block_size=6), "block_size=[6, 5]"),
  "block size of another kind": (
    _set(block_size=[5], dflash_config={"block_size": ...}),
    "block_size=[5]",
  ),
  "huge number": (_set(intermediate_size=10**30), "intermediate_size=1000"),
}


@pytest.mark.parametrize("name", _BAD)
def test_a_bad_folder_is_told_in_one_line(folder, name, capsys):
  """By the path of the scripts: one line that names the culprit, status 2."""
  spoil, told = _BAD[name]
  spoil(folder)
  load = lambda _: load_drafter_folder(folder, tiny.TARGET)
  assert cli.run(load, []) == cli.USAGE
  out, err = capsys.readouterr()
  assert not out
  assert err.startswith("error: ")
  assert err.count("\n") == 1
  assert str(folder) in err
  assert told in err

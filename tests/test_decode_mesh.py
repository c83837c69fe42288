"""Decoding on a mesh: the tokens of one device, whatever splits the models.

Devices are simulated ones of the CPU, in processes of their own.
"""

import dataclasses
import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
from flax import nnx
from test_mesh import end, free_address, start_process

from d2sd_jax import Drafter, DrafterConfig, UsageError
from d2sd_jax.decoding.decode_config import DecodeConfig
from d2sd_jax.io.drafter_format import save_drafter
from d2sd_jax.tensor_parallel import Share, check_split

_HERE = Path(__file__).parent
_SAMPLED = {"temperature": 0.8, "seed": 3}
_FILTERED = {**_SAMPLED, "top_k": 9, "top_p": 0.8}


def _decode(cases, devices=8):
  """What each case gave, in a process with so many devices."""
  worker = [str(_HERE / "decode_worker.py"), json.dumps(cases)]
  process = start_process(worker, devices, stdout=subprocess.PIPE)
  try:
    output, error = process.communicate(timeout=1500)
  finally:
    process.kill()
  assert process.returncode == 0, error
  return [json.loads(line) for line in output.splitlines()]


def _check(cases):
  """Every case gives, on its mesh, what it gives on one device."""
  alone = {"mesh": None, "split": False, "turned": False}
  plain = [{**case, **alone} for case in cases]
  distinct = [json.loads(x) for x in sorted({json.dumps(c) for c in plain})]
  found = _decode([*distinct, *cases])
  expected = dict(zip(map(json.dumps, distinct), found, strict=False))
  for case, alone, got in zip(
    cases, plain, found[len(distinct) :], strict=True
  ):
    wanted = expected[json.dumps(alone)]
    assert got["tokens"] == wanted["tokens"], case
    assert got["cycles"] == wanted["cycles"], case
    assert got["astray"] == 0, case
  return found


def _case(target, mesh, mode, sampling=None, **more):
  return {
    "target": target,
    "mesh": mesh,
    "mode": mode,
    **(sampling or {}),
    **more,
  }


@pytest.mark.slow
def test_tokens_do_not_depend_on_the_mesh():
  found = _check(
    [
      _case("3 of 24", "tensor:8", "d2sd", _SAMPLED),
      _case("3 of 24", "data:2,tensor:4", "d2sd", split=True),
      _case("2 of 8", "data:2,tensor:4", "ar", _FILTERED),
      _case("8 of 24", "data:2,tensor:2", "d2sd", split=True, int8=True),
      _case("gpt_oss", "data:2,tensor:3", "dflash", _SAMPLED),
    ]
  )
  # Rows of different lengths: some stopped, some did not.
  lengths = {len(tokens) for row in found for tokens in row["tokens"]}
  assert len(lengths) > 2


@pytest.mark.slow
def test_matrices_stored_transposed_are_split_alike():
  _check(
    [
      _case("3 of 24", "data:2,tensor:4", "d2sd", split=True, turned=True),
      _case("8 of 24", "tensor:2", "d2sd", split=True, turned=True, int8=True),
      _case("gpt_oss", "tensor:3", "ar", _SAMPLED, turned=True),
    ]
  )


def test_planted_drafts_are_accepted_on_a_mesh():
  (plain,) = _decode([_case("3 of 24", None, "ar")], devices=1)
  plant = {"plant": plain["tokens"]}
  found = _check([_case("3 of 24", "tensor:8", "d2sd", **plant)])
  assert found[0]["tokens"] == plain["tokens"]
  counts = {count for row in found[0]["cycles"] for count in row}
  assert {1, 2, 3, 5} <= counts


@pytest.mark.long
@pytest.mark.parametrize("target", ["2 of 8", "3 of 24", "8 of 24"])
@pytest.mark.parametrize("mode", ["ar", "dflash", "d2sd"])
def test_tokens_on_many_meshes(target, mode):
  meshes = ["data:1,tensor:1", "tensor:2", "data:2", "data:2,tensor:2"]
  meshes += ["tensor:4", "data:2,tensor:4", "tensor:8"]
  splits = (False,) if mode == "ar" else (False, True)
  _check(
    [
      _case(target, mesh, mode, sampling, split=split)
      for mesh, split, sampling in itertools.product(
        meshes, splits, (None, _SAMPLED)
      )
      # The drafters have four query heads.
      if not split or "tensor:8" not in mesh
    ]
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "mode", ["prompt_lookup", "dflash_samples", "reuse", "d2sd_3"]
)
def test_other_policies_on_meshes(mode):
  meshes = ("data:2,tensor:4", "tensor:2")
  _check(
    [
      _case("3 of 24", mesh, mode, sampling)
      for mesh, sampling in itertools.product(meshes, (None, _FILTERED))
    ]
  )


def test_each_query_head_meets_its_own_key_head():
  for size in (1, 2, 3, 4, 6, 8, 12, 24):
    for keys in (2, 3, 8):
      config = dataclasses.replace(tiny.TARGET, num_heads=24, num_kv_heads=keys)
      shares = [Share(config=config, part=i, size=size) for i in range(size)]
      heads = np.concatenate([share.heads for share in shares])
      assert heads.tolist() == list(range(24))
      for share in shares:
        group = len(share.heads) // len(share.key_heads)
        own = np.repeat(share.key_heads, group)
        assert own.tolist() == (share.heads // (24 // keys)).tolist()
      # Where one divides the other no device holds a head twice.
      if keys % size == 0 or size % keys == 0:
        assert all(
          len(set(share.key_heads)) == len(share.key_heads) for share in shares
        )


def test_shares_are_filled_up():
  rows = [
    Share(config=tiny.TARGET, part=i, size=3).vocabulary_rows.tolist()
    for i in range(3)
  ]
  assert [len(part) for part in rows] == [21, 21, 21]
  assert [row for part in rows for row in part] == [*range(61), -1, -1]


def test_heads_that_cannot_be_split_are_refused():
  with pytest.raises(UsageError) as found:
    check_split(tiny.TARGET, 4)
  told = (
    "mesh axis tensor=4: expected a divisor of the 6 query heads: 1, 2, 3, 6"
  )
  assert str(found.value) == told


@pytest.mark.parametrize(
  ("values", "told"),
  [
    ({"mesh": "tensor:0"}, "mesh='tensor:0'"),
    ({"mesh": "fsdp:2"}, "such as data:2,tensor:2"),
    ({"mesh": "data:3", "batch_size": 4}, "batch_size=4: expected a multiple"),
  ],
)
def test_bad_meshes(values, told):
  with pytest.raises(UsageError, match=told):
    DecodeConfig(**values)


@pytest.mark.parametrize(
  ("mesh", "told"),
  [
    pytest.param(
      "tensor:2",
      "mesh axis tensor=2: expected a divisor of the 9 query heads:",
      marks=pytest.mark.slow,
    ),
    ("tensor:6", "mesh='tensor:6': expected data:4 or another product up to 4"),
  ],
)
def test_the_script_refuses_a_mesh_in_one_line(mesh, told):
  script = [str(_HERE.parent / "decode.py"), f"--mesh={mesh}", "--prompt=Hi"]
  status, error = end(start_process(script, 4))
  assert status == 2
  assert error.count("\n") == 1
  assert told in error


class Scripts:
  """`decode.py` with tiny models, alone or in processes that talk."""

  def __init__(self, folder):
    self.folder = folder
    config = dataclasses.replace(
      tiny.GGUF_TARGET, vocab_size=len(tiny.TOKENS), max_length=256
    )
    metadata = tiny.tokenizer_metadata() | tiny.gguf_metadata(config)
    target = folder / "tiny.gguf"
    tiny.write_gguf(target, metadata, tiny.gguf_tensors(config))
    prompts = ("he", "what is that", "a", "count: 1 2 3 4")
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    self.flags = [
      f"--target={target}",
      f"--prompts_file={folder}/prompts.jsonl",
    ]
    self.flags += ["--mode=d2sd", "--max_new_tokens=12", "--batch_size=4"]
    self.flags += ["--temperature=0.8", "--dtype=float32"]
    for field, role in (("drafter", "dflash"), ("vp_drafter", "vp_drafter")):
      shape = DrafterConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=30,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        max_length=config.max_length,
        block_size=4,
        mask_token_id=3,
        target_layer_ids=(1,),
        num_target_layers=config.num_layers,
        training_mode=role,
      )
      save_drafter(Drafter(shape, rngs=nnx.Rngs(0)), folder / role)
      self.flags += [f"--{field}={folder / role}"]

  def start(self, name, *more, devices=1):
    script = str(_HERE.parent / "decode.py")
    output = f"--json={self.folder / name}.json"
    environment = {"D2SD_CACHE": str(self.folder / "cache")}
    return start_process(
      [script, *self.flags, output, *more], devices, **environment
    )

  def start_several(self, count, devices, more):
    """Processes that share a mesh; `more` flags of each."""
    joint = [f"--coordinator_address={free_address()}"]
    joint += [f"--num_processes={count}"]
    return [
      self.start(
        f"part{i}", *joint, f"--process_id={i}", *more[i], devices=devices
      )
      for i in range(count)
    ]

  def tokens(self, name):
    text = (self.folder / f"{name}.json").read_text()
    return [record["tokens"] for record in json.loads(text)]


def _check_processes(folder, count, devices, mesh):
  scripts = Scripts(folder)
  one = scripts.start("one")
  flags = [f"--mesh={mesh}", "--config.shard_drafters=True"]
  several = scripts.start_several(count, devices, [flags] * count)
  for process in (one, *several):
    status, told = end(process)
    assert status == 0, told
  assert scripts.tokens("part0") == scripts.tokens("one")
  # Only process 0 writes.
  assert not (folder / "part1.json").exists()


@pytest.mark.slow
def test_two_processes_decode_as_one_device_does(tmp_path):
  _check_processes(tmp_path, 2, 2, "data:2,tensor:2")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:4,tensor:2", "data:2,tensor:2"])
def test_four_processes_decode_as_one_device_does(tmp_path, mesh):
  _check_processes(tmp_path, 4, 2 if mesh == "data:4,tensor:2" else 1, mesh)


@pytest.mark.slow
def test_processes_that_would_decode_differently_say_so(tmp_path):
  scripts = Scripts(tmp_path)
  mesh = "--mesh=data:2,tensor:2"
  flags = [[mesh], [mesh, "--seed=5"]]
  for process in scripts.start_several(2, 2, flags):
    status, told = end(process)
    assert status == 2
    assert "process 1 has seed=5: expected 0 as in process 0" in told
  assert not (tmp_path / "part0.json").exists()

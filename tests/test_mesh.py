"""Training on a mesh and in several processes: as on one device.

Devices are simulated ones of the CPU, in processes of their own.
"""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, PartitionSpec

from d2sd_jax import cli, distributed
from d2sd_jax.errors import UsageError
from d2sd_jax.sharding import make_mesh, parse_mesh, weight_sharding
from d2sd_jax.training.data import make_dataset, read_conversations
from d2sd_jax.training.train_config import TrainConfig

_HERE = Path(__file__).parent
_CONFIG = """\
from ml_collections import ConfigDict

def get_config():
  return ConfigDict({})
"""
_LONG = {
  "num_steps": 50,
  "log_every": 10,
  "eval_every": 25,
  "checkpoint_every": 20,
}


def start_process(
  arguments, devices=1, stdout=subprocess.DEVNULL, **environment
):
  """Starts Python with simulated devices, in this checkout."""
  flag = f"--xla_force_host_platform_device_count={devices}"
  environment = os.environ | {
    "XLA_FLAGS": flag,
    "JAX_PLATFORMS": "cpu",
    # Half the time to compile.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": os.pathsep.join([str(_HERE.parent), str(_HERE)]),
    **environment,
  }
  return subprocess.Popen(
    [sys.executable, *arguments],
    env=environment,
    stdout=stdout,
    stderr=subprocess.PIPE,
    text=True,
  )


def free_address():
  """A port of this machine that nobody listens on."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return "127.0.0.1:{1}".format(*free.getsockname())


def end(process, timeout=540):
  """Waits for a process; its status and what it told."""
  try:
    _, error = process.communicate(timeout=timeout)
  finally:
    process.kill()
  return process.returncode, error


class Runs:
  """Runs of `train.py` on a tiny target, in processes of their own."""

  def __init__(self, folder, **values):
    self.folder = folder
    config = dataclasses.replace(tiny.GGUF_TARGET, vocab_size=len(tiny.TOKENS))
    metadata = tiny.tokenizer_metadata() | tiny.gguf_metadata(config)
    target = folder / "tiny.gguf"
    tiny.write_gguf(target, metadata, tiny.gguf_tensors(config))
    # Answers of different lengths; more lines than a batch, not a multiple.
    answer = lambda i: [(7 * j + 5 * i) % 200 + 20 for j in range(9 + 2 * i)]
    lines = [
      json.dumps({"prompt_tokens": [1, 9, 8 + i], "tokens": answer(i)})
      for i in range(13)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    (folder / "heldout.jsonl").write_text("\n".join(lines[:5]))
    values = {
      "target": str(target),
      "corpus": str(folder / "corpus.jsonl"),
      "heldout": str(folder / "heldout.jsonl"),
      "role": "vp_drafter",
      "num_layers": 1,
      "block_size": 4,
      "mask_token_id": 3,
      "num_anchors": 5,
      "max_length": 40,
      "batch_size": 8,
      "dtype": "float32",
      **values,
    }
    text = _CONFIG.replace("{}", repr(values))
    (folder / "tiny_config.py").write_text(text)

  def flags(self, workdir, **overrides):
    flags = [f"--config={self.folder / 'tiny_config.py'}"]
    flags += [f"--workdir={self.folder / workdir}"]
    return flags + [f"--config.{k}={v}" for k, v in overrides.items()]

  def start(self, *runs, devices=1, **environment):
    """A process that does runs, given by their flags, one after another."""
    arguments = [str(_HERE / "mesh_worker.py"), json.dumps(runs)]
    return start_process(arguments, devices, **environment)

  def start_several(self, count, flags):
    """Processes of eight devices in all that make one run."""
    return self._start_joint([flags] * count, [{}] * count)

  def start_two(self, flags, more=((), ()), environments=({}, {})):
    """Two processes of four devices, each with its own flags and variables."""
    return self._start_joint([[*flags, *own] for own in more], environments)

  def _start_joint(self, flags, environments):
    joint = [f"--coordinator_address={free_address()}"]
    joint += [f"--num_processes={len(flags)}"]
    return [
      self.start(
        [*own, *joint, f"--process_id={i}"],
        devices=8 // len(flags),
        **environments[i],
      )
      for i, own in enumerate(flags)
    ]

  def weights(self, workdir):
    with np.load(self.folder / workdir / "weights.npz") as file:
      return dict(file)

  def metrics(self, workdir):
    text = (self.folder / workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]

  def assert_alike(self, workdir, other, tolerance):
    """Every tensor of two runs is the same within a relative norm."""
    a, b = self.weights(workdir), self.weights(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
      distance = np.linalg.norm(value - b[name]) / np.linalg.norm(value)
      assert distance <= tolerance, (name, distance)
    mine, theirs = self.metrics(workdir), self.metrics(other)
    assert [m.keys() for m in mine] == [m.keys() for m in theirs]
    for x, y in zip(mine, theirs, strict=True):
      assert x.get("loss", 0) == pytest.approx(y.get("loss", 0), rel=1e-5)
      assert x.get("heldout_alpha") == y.get("heldout_alpha")


def _errors(text):
  """Lines told, without those of the transport between processes."""
  return [x for x in text.splitlines() if not x.startswith("[Gloo]")]


def test_a_mesh_is_read_from_text():
  assert parse_mesh(None) == {"data": 1, "fsdp": 1}
  assert parse_mesh("data:4, fsdp:2") == {"data": 4, "fsdp": 2}
  assert parse_mesh("fsdp:3") == {"data": 1, "fsdp": 3}
  assert list(parse_mesh("fsdp:3,data:2")) == ["data", "fsdp"]


@pytest.mark.parametrize(
  "text", ["", "data", "data:", "data:0", "data:-2", "data:x", "model:2"]
)
def test_what_is_no_mesh_is_refused(text):
  text = text or "data:2,data:2"
  with pytest.raises(UsageError, match=r"mesh='.*data:2,fsdp:2"):
    parse_mesh(text)


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
  count = jax.device_count()
  assert make_mesh(f"data:{count}").size == count
  with pytest.raises(UsageError, match=f"mesh='data:999': .* data:{count} "):
    make_mesh("data:999")


def test_a_batch_that_cannot_be_split_is_refused():
  make = lambda size: TrainConfig(
    corpus="c", heldout="h", batch_size=size, mesh="data:3,fsdp:2"
  )
  assert make(12).batch_size == 12
  with pytest.raises(
    UsageError, match="batch_size=8: expected a multiple of 6"
  ):
    make(8)


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((), ()),
    ((8,), ()),
    ((8, 12), (None, "fsdp")),
    ((8, 10), ("fsdp",)),
    ((6, 10), ()),
    ((3, 16, 4), (None, "fsdp")),
  ],
)
def test_the_longest_dimension_that_can_be_is_split(shape, spec):
  mesh = AbstractMesh((2, 4), ("data", "fsdp"))
  assert weight_sharding(mesh, shape).spec == PartitionSpec(*spec)
  whole = AbstractMesh((8, 1), ("data", "fsdp"))
  assert weight_sharding(whole, shape).spec == PartitionSpec()


class _Counted:
  """Records that note which of them were read."""

  def __init__(self, records):
    self.records, self.read = records, []

  def __len__(self):
    return len(self.records)

  def __getitem__(self, index):
    self.read.append(index)
    return self.records[index]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_read_their_rows_of_the_same_batches(tmp_path, processes):
  lines = [
    json.dumps({"prompt_tokens": [1, 50 + i], "tokens": [7] * (2 + i)})
    for i in range(10)
  ]
  (tmp_path / "c.jsonl").write_text("\n".join(lines))
  records = read_conversations(tmp_path / "c.jsonl", 14)
  whole = make_dataset(records, 4, 3)
  share = 4 // processes
  own = [_Counted(records) for _ in range(processes)]
  parts = [
    make_dataset(counted, 4, 3, range(i * share, (i + 1) * share))
    for i, counted in enumerate(own)
  ]
  for step in range(5):  # two epochs
    batches = [dataset[step] for dataset in parts]
    # Rows of others are zero, so that the sum is the whole batch.
    joint = jax.tree.map(lambda *x: np.sum(x, axis=0), *batches)
    jax.tree.map(np.testing.assert_array_equal, joint, whole[step])
  read = sorted(i for counted in own for i in counted.read)
  assert read == sorted(2 * list(range(10)))
  assert {len(counted.read) for counted in own} == {5 * share}


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    (
      ["--process_id=0"],
      "coordinator_address=None: expected a value",
    ),
    (
      ["--coordinator_address=host", "--num_processes=2", "--process_id=0"],
      "coordinator_address='host': expected HOST:PORT",
    ),
    (
      ["--coordinator_address=h:1", "--num_processes=2", "--process_id=2"],
      "process_id=2: expected 0 to 1",
    ),
    (
      ["--coordinator_address=h:1", "--num_processes=0", "--process_id=0"],
      "num_processes=0: expected 1 or more",
    ),
  ],
)
def test_flags_of_a_process_are_checked(flags, told):
  parser = cli.FlagParser("x.py", "", "")
  distributed.add_flags(parser)
  with pytest.raises(UsageError, match=told):
    distributed.start(parser.parse(flags)[0])


def test_processes_that_are_not_told_of_are_a_mistake(monkeypatch):
  options = []

  def initialize(**given):
    options.append(given)
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  parser = cli.FlagParser("x.py", "", "")
  distributed.add_flags(parser)
  start = lambda *flags: distributed.start(parser.parse(flags)[0])
  start()
  assert options == []
  with pytest.raises(UsageError, match="distributed=True: expected Slurm"):
    start("--distributed")
  told = ("--coordinator_address=h:1", "--num_processes=2", "--process_id=1")
  with pytest.raises(UsageError, match="coordinator_address='h:1': expected"):
    start(*told)
  assert options[1]["process_id"] == 1
  assert options[1]["heartbeat_timeout_seconds"] <= 60


def test_no_activations_travel():
  """Weights are gathered once each, and gradients summed; nothing else."""
  process = start_process([str(_HERE / "mesh_program.py")], devices=8)
  status, text = end(process)
  assert status == 0, text
  for name, program in json.loads(text.splitlines()[-1]).items():
    found = program["collectives"]
    kinds = {kind for kind, _ in found}
    assert kinds <= {"all-gather", "all-reduce"}, name
    gathered = sorted(x for kind, x in found if kind == "all-gather")
    # Scores of the draw of anchors, the smallest array there is.
    expected = [[8, 18]] if name == "train" else []
    expected += program["split"]
    assert gathered == sorted(expected), name
    # Sums of the loss, counts by slot, and in training every gradient.
    plain = lambda shape: tuple(sorted(n for n in shape if n != 1))
    reduced = {plain(x) for kind, x in found if kind == "all-reduce"}
    gradients = {plain(x) for x in (*program["weights"], *program["fused"])}
    if name == "train":
      assert {(), (4,)} < reduced <= {(), (4,), *gradients}, name
      # Every gradient is summed: by itself, or as part of a fused one.
      assert all(map(reduced.__contains__, map(plain, program["fused"]))), name
    else:
      assert reduced == {(), (4,)}, name


@pytest.mark.slow
def test_two_processes_train_as_one_device_does(tmp_path):
  steps = {"log_every": 4, "eval_every": 8, "checkpoint_every": 8}
  runs = Runs(tmp_path, num_steps=8, **steps)
  one = runs.start(runs.flags("one"))
  two = runs.start_two(runs.flags("two", mesh="data:4,fsdp:2"))
  (status, told), *others = [end(process) for process in (one, *two)]
  assert status == 0, told
  assert [status for status, _ in others] == [0, 0], others
  runs.assert_alike("one", "two", 1e-5)
  # Only process 0 speaks.
  assert "drafter written" in others[0][1]
  assert _errors(others[1][1]) == []


def test_processes_that_differ_all_say_so(tmp_path):
  runs = Runs(tmp_path)
  different = ((), ["--config.log_every=7"])
  ends = [
    end(process)
    for process in runs.start_two(runs.flags("run", mesh="data:8"), different)
  ]
  expected = "error: process 1 has log_every=7: expected 20 as in process 0"
  assert [(s, _errors(told)) for s, told in ends] == [(2, [expected])] * 2
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_four_processes_train_as_one_device_does(tmp_path):
  runs = Runs(tmp_path, **_LONG)
  one = runs.start(runs.flags("one"))
  four = runs.start_several(4, runs.flags("four", mesh="data:4,fsdp:2"))
  for process in (one, *four):
    status, told = end(process)
    assert status == 0, told
  runs.assert_alike("one", "four", 1e-5)


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_all(tmp_path):
  runs = Runs(tmp_path)
  missing = ((), ["--config.corpus=/none.jsonl"])
  ends = [
    end(process)
    for process in runs.start_two(runs.flags("run", mesh="data:8"), missing)
  ]
  expected = "corpus='/none.jsonl': expected a file of JSON lines"
  assert [(s, _errors(told)) for s, told in ends] == [
    (2, [f"error: process 1: {expected}"]),
    (2, [f"error: {expected}"]),
  ]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)]
)
@pytest.mark.parametrize(
  ("optimizer", "normalizer"), [("adamw", "batch"), ("muon", "example")]
)
def test_fifty_steps_are_the_same_on_any_mesh(
  tmp_path, dtype, tolerance, optimizer, normalizer
):
  how = {"optimizer": optimizer, "loss_normalizer": normalizer}
  runs = Runs(tmp_path, dtype=dtype, **_LONG, **how)
  meshes = ("data:1", "data:8", "data:4,fsdp:2", "fsdp:8")
  process = runs.start(
    *[
      runs.flags(mesh, mesh=mesh, shard_target="fsdp" in mesh)
      for mesh in meshes
    ],
    devices=8,
    WORKER_FLOAT64="1" if dtype == "float64" else "",
  )
  status, told = end(process)
  assert status == 0, told
  for mesh in meshes[1:]:
    runs.assert_alike("data:1", mesh, tolerance)
  assert next(iter(runs.weights("fsdp:8").values())).dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_one_of_two_is_killed_and_both_go_on_elsewhere(tmp_path, dying):
  runs = Runs(tmp_path, **_LONG)
  straight = runs.start(runs.flags("straight"))
  deaths: list[dict] = [{}, {}]
  checkpoint = str(tmp_path / "run/checkpoints/20")
  deaths[dying] = {"WORKER_DIES_AT": "33", "WORKER_DIES_AFTER": checkpoint}
  two = runs.start_two(runs.flags("run", mesh="data:8"), environments=deaths)
  assert end(two[dying])[0] == -9
  since = time.monotonic()
  status, told = end(two[1 - dying])
  assert time.monotonic() - since < 60
  # A process that still waits for the lost one is ended by JAX itself.
  assert status in (distributed.LOST, -signal.SIGABRT)
  assert "lost another one" in told or "another task died" in told
  whole = [p.name for p in (tmp_path / "run/checkpoints").glob("*")]
  assert [name for name in whole if name.isdecimal()] == ["20"]

  assert end(straight)[0] == 0
  shutil.copytree(tmp_path / "run", tmp_path / "alone")
  both = runs.start_two(runs.flags("run", mesh="data:2,fsdp:4"))
  ends = [end(process) for process in both]
  assert [status for status, _ in ends] == [0, 0], ends
  assert "step 20 of 50" in ends[0][1]
  runs.assert_alike("straight", "run", 1e-5)

  status, told = end(runs.start(runs.flags("alone", mesh="data:1")))
  assert status == 0, told
  assert "step 20 of 50" in told
  runs.assert_alike("straight", "alone", 1e-5)

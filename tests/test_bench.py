"""The benchmark of a decode cycle, at sizes a CPU measures in seconds."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
  AbstractMesh,
  NamedSharding,
  PartitionSpec,
  SingleDeviceSharding,
)

from d2sd_jax import UsageError, cli, timing
from d2sd_jax.bench import __main__ as bench
from d2sd_jax.bench import cell, floors, pieces
from d2sd_jax.bench.config import BenchConfig
from d2sd_jax.bench.models import random_models, random_state, random_tree
from d2sd_jax.io.paths import find_config
from d2sd_jax.kernels import hopper, transposed, triton
from d2sd_jax.kernels.cascade_attention import bench as op

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def _few_sets(monkeypatch):
  monkeypatch.setattr(op, "MAX_SETS", 2)


@pytest.fixture
def config():
  return cli.load_config(BenchConfig, "bench_tiny", {"dtype": "float32"})


def _run(out, rows, *more):
  arguments = ["--config=bench_tiny", f"--rows={rows}", f"--out={out}", *more]
  bench.main(arguments)
  return json.loads(out.read_text())


def test_runs_in_parts_and_says_what_ran(tmp_path, capsys):
  out = tmp_path / "bench.json"
  rows = _run(out, "ar/1*,cycle/1*,op/*")
  names = [row["row"] for row in rows]
  assert names == [
    *("rates/copy", "rates/read", "rates/product", "ar/1x48", "cycle/1x48"),
    *("op/1x7@48/xla", "op/1x7@48/jax.nn"),
  ]
  for row in rows:
    assert 0 < row["least_ms"] <= row["median_ms"] <= row["most_ms"]
    assert row["repeats"] == 3
    assert row["device"] == jax.devices()[0].device_kind
    assert row["versions"]["jax"] == jax.__version__
  by_name = {row["row"]: row for row in rows}
  cycle = by_name["cycle/1x48"]
  passes = ("draft 1", "draft 2", "target")
  matrices = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
  assert cycle["implementations"] == dict.fromkeys(
    (
      *passes,
      *(f"{use} {matrix}" for use in passes for matrix in matrices),
      *("context fc", "context context_proj"),
    ),
    "xla",
  )
  assert len(cycle["bound"]) == 4
  assert cycle["compile_seconds"] > 0
  assert by_name["op/1x7@48/jax.nn"]["max_error"] < 0.03
  assert "cycle over AR step, 1x48" in capsys.readouterr().out

  # A later run adds rows, and measures none again unless told.
  later = _run(out, "ar/1*,commit/*")
  assert by_name["ar/1x48"] in later
  assert [row["row"] for row in later][-1] == "commit/1x48"
  assert len(later) == len(rows) + 1
  again = _run(out, "ar/1*", "--again")
  assert by_name["ar/1x48"] not in again
  assert len(again) == len(later)


def test_every_piece_of_the_first_cell_runs_with_int8_drafters(tmp_path):
  out = tmp_path / "bench.json"
  names = "draft_*,verify_18*,commit*"
  rows = _run(out, names, "--drafter_weights=int8")
  measured = [row for row in rows if not row["row"].startswith("rates")]
  assert len(measured) == 4
  assert not any("failed" in row for row in rows)
  assert all(row["config"]["drafter_weights"] == "int8" for row in rows)


def test_a_row_that_fails_says_why_and_is_tried_again(tmp_path, monkeypatch):
  out = tmp_path / "bench.json"
  flag = "--config.implementation=mosaic_gpu"
  with pytest.raises(SystemExit) as stop:
    _run(out, "ar/1*", flag)
  assert stop.value.code == 1
  failed = json.loads(out.read_text())[-1]
  assert failed["failed"].startswith("implementation='mosaic_gpu'")
  assert "median_ms" not in failed
  monkeypatch.setattr(bench._Bench, "row", lambda self, name: {"median_ms": 1})
  monkeypatch.setattr(bench, "print_table", lambda results: None)
  assert _run(out, "ar/1*", flag)[-1]["median_ms"] == 1


def test_time_limit_leaves_rows_for_later(tmp_path, capsys):
  out = tmp_path / "bench.json"
  rows = _run(out, "*", "--minutes=0.00001")
  assert [row["row"].split("/")[0] for row in rows] == ["rates"] * 3
  assert "12 rows are left" in capsys.readouterr().err


def test_a_silent_fallback_is_a_failure():
  def ran(**calls):
    return timing.Timing(
      times=(1.0,),
      steps=1,
      call=0.5,
      compile_seconds=1.0,
      custom_calls={"TopK": 1, **calls},
    )

  use = timing.Use
  attends, product = use("draft 1", "mosaic_gpu", 5), use("o", "few_rows", 5)
  ran().check_ran([use("target", "xla", 36)])
  ran(cascade_attention=5).check_ran([use("target", "xla", 36), attends])
  ran(cascade_attention=6, few_rows=5).check_ran([attends, product])
  for missing in ({}, {"cascade_attention": 4}, {"few_rows": 5}):
    with pytest.raises(RuntimeError, match="draft 1 should run mosaic_gpu, 5 "):
      ran(**missing).check_ran([attends])
  # Two uses of a kernel, and the calls of one.
  both = [product, use("down", "few_rows", 5)]
  ran(few_rows=10).check_ran(both)
  with pytest.raises(RuntimeError, match="o, down should run few_rows, 10 "):
    ran(few_rows=5).check_ran(both)
  with pytest.raises(RuntimeError, match="nothing should run streamed"):
    ran(cascade_attention=5, streamed=1).check_ran([attends])
  exchanged = dataclasses.replace(ran(), collectives={"all-reduce": 3})
  exchanged.check_ran([use("sums", "all-reduce", 3)])
  with pytest.raises(RuntimeError, match="sums should run all-reduce, 4 "):
    exchanged.check_ran([use("sums", "all-reduce", 4)])


@pytest.fixture
def on_an_h200(monkeypatch):
  """Kernels are chosen as there; nothing runs."""
  monkeypatch.setattr(transposed, "stores_transposed", lambda: True)
  monkeypatch.setattr(hopper, "runs_here", lambda: True)
  monkeypatch.setattr(triton, "runs_here", lambda: True)
  attends = lambda query, keys: "mosaic_gpu"
  monkeypatch.setattr(cell.attention, "default_implementation", attends)


def _placed(values, place):
  """Stands for arrays that lie so."""
  stand = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  return jax.tree.map(stand, values)


def _cell_of_8b(**overrides):
  """The first of the grid, with no weight in memory."""
  config = cli.load_config(BenchConfig, "bench_qwen3_8b", overrides)
  models = jax.eval_shape(functools.partial(random_models, config))
  models = _placed(models, SingleDeviceSharding(jax.devices()[0]))
  return cell.Cell(models, config, 1, 1024)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_what_should_run_on_an_h200(on_an_h200, weights):
  """By each matrix's own size, and as it is stored."""
  here = _cell_of_8b(drafter_weights=weights)
  names = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
  first = "xla" if weights == "int8" else "streamed"
  assert here.drafter_uses(1, 4) == (
    timing.Use("draft 2", "mosaic_gpu", 5),
    *(timing.Use(f"draft 2 {name}", first, 5) for name in names),
  )
  alone = {use.implementation for use in here.target_uses(1)}
  assert alone == {"mosaic_gpu", "xla"}
  tree = [use.implementation for use in here.target_uses(80)[1:]]
  assert tree == ["streamed"] * 4
  # Two blocks to a multiprocessor do not pay with as many.
  _, qkv, _, both, down = here.target_uses(128)
  assert (qkv.implementation, down.implementation) == ("streamed", "streamed")
  assert (both.implementation, both.times) == ("xla", 36)
  assert here.context_uses(16)[0] == timing.Use("context fc", first, 2)


@pytest.mark.parametrize(
  ("devices", "name", "whole", "part"),
  [
    (2, "qkv_proj", "streamed", "streamed"),
    (2, "gate_up_proj", "xla", "streamed"),
    # A fourth of q/k/v is too small for the kernel, of gate and up it is not.
    (4, "qkv_proj", "streamed", "xla"),
    (4, "gate_up_proj", "xla", "streamed"),
  ],
)
def test_what_should_run_on_several_h200(
  on_an_h200, devices, name, whole, part
):
  here = _cell_of_8b()
  mesh = AbstractMesh((1, devices), ("data", "tensor"))
  split = NamedSharding(mesh, PartitionSpec("tensor", None))
  matrix = getattr(here.models.target.layers[0], name)
  own = _placed(matrix, split)
  for held, runs in ((matrix, whole), (own, part)):
    assert here._product(name, held, 120, 1).implementation == runs


def test_steps_depend_on_each_other():
  step = lambda models, carry, inputs: carry + models * inputs
  seen = []

  def record(models, carry, inputs):
    jax.debug.callback(lambda x: seen.append(float(x)), carry)
    return step(models, carry, inputs)

  timed = timing.time_step(
    *(record, jnp.float32(2), jnp.float32(0), jnp.float32(3)),
    repeats=2,
    seconds=1e-3,
  )
  jax.effects_barrier()
  # Every step goes on where the one before ended, also those of other calls.
  assert sorted(seen) == [6.0 * i for i in range(len(seen))]
  assert len(timed.times) == 2


def test_what_a_call_costs_is_no_part_of_its_steps():
  calls = []

  def call(steps):
    calls.append(steps)
    # The fourth, the first longer one, is held up.
    return 5 + steps / 4 + 9 * (len(calls) == 4)

  times, steps, beside = timing.time_marginally(call, repeats=3, seconds=3)
  assert times == (0.25,) * 3
  assert beside == 5
  # Eight times as many at most, until they take half of `seconds` or more.
  assert steps == 8
  # The third call is the first that counts.
  assert calls == [1, 1, *[1, 2] * 3, *[1, 9] * 3]


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_seconds_that_cannot_be_taken(seconds):
  with pytest.raises(UsageError, match=r"seconds=.*: expected above 0"):
    timing.time_marginally(lambda _: 1.0, repeats=1, seconds=seconds)


def test_floors_by_hand(config):
  models = random_models(config)
  target, c = models.target, config
  matrices = 4 * (24 * 48 * 2 + 24 * 16 * 2 + 3 * 24 * 40) + 61 * 24
  norms = 4 * (2 * 24 + 2 * 8) + 24
  work = floors.target_work(models, 3, 7, 42)
  assert work.bytes == 4 * (matrices + norms + 4 * 2 * 3 * 42 * 16)
  assert work.flops == 3 * 7 * (2 * matrices + 4 * 4 * (42 + 7) * 48)
  # 10 of the 21 milliseconds that both need overlap.
  rates = floors.Rates(bytes=work.bytes * 100, flops=work.flops * 50)
  assert work.milliseconds(rates) == pytest.approx(20)
  assert work.bound(rates) == "flops"

  drafter = 24 * 48 * 2 + 24 * 16 * 2 + 3 * 24 * 40 + 61 * 24
  work = floors.draft_work(models, 1, 3, 2, 5, 42)
  assert work.flops == 3 * 2 * 5 * (2 * drafter + 4 * (42 + 5) * 48)
  int8 = floors.draft_work(models.with_int8_drafting(), 1, 3, 2, 5, 42)
  scales = 48 + 2 * 16 + 24 + 2 * 40 + 24 + 61
  assert work.bytes - int8.bytes == 3 * drafter - 4 * scales
  assert int8.flops == work.flops
  context = 24 * 24 + 24 * 16 * 2
  work = floors.commit_work(models, 3, 5)
  assert work == floors.Work(2 * 4 * context, 2 * 2 * 3 * 5 * context)
  assert c.target.num_layers == len(target.layers)


def test_data_is_random_and_a_step_leaves_the_length(config):
  models = random_models(config)
  state = random_state(models, config, 3, 48)
  for cache in jax.tree.leaves((state.target_cache, state.drafter_caches)):
    values = np.asarray(cache)
    assert (values != 0).mean() > 0.99
    assert abs(values.std() - 1) < 0.1
  for weight in jax.tree.leaves(models.target):
    assert (np.asarray(weight) != 0).mean() > 0.99
  piece = pieces.pieces(config)["cycle/3x48"](models)
  after = jax.jit(piece.step)(piece.models, piece.carry, piece.inputs)
  assert after.lengths.tolist() == state.lengths.tolist()
  assert not bool(after.finished.any())
  assert not np.array_equal(after.anchors, state.anchors)
  written = np.asarray(after.target_cache.keys[0] != state.target_cache.keys[0])
  assert written.any(axis=(1, 3)).sum(axis=1).tolist() == [5, 5, 5]


def test_a_verification_writes_its_path(config):
  name = f"verify_{config.verify_nodes[0]}/{config.batches[0]}x48"
  piece = pieces.pieces(config)[name](random_models(config))
  state, tree, _ = piece.carry
  after, chosen, (features, verdict) = jax.jit(piece.step)(
    piece.models, piece.carry, piece.inputs
  )
  assert after.lengths.tolist() == state.lengths.tolist()
  assert chosen.parents.tolist() == tree.parents.tolist()
  assert features.shape[:2] == tree.tokens.shape
  before, written = state.target_cache.keys[-1], after.target_cache.keys[-1]
  rows = np.asarray(before != written).any(axis=(1, 3))
  for row, length in zip(rows, state.lengths.tolist(), strict=True):
    path = verdict.path.shape[1]
    assert np.flatnonzero(row).tolist() == [length + i for i in range(path)]


def test_a_random_tree_is_a_tree(config):
  tree = random_tree(config, 2, 50)
  parents, depths = np.asarray(tree.parents[0]), np.asarray(tree.depths[0])
  assert parents[0] == -1
  assert (parents[1:] < np.arange(1, 50)).all()
  assert (depths[1:] == depths[parents[1:]] + 1).all()
  assert np.count_nonzero(np.bincount(parents[1:]) > 1) > 0


def test_mistakes_are_named(tmp_path):
  with pytest.raises(UsageError, match="rows='nothing'"):
    bench.main(["--config=bench_tiny", "--rows=nothing"])
  for key, value in (
    *(("batches", "(0,)"), ("caches", "(5,)"), ("repeats", 0)),
    *(("implementation", "nope"), ("head_dim", 7)),
  ):
    with pytest.raises(UsageError, match=f"{key}="):
      bench.main(["--config=bench_tiny", f"--config.{key}={value}"])
  other = tmp_path / "other.json"
  other.write_text('{"a": 1}')
  with pytest.raises(UsageError, match=r"other\.json"):
    bench.main(["--config=bench_tiny", f"--out={other}"])


def test_the_shipped_grid_is_what_was_asked_for(capsys):
  assert find_config("bench_qwen3_8b").is_file()
  bench.main(["--list"])
  names = capsys.readouterr().out.split()
  first = {n.split("/")[0] for n in names if n.endswith("/1x1024")}
  sizes = {f"verify_{n}" for n in (16, 32, 64, 80, 128, 256)}
  assert first == {"ar", "draft_1", "draft_2", "commit", "cycle", *sizes}
  for batch in (1, 4, 16):
    for cache in (1024, 8192, 32768):
      for piece in ("ar", "verify_80", "cycle"):
        assert f"{piece}/{batch}x{cache}" in names
  assert "op/1x80@8192/mosaic_gpu" in names
  assert len(names) == 11 + 8 * 3 + 5 * 5


# Devices are simulated in a process of its own.
_ON_A_MESH = """
import json, sys
import jax
from d2sd_jax import cli
from d2sd_jax.bench import __main__ as bench
from d2sd_jax.bench.config import BenchConfig
from d2sd_jax.bench.models import random_models, random_state
from d2sd_jax.kernels import transposed
from d2sd_jax.kernels.cascade_attention import bench as op
from d2sd_jax.sharding import DECODING_AXES, make_mesh

op.MAX_SETS = 2
for run in json.loads(sys.argv[1]):
  print(cli.run(bench.main, run), file=sys.stderr)
config = cli.load_config(BenchConfig, "bench_tiny", {"mesh": "data:2,tensor:2",
  "batches": (2,), "shard_drafters": True, "drafter_weights": "int8"})
mesh = make_mesh(config.mesh, DECODING_AXES)
models = random_models(config, mesh)
state = random_state(models, config, 2, 48)
assert state.target_cache.keys[0].sharding.shard_shape((2, 2, 48, 8))[:2] == (
  1, 1)
for weight in (models.target.layers[0].qkv_proj, models.draft_head.values,
  models.drafters[1].layers[0].down_proj.values):
  part = weight.addressable_shards[0].data.size
  assert 2 * part == weight.size, weight.sharding
jax.clear_caches()  # What has been traced knows the other order.
transposed.stores_transposed = lambda: True
layers = [random_models(config, mesh).target.layers[0], models.target.layers[0]]
for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
  turned, plain = getattr(layers[0], name).stored, getattr(layers[1], name)
  part = [x.sharding.shard_shape(x.shape) for x in (turned, plain)]
  assert turned.shape == plain.shape[::-1] and part[0] == part[1][::-1], name
"""
_ROWS = (
  "ar/1*,draft_?/1*,verify_7/1*,commit/*,cycle/1*,collectives_7/1*,op/*xla"
)


@pytest.fixture(scope="module")
def on_a_mesh(tmp_path_factory):
  """Rows of a mesh of two of four devices, and what each run told."""
  folder = tmp_path_factory.mktemp("mesh")
  out = folder / "mesh.json"
  common = ["--config=bench_tiny", f"--out={out}", "--config.dtype=float32"]
  split, refused = "--mesh=data:1,tensor:2", f"--out={folder / 'none.json'}"
  runs = [
    [*common, split, f"--rows={_ROWS}"],
    [*common, "--mesh=tensor:4", refused],
    [*common, "--mesh=tensor:6", refused],
    [*common, "--mesh=data:2", refused],
    [*common, "--mesh=tensor:3", "--rows=ar/1*"],
    [*common, "--rows=ar/1*"],
  ]
  here = Path(__file__).parents[1]
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "JAX_PLATFORMS": "cpu",
    # Half the time to compile.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": str(here),
  }
  done = subprocess.run(
    [sys.executable, "-c", _ON_A_MESH, json.dumps(runs)],
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  assert not (folder / "none.json").exists()
  rows = {row["row"]: row for row in json.loads(out.read_text())}
  told = [x for x in done.stderr.splitlines() if not x.startswith("[")]
  return rows, told


@pytest.mark.slow
def test_on_a_mesh_every_row_is_one_devices(on_a_mesh, config):
  rows, _ = on_a_mesh
  assert not any("failed" in row for row in rows.values())
  names = [name for name in rows if not name.startswith("rates")]
  assert names == [
    *("ar/1x48", "draft_1/1x48", "draft_2/1x48", "verify_7/1x48"),
    *("commit/1x48", "cycle/1x48", "collectives_7/1x48", "op/1x7@48/xla"),
  ]
  models = random_models(config)
  alone = floors.target_work(models, 1, 7, 42)
  row = rows["verify_7/1x48"]
  # Norms are whole, and the odd vocabulary is filled up.
  assert 0.5 < row["bytes"] / alone.bytes < 0.52
  assert 0.5 < row["flops"] / alone.flops < 0.52
  # Drafters are whole; half of the head is not.
  alone = floors.draft_work(models, 0, 1, 1, 5, 42)
  assert alone.bytes - rows["draft_1/1x48"]["bytes"] == 4 * 24 * 30
  assert row["config"]["mesh"] == "data:1,tensor:2"
  assert row["implementations"]["target"] == "xla"


@pytest.mark.slow
def test_on_a_mesh_exchanges_are_those_that_were_counted(on_a_mesh):
  rows, _ = on_a_mesh
  for name, row in rows.items():
    counted = Counter()
    for message, count in row.get("messages", {}).items():
      counted[message.split("/")[1]] += count
      assert rows[message]["median_ms"] > 0
    if not name.startswith("rates"):
      assert row.get("collectives", {}) == counted
  alone = rows["collectives_7/1x48"]
  assert alone["collectives"] == {"all-reduce": 9, "all-gather": 1}
  assert alone["floor_ms"] == pytest.approx(alone["collectives_ms"])
  verified = rows["verify_7/1x48"]
  assert verified["messages"] == alone["messages"]
  assert verified["floor_ms"] > verified["collectives_ms"] > 0


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_is_refused_in_a_line(on_a_mesh):
  _, told = on_a_mesh
  assert [line for line in told if line.isdigit()] == list("022222")
  errors = [line for line in told if line.startswith("error")]
  for error, words in zip(
    errors,
    (
      "mesh axis tensor=4: expected a divisor of the 6 query heads",
      "mesh='tensor:6': expected data:4 or another product up to 4",
      "batches=(1, 3): expected multiples of 2",
      "of mesh data:1,tensor:3; its rows are of mesh data:1,tensor:2",
      "of mesh None; its rows are of mesh data:1,tensor:2",
    ),
    strict=True,
  ):
    assert words in error


def test_drafters_are_shared_on_a_mesh_only():
  flags = ["--config=bench_tiny", "--shard_drafters", "--list"]
  with pytest.raises(UsageError, match="shard_drafters=True"):
    bench.main(flags)

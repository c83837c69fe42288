"""The timing of cascade attention, on tiny shapes."""

import json

import pytest

from d2sd_jax import UsageError, cli
from d2sd_jax.kernels.cascade_attention import bench

pytestmark = pytest.mark.usefixtures("quick_compilation")

_TINY = {
  "used": 0.5,
  "kv-heads": 2,
  "group": 3,
  "head-size": 8,
  "repeats": 2,
  "seconds": 1e-4,
}


@pytest.fixture(autouse=True)
def _few_sets(monkeypatch):
  monkeypatch.setattr(bench, "MAX_SETS", 2)


def test_rows_say_what_ran_or_why_it_did_not(tmp_path, capsys):
  output = tmp_path / "op.json"
  bench.main(
    [
      "--shapes=2x5@16",
      "--implementations=xla,jax.nn,mosaic_gpu",
      f"--output={output}",
      *(f"--{name}={value}" for name, value in _TINY.items()),
    ]
  )
  rows = json.loads(output.read_text())
  names = [row["implementation"] for row in rows]
  assert names == ["xla", "jax.nn", "mosaic_gpu"]
  for row in rows[:2]:
    assert 0 < row["least_us"] <= row["median_us"] <= row["most_us"]
    assert row["max_error"] < 0.03
    assert row["sets"] == 2
  assert rows[2]["failed"].startswith("implementation='mosaic_gpu'")
  assert "median_us" not in rows[2]
  assert len(capsys.readouterr().out.splitlines()) == 3


def test_floors_by_hand():
  shape = bench.Shape(2, 3, 40, 10, kv_heads=5, group=4, head_size=64)
  # Keys and values of 13 rows; query and output of 12.
  assert shape.bytes() == 2 * 5 * 64 * (2 * 13 + 2 * 12) * 2
  assert shape.flops() == 2 * (3 * 4 * 5) * 13 * 64 * 2 * 2


def test_shapes_are_read_and_mistakes_named():
  shapes = bench.parse_shapes("1x16@8192,8x80@40", used=0.25)
  assert [s.used for s in shapes] == [2048, 10]
  for text in ("1x16", "0x1@8", "x@", "1x2@3@4"):
    with pytest.raises(UsageError, match="expected BATCHxNODES@CACHE"):
      bench.parse_shapes(text)
  with pytest.raises(UsageError, match="used=2"):
    bench.parse_shapes("1x1@8", used=2)


def test_help_has_examples_and_unknown_names_are_refused(capsys):
  assert cli.run(bench.main, ["--help"]) == cli.OK
  assert "--sweep" in capsys.readouterr().out
  assert cli.run(bench.main, ["--implementations=cuda"]) == cli.USAGE
  assert "implementations='cuda'" in capsys.readouterr().err


def test_plans_of_a_sweep_hold_all_rows():
  pytest.importorskip(
    "jax.experimental.pallas.mosaic_gpu", reason="no Pallas Mosaic GPU"
  )
  found = list(bench.plans(bench.Shape(1, 80, 8192, 8192)))
  assert 10 < len(set(found)) == len(found) < 200
  assert all(plan.rows >= 320 for plan in found)

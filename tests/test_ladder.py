"""The ladder around a tiny target; its measures against cases by hand."""

import json
import math

import numpy as np
import pytest
import tiny

from d2sd_jax import TreeConfig, UsageError, cli
from d2sd_jax.decoding import plan as planning
from d2sd_jax.decoding.answers import Answer, Request
from d2sd_jax.eval import bench, calibration, ladder, measure, pictures, results
from d2sd_jax.eval.bench import LadderConfig
from d2sd_jax.eval.calibration import Outcome
from d2sd_jax.eval.measure import Measured
from d2sd_jax.eval.tasks import Task
from d2sd_jax.io.drafter_format import save_drafter
from d2sd_jax.io.models import file_sha256

pytestmark = pytest.mark.usefixtures("quick_compilation")
TEXTS = {"mt_bench": ("owls", "ten cats"), "aime25": ("moon", "a red sun")}


class FakeTokenizer:
  """A letter per id."""

  stop_ids = (61,)

  def check_mask_token(self, token_id):
    assert 0 <= token_id < 61

  def encode_chat(self, messages):
    return [3 + ord(c) % 50 for m in messages for c in m["content"]]

  def encode_prompt(self, text):
    return self.encode_chat([{"content": text}])

  def decode(self, ids):
    return "".join(chr(64 + i) for i in ids)


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Runs the script around a tiny target; gives its status."""
  weights = tmp_path / "target.gguf"
  weights.write_bytes(b"weights")
  monkeypatch.setattr(planning, "read_target_config", lambda _: tiny.TARGET)
  monkeypatch.setattr(cli, "setup_jax_cache", lambda: None)
  monkeypatch.setattr(ladder, "target_sha256", lambda _: file_sha256(weights))
  monkeypatch.setattr(planning, "load_target", lambda *_, **__: tiny.target())
  monkeypatch.setattr(bench, "load_tokenizer", lambda _: FakeTokenizer())

  def prompts(name, num):
    follow_up = {"follow_up": "and?"} if name == "mt_bench" else {}
    return [
      {"prompt": text, "id": f"{name}/{i}", **follow_up}
      for i, text in enumerate(TEXTS[name][:num])
    ]

  monkeypatch.setattr(ladder, "load_task_prompts", prompts)
  save_drafter(tiny.drafter(), tmp_path / "one")
  save_drafter(tiny.drafter(tiny.VP), tmp_path / "two")

  def script(*flags):
    return cli.run(
      ladder.main,
      [
        f"--drafter={tmp_path / 'one'}",
        f"--vp_drafter={tmp_path / 'two'}",
        *("--max_new_tokens=9", "--num_prompts=2", "--dtype=float32"),
        *("--batch_size=3", "--config.block_size=4", "--config.num_branches=2"),
        f"--out={tmp_path / 'new' / 'r.json'}",
        *("--sets=mt_bench,aime25", "--temperatures=0"),
        *flags,
      ],
    )

  return script


@pytest.mark.slow
def test_rows_are_added_and_never_lost(run, tmp_path, capsys):
  out = tmp_path / "new" / "r.json"
  one = ("--policies=ar,d2sd", "--sets=mt_bench", "--timing_prompts=0")
  assert run(*one) == 0
  assert len(capsys.readouterr().out.splitlines()) == 3
  found = json.loads(out.read_text())
  rows = found["rows"]
  for row in rows:
    assert set(results.ROW_KEYS) <= row.keys()
    assert row["identical"]
    assert row["ties"] == row["differences"] == []
    # Two prompts of two turns each.
    assert row["tokens"] == 9 * 4
    assert row["ms_per_token"] is row["speedup"] is None
    assert sum(row["accepted_lengths"]) == row["cycles"]
  plain, dual = rows
  assert (plain["policy"], plain["alpha"], plain["nodes"]) == ("ar", 1.0, 1.0)
  assert (dual["policy"], dual["set"]) == ("d2sd", "mt_bench")
  assert 4 < dual["nodes"] <= 4 + 3 + 2
  assert found["means"]["d2sd"]["alpha"] == dual["alpha"]
  assert 0 <= found["means"]["d2sd"]["ece"] <= 1
  seen = sum(dual["calibration"]["boundary"]["observed"])
  assert 0 < seen <= dual["cycles"]
  # Ids and hashes, no texts.
  assert [*found["meta"]["prompts"]] == ["mt_bench"]
  assert [*found["meta"]["prompts"]["mt_bench"]] == ["mt_bench/0", "mt_bench/1"]
  for text in ("ten cats", "and?"):
    assert text not in out.read_text()

  before = out.read_bytes()
  assert run(*one) == 0
  assert "has all of these rows" in capsys.readouterr().out
  assert out.read_bytes() == before

  two = ("--policies=ar", "--sets=aime25", "--timing_prompts=1")
  assert run(*two) == 0
  more = json.loads(out.read_text())
  assert more["rows"][:2] == rows
  (row,) = more["rows"][2:]
  assert (row["policy"], row["set"]) == ("ar", "aime25")
  assert row["ms_per_token"] > 0
  assert row["speedup"] == 1.0
  assert "| `d2sd`, 1 of 2 sets |" in out.with_suffix(".md").read_text()
  assert sorted(p.name for p in out.parent.iterdir()) == ["r.json", "r.md"]

  before = out.read_bytes()
  capsys.readouterr()
  for flags, told in (
    (["--config.seed=1"], "settings.seed=1: expected 0"),
    (["--max_new_tokens=8"], "settings.max_new_tokens=8: expected 9"),
    ([f"--drafter={tmp_path / 'two'}"], "drafter.sha256="),
  ):
    assert run(*flags) == 2
    errors = capsys.readouterr().err
    assert told in errors
    assert errors.count("\n") == 1
    assert out.read_bytes() == before


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    (["--sets=mt_bench,alpaca"], "alpaca"),
    (["--sets="], "sets=()"),
    (["--policies=ar,eagle"], "eagle"),
    (["--policies=ar,ar"], "each once"),
    (["--temperatures=0,-1"], "temperatures=(0.0, -1.0)"),
    (["--temperatures=0,warm"], "warm"),
    (["--temperatures=1,1.0"], "each once"),
    (["--num_prompts=0"], "num_prompts=0"),
    (["--batch_size=0"], "batch_size=0"),
    (["--config.policies=[1]"], "config key policies"),
    (["--max_new_tokens=120"], "max_new_tokens"),
    (["--out=ladder.md"], "out='ladder.md'"),
    (["--out=/dev/null/r.json"], "out="),
  ],
)
def test_mistakes_are_one_line_and_status_2(
  run, flags, told, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(
    planning, "load_target", lambda *_, **__: pytest.fail("loaded")
  )
  assert run(*flags) == 2
  errors = capsys.readouterr().err
  assert told in errors
  assert errors.count("\n") == 1
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
  "text", ['{"meta": {}, "ro', "[]", '{"meta": {}, "rows": [{}], "means": {}}']
)
def test_a_damaged_file_is_left_alone(run, text, tmp_path, capsys):
  out = tmp_path / "new" / "r.json"
  out.parent.mkdir()
  out.write_text(text)
  assert run() == 2
  assert "results=" in capsys.readouterr().err
  assert out.read_text() == text
  assert len(list(out.parent.iterdir())) == 1


def test_the_shipped_config():
  config = cli.load_config(LadderConfig, "ladder_smollm2")
  assert len(config.sets) == 7
  assert config.temperatures == (0.0, 1.0)
  assert (config.num_prompts, config.max_new_tokens) == (40, 256)
  (nine, sixteen) = config.trees("prompt_lookup")
  assert (nine.block_size, sixteen.block_size) == (9, 16)


def _bench(**changes):
  """A bench of one task, without models."""
  task = Task(
    name="aime25",
    requests=[Request(sequence_id=0, tokens=(1, 2))],
    ids=["aime25/0"],
    prompts=[0],
  )
  return bench.Bench(
    config=LadderConfig(**changes),
    plan=planning.Plan(
      config=planning.DecodeConfig(dtype="float32"),
      target=tiny.TARGET,
      drafters=(),
      trees={},
    ),
    target=None,
    drafters=(),
    stop_ids=(),
    tasks={"aime25": task},
  )


class FakeSession:
  """Answers at once; what was asked of it is counted."""

  mode = "prompt_lookup"

  def __init__(self, block_size, accepted):
    self.tree = TreeConfig(block_size=block_size, num_branches=0)
    self.accepted, self.calls = accepted, 0

  def with_sampling(self, sampling):
    return self

  def decode(self, requests):
    self.calls += 1
    size = 1 + sum(self.accepted)
    return [_answer(0, list(range(size)), self.accepted, 9) for _ in requests]


@pytest.mark.parametrize("timing_prompts", [0, 1])
def test_the_better_tree_counts_and_is_timed(monkeypatch, timing_prompts):
  sessions = {
    (16, 1): FakeSession(16, [2, 3]),
    (9, 1): FakeSession(9, [4, 4]),
  }
  compiled = []

  def session(self, policy, tree, requests, batch_size):
    compiled.append((policy, tree.block_size, batch_size))
    return sessions[tree.block_size, batch_size]

  monkeypatch.setattr(bench.Bench, "session", session)
  state = _bench(timing_prompts=timing_prompts)
  cells = [("aime25", 0.0), ("aime25", 1.0)]
  found = dict(bench.measure_policy(state, "prompt_lookup", cells))
  assert [*found] == cells
  for measured in found.values():
    assert measured.tree.block_size == 9
    # A second of decoding for the eight tokens after the first.
    assert measured.ms_per_token == (1000 / 8 if timing_prompts else None)
    assert measured.calibration is None
  # Compiled once for all cells, in batches and at batch 1.
  sizes = [("prompt_lookup", size, 1) for size in (9, 16)]
  assert compiled == sizes * (1 + timing_prompts)
  # Two cells and, where it is timed, two warm-ups and the two timings.
  assert sessions[9, 1].calls == 2 + 4 * timing_prompts
  assert sessions[16, 1].calls == 2 + 2 * timing_prompts


def test_what_was_measured_survives_an_interrupt(
  run, tmp_path, monkeypatch, capsys
):
  state = _bench()
  seen = []

  def measured(bench, policy, cells):
    seen.append((policy, list(cells)))
    for cell in cells:
      if interrupted and policy == "dflash":
        raise KeyboardInterrupt
      answers = [_answer(0, [5, 6, 7], [1, 1], 2)]
      yield cell, Measured(tree=TreeConfig(), answers=answers)

  monkeypatch.setattr(ladder, "set_up", lambda *_: state)
  monkeypatch.setattr(ladder, "measure_policy", measured)
  flags = "--policies=dflash,d2sd,ar", "--sets=aime25", "--temperatures=0,1"
  interrupted = True
  assert run(*flags) == cli.INTERRUPTED
  out = tmp_path / "new" / "r.json"
  first, _ = json.loads(out.read_text())["rows"]
  interrupted = False
  assert run(*flags) == 0
  rows = json.loads(out.read_text())["rows"]
  assert rows[0] == first
  assert [(r["policy"], r["temperature"]) for r in rows] == [
    *(("ar", 0.0), ("ar", 1.0), ("dflash", 0.0), ("dflash", 1.0)),
    *(("d2sd", 0.0), ("d2sd", 1.0)),
  ]
  cold, warm = ("aime25", 0.0), ("aime25", 1.0)
  assert seen[2:] == [
    ("ar", [cold, warm]),
    ("dflash", [cold, warm]),
    ("d2sd", [cold, warm]),
  ]
  assert capsys.readouterr().out.count("identical") == 6


def _answer(index, tokens, accepted, nodes):
  return Answer(
    request=Request(sequence_id=index, tokens=(1, 2)),
    mode="any",
    tokens=tokens,
    origins=[0] * len(tokens),
    accepted_per_cycle=accepted,
    num_verified=nodes,
    prefill_seconds=0.0,
    decode_seconds=1.0,
    batch_rows=2,
    implementation="xla",
  )


def test_row_by_hand():
  plain = [_answer(i, [5, 6, 7, 8, 9], [1] * 4, 4) for i in range(3)]
  mine = [
    _answer(0, [5, 6, 7, 8, 9], [3, 1], 13),
    _answer(1, [5, 6, 3, 8, 9], [2, 2], 10),
    _answer(2, [5, 6, 7, 8, 4], [4], 7),
  ]
  task = Task(
    name="set",
    requests=[a.request for a in mine],
    ids=["a", "b", "a/2"],
    prompts=[0, 1, 0],
  )
  asked = []

  def margin(request, tokens):
    asked.append((request.sequence_id, list(tokens)))
    return 2e-4 if request.sequence_id == 1 else 0.25

  row = measure.make_row(
    task,
    "d2sd",
    0.0,
    "float32",
    Measured(tree=TreeConfig(), answers=mine, ms_per_token=2.0),
    Measured(tree=TreeConfig(), answers=plain, ms_per_token=3.0),
    margin,
  )
  assert row["alpha"] == row["alpha_cut"] == 12 / 5
  assert row["nodes"] == 30 / 5
  assert row["speedup"] == 1.5
  assert row["accepted_lengths"] == [0, 1, 2, 1, 1]
  # Drawn by prompt: 8 tokens in 3 cycles, or 4 in 2, or one of each.
  assert row["counts"] == row["counts_cut"] == [[8, 3], [4, 2]]
  assert row["ci95"] == [2.0, round(8 / 3, 5)]
  assert asked == [(1, [5, 6]), (2, [5, 6, 7, 8])]
  assert row["ties"] == [{"id": "b", "token": 2, "margin": 2e-4}]
  assert row["differences"] == [{"id": "a/2", "token": 4, "margin": 0.25}]
  assert not row["identical"]


def test_what_became_of_a_draft():
  confidence = np.array([0.9, 0.8, 0.4])
  outcome = lambda chosen: calibration._outcome(
    np.array([4, 5, 6]), confidence, np.array(chosen)
  )
  for chosen, accepted, seen in (
    ([4, 5, 6, 7, 8], 3, 3),
    ([4, 9, 6, 7], 1, 3),
    ([4, 5], 2, 2),
    ([9], 0, 1),
  ):
    found = outcome(chosen)
    assert (found.accepted, found.seen) == (accepted, seen)


def test_calibration_by_hand():
  draft = lambda c, accepted, seen: Outcome(
    confidence=np.array(c), accepted=accepted, seen=seen
  )
  outcomes = [
    draft([0.95, 0.55, 0.3], 1, 3),  # Slot 2 was rejected, 3 does not count.
    draft([1.0, 0.52, 0.3], 3, 3),
    draft([0.91, 0.2, 0.1], 1, 1),  # The answer ended: slot 2 is unknown.
  ]
  found = calibration.summarise(outcomes)
  bins = found["confidence"]
  assert bins["count"] == [0, 0, 0, 1, 0, 2, 0, 0, 0, 3]
  assert bins["accepted"] == [0, 0, 0, 1, 0, 1, 0, 0, 0, 3]
  np.testing.assert_allclose(bins["sum"][9], 2.86)
  error = (0.7 + (1.07 - 1) + (3 - 2.86)) / 6
  assert calibration.calibration_error([found]) == pytest.approx(error)
  assert calibration.calibration_error([found, found]) == pytest.approx(error)
  place = found["boundary"]
  assert place["observed"] == [0, 1, 0, 1]
  np.testing.assert_allclose(
    place["expected"],
    [
      0.05 + 0.0,
      0.95 * 0.45 + 0.48,
      0.95 * 0.55 * 0.7 + 0.52 * 0.7,
      0.95 * 0.55 * 0.3 + 0.52 * 0.3,
    ],
    atol=1e-4,
  )
  # 0.05, 0.4275, 0.36575: the true place was the likeliest.
  assert place["rank"] == [1, 0, 0]
  nothing = calibration.summarise([])
  assert math.isnan(calibration.calibration_error([nothing]))


def _row(name, policy, temperature=0.0, dtype="float32", **values):
  return {
    **dict.fromkeys(results.ROW_KEYS),
    **{"set": name, "policy": policy},
    **{"temperature": temperature, "dtype": dtype, "ties": []},
    **{"alpha": 2.0, "alpha_cut": 1.5, "ci95": [1.0, 3.0], "nodes": 7.0},
    **{"identical": True, "ci95_cut": [1.25, 1.75]},
    **{"accepted_lengths": [0, 3, 1]},
    **{"counts": [[4, 2]], "counts_cut": [[3, 2]]},
    **values,
  }


def test_means_are_unweighted_and_greedy_first():
  rows = [
    _row("a", "d2sd", 1.0, alpha=9.0),
    _row("a", "d2sd", dtype="bfloat16", alpha=8.0, identical=False),
    _row("a", "d2sd", alpha=2.0, speedup=1.0, ties=[{}]),
    _row("b", "d2sd", alpha=4.0, speedup=2.0),
    _row("a", "ar", alpha=1.0),
  ]
  found = results.means(rows)
  head = found["d2sd"]
  assert (head["alpha"], head["speedup"], head["ties"]) == (3.0, 1.5, 1)
  assert (head["temperature"], head["dtype"]) == (0.0, "float32")
  assert head["sets"] == ["a", "b"]
  assert (head["ci95"], head["ci95_cut"]) == ([2.0, 2.0], [1.5, 1.5])
  assert head["ms_per_token"] is None
  assert [entry["alpha"] for entry in head["more"]] == [8.0, 9.0]
  assert not head["more"][0]["identical"]
  assert "more" not in found["ar"]


def test_means_of_fewer_sets_are_named_in_the_table():
  rows = [_row(name, "dflash") for name in "ab"]
  rows += [_row(name, "d2sd", alpha_cut=3.0) for name in "ab"]
  rows.append(_row("b", "d2sd_3", alpha_cut=6.0))
  meta = {"target": {"name": "tiny"}, "device": "cpu", "settings": {}}
  table = results.markdown({"meta": meta, "rows": rows})
  ratios = [
    tuple(line.split(" | ")[i] for i in (0, 2))
    for line in table.splitlines()
    if "1.25, 1.75" in line and "of `dflash`" not in line
  ]
  assert ratios == [
    ("| `dflash`", "1.00"),
    ("| `d2sd`", "2.00"),
    ("| `d2sd_3`, 1 of 2 sets", "-"),
  ]


def _results_file(tmp_path):
  drafts = [
    Outcome(confidence=np.array([0.9, 0.6]), accepted=i, seen=2)
    for i in (0, 1, 2)
  ]
  drawn = {"calibration": calibration.summarise(drafts)}
  rows = [_row("a", "ar"), _row("a", "dflash"), _row("b", "d2sd", **drawn)]
  meta = {"target": {"name": "tiny"}, "device": "cpu", "settings": {}}
  path = tmp_path / "r.json"
  results.write_results(path, {"meta": meta, "rows": rows})
  return path


def test_pictures(tmp_path, capsys):
  pytest.importorskip("matplotlib")
  path = _results_file(tmp_path)
  assert cli.run(pictures.main, [str(path)]) == 0
  names = [f"{name}.png" for name in pictures.PICTURES]
  assert len(names) == 4
  assert [p.split("/")[-1] for p in capsys.readouterr().out.split()] == names
  for name in names:
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_pictures_say_what_is_missing(tmp_path, monkeypatch, capsys):
  def missing(name):
    raise ModuleNotFoundError(name)

  monkeypatch.setattr(pictures.importlib, "import_module", missing)
  path = _results_file(tmp_path)
  assert cli.run(pictures.main, [str(path)]) == 2
  assert "'.[plots]'" in capsys.readouterr().err
  assert cli.run(pictures.main, [str(tmp_path / "none.json")]) == 2
  assert "none.json" in capsys.readouterr().err
  with pytest.raises(UsageError, match="results="):
    results.read_results(tmp_path)

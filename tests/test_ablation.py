"""An ablation around a tiny target: the same batches, going on, refusals."""

import dataclasses
import json

import pytest
import tiny

from d2sd_jax import cli
from d2sd_jax.training import ablation, ablation_arms
from d2sd_jax.training.ablation_config import (
  AblationConfig,
  load_base,
  make_arms,
)
from d2sd_jax.training.ablation_results import compare
from d2sd_jax.training.data import Batches

pytestmark = pytest.mark.usefixtures("quick_compilation")
_BASE = {
  "num_layers": 1,
  "block_size": 4,
  "mask_token_id": 3,
  "num_anchors": 3,
  "max_length": 47,
  "batch_size": 2,
  "num_steps": 3,
  "dtype": "float32",
  "optimizer": "muon",
  "slot_weighting": "d_pace",
}
_ABLATION = {
  "arms": {
    # The order told is not the order of need.
    "warm": {
      "role": "vp_drafter",
      "init_from": "arm:plain",
      "first_drafter": "arm:plain",
    },
    "plain": {},
    "exponential": {"slot_weighting": "exponential"},
  },
  "decodings": {"other": {"arm": "warm", "forbid_repeat": False}},
  "groups": {
    "weights": ("plain", "exponential"),
    "repeat": ("warm", "other"),
  },
  "drafter": "arm:plain",
  "num_prompts": 3,
  "max_new_tokens": 9,
  "decode_batch_size": 2,
  "num_branches": 2,
}
_FILE = """\
from ml_collections import ConfigDict

def get_config():
  return ConfigDict({}, convert_dict=False)
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory):
  config = dataclasses.replace(tiny.GGUF_TARGET, vocab_size=len(tiny.TOKENS))
  metadata = tiny.tokenizer_metadata() | tiny.gguf_metadata(config)
  path = tmp_path_factory.mktemp("target") / "tiny.gguf"
  return tiny.write_gguf(path, metadata, tiny.gguf_tensors(config))


@pytest.fixture
def run(tmp_path, target, capsys, monkeypatch):
  """Runs the script: `run(flag, ..)` gives status, output and errors."""
  monkeypatch.setattr(cli, "setup_jax_cache", lambda: None)
  lines = [
    json.dumps({"prompt_tokens": [1, 9, i], "tokens": [*range(20 + i, 33 + i)]})
    for i in range(5)
  ]
  for name, some in (("corpus", lines), ("heldout", lines[:4])):
    (tmp_path / f"{name}.jsonl").write_text("\n".join(some))
  base, config = tmp_path / "base.py", tmp_path / "arms.py"
  base.write_text(
    _FILE.replace(
      "{}",
      repr(
        _BASE
        | {"target": str(target), "corpus": str(tmp_path / "corpus.jsonl")}
        | {"heldout": "none.jsonl"}
      ),
    )
  )
  values = {
    "base": str(base),
    "overrides": {"heldout": str(tmp_path / "heldout.jsonl")},
    "out": str(tmp_path / "new" / "r.json"),
  }
  config.write_text(_FILE.replace("{}", repr(_ABLATION | values)))

  def call(*flags):
    status = cli.run(ablation.main, [f"--config={config}", *flags])
    captured = capsys.readouterr()
    return status, captured.out, captured.err

  return call


def _bytes(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_arms_see_the_same_batches_and_go_on(run, tmp_path, monkeypatch):
  seen = []
  read, decode = Batches.__getitem__, ablation_arms.decode_arm

  def record(batches, step):
    batch = read(batches, step)
    seen.append((step, batch.tokens.tolist()))
    return batch

  def stop_at_the_third(lab, arm):
    if arm.name == "warm":
      raise KeyboardInterrupt
    return decode(lab, arm)

  monkeypatch.setattr(Batches, "__getitem__", record)
  monkeypatch.setattr(ablation_arms, "decode_arm", stop_at_the_third)
  out = tmp_path / "new" / "r.json"
  assert run()[0] == 130
  # Each arm looks at the first batch once more, to compile.
  parts = [seen[i : i + 4] for i in range(0, len(seen), 4)]
  assert [step for step, _ in parts[0]] == [0, 0, 1, 2]
  assert parts == [parts[0]] * 3
  found = json.loads(out.read_text())
  assert [row["arm"] for row in found["rows"]] == ["plain", "exponential"]
  plain, other = found["rows"]
  assert plain["weights_sha256"] != other["weights_sha256"]
  assert plain["loss"] != other["loss"]
  for row in found["rows"]:
    # The first token is prefill's.
    assert [committed for committed, _ in row["counts"]] == [8, 8, 8]
    assert 1 <= row["heldout_alpha"] <= 4
    assert row["ms_per_step"] > 0
  (_, entry) = found["groups"]["weights"]
  difference = other["alpha_cut"] - plain["alpha_cut"]
  assert entry["difference"] == pytest.approx(difference, abs=2e-5)

  # Nothing that is there is measured again, and --minutes begins no arm.
  monkeypatch.setattr(ablation_arms, "decode_arm", decode)
  before = out.read_bytes()
  status, _, errors = run("--minutes=1e-9")
  assert (status, "2 arms are left" in errors) == (0, True)
  assert out.read_bytes() == before
  seen.clear()
  assert run()[0] == 0
  assert seen == parts[0]
  found = json.loads(out.read_text())
  assert found["rows"][:2] == [plain, other]
  warm, repeat = found["rows"][2:]
  assert (warm["arm"], repeat["arm"]) == ("warm", "other")
  assert repeat["loss"] == warm["loss"]
  assert not repeat["settings"]["tree"]["forbid_repeat"]
  assert warm["settings"]["tree"]["forbid_repeat"]
  tables = out.with_suffix(".md").read_text()
  assert "## weights" in tables
  assert "| `other` |" in tables
  assert sorted(p.name for p in (tmp_path / "new" / "r").iterdir()) == [
    *("exponential", "plain", "warm")
  ]
  before = _bytes(tmp_path / "new")
  assert "has all of these arms" in run()[1]
  assert _bytes(tmp_path / "new") == before

  # What is not the same is refused, and nothing overwritten.
  for flags, told in (
    (["--config.overrides.num_steps=4"], "meta.base.num_steps=4: expected 3"),
    (["--config.num_prompts=2"], "meta.decoding.num_prompts=2: expected 3"),
    (["--config.num_branches=1"], "arms.warm.tree.num_branches=1: expected 2"),
    (
      ["--config.arms.plain={'clip_norm': 2.0}"],
      "arms.plain.changes.clip_norm",
    ),
  ):
    status, _, errors = run(*flags)
    assert (status, errors.count("\n")) == (2, 1)
    assert told in errors
  with (tmp_path / "corpus.jsonl").open("a") as lines:
    lines.write("\n")
  status, _, errors = run()
  assert (status, errors.count("\n")) == (2, 1)
  assert "meta.base.corpus_sha256" in errors
  assert _bytes(tmp_path / "new") == before


@pytest.mark.slow
def test_a_foreign_file_and_a_lost_drafter_are_refused(run, tmp_path):
  out = tmp_path / "new" / "r.json"
  out.parent.mkdir()
  out.write_text('{"meta": {}, "rows": [], "means": {}}')
  status, _, errors = run()
  assert (status, errors.count("\n")) == (2, 1)
  assert "expected a results file of d2sd_jax.training.ablation" in errors
  out.unlink()
  assert run("--arms=plain")[0] == 0
  weights = tmp_path / "new" / "r" / "plain" / "model.safetensors"
  weights.unlink()
  before = _bytes(tmp_path / "new")
  status, _, errors = run("--arms=warm")
  assert (status, errors.count("\n")) == (2, 1)
  assert f"{weights} sha256=None" in errors
  assert _bytes(tmp_path / "new") == before
  # A folder of something else, a run of `train.py` say, is left alone.
  other = tmp_path / "new" / "r" / "exponential" / "config.json"
  other.parent.mkdir()
  other.write_text("{}")
  status, _, errors = run("--arms=exponential")
  assert (status, errors.count("\n")) == (2, 1)
  assert f"out='{other.parent}'" in errors
  assert other.read_text() == "{}"


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    (["--arms=wide"], "arms='wide': expected a glob of plain"),
    (["--config.arm={}"], "config key 'arm'"),
    (["--config.base=none"], "base: config='none'"),
    (["--config.overrides.steps=3"], "base: config key 'steps'"),
    (["--config.overrides.heldout=/none"], "base: heldout='/none'"),
    (["--config.overrides.mesh=data:1"], "base: mesh='data:1'"),
    (["--config.groups={'a': ('x', 'plain')}"], "groups.a (its baseline)='x'"),
    (["--config.groups={'a': ('plain', 'x')}"], "groups.a='x'"),
    (["--config.groups={'a': 'plain'}"], "groups.a='plain'"),
    (["--config.arms.plain={'layers': 2}"], "arms.plain: config key 'layers'"),
    (["--config.arms.plain={'seed': 2}"], "arms.plain: seed=2"),
    (["--config.arms.plain={'num_layers': 9}"], "arms.plain: num_layers=9"),
    (["--config.arms.plain={'mask_token_id': 2}"], "mask_token_id=2"),
    (["--config.arms.plain=3"], "arms.plain=3"),
    (["--config.arms.warm={'init_from': 'arm:x'}"], "needs='arm:x'"),
    (["--config.arms.plain={'init_from': '/none'}"], "init_from='/none'"),
    (["--config.arms.plain={'init_from': 'arm:warm'}"], "each other's"),
    (
      ["--config.arms.plain={'target_layer_ids': (0,)}"],
      "arms.warm: init_from target_layer_ids=(0,)",
    ),
    (
      [
        "--config.arms.warm={'role': 'vp_drafter', 'first_drafter': 'arm:warm'}"
      ],
      "arms: warm",
    ),
    (
      ["--config.arms.warm={'role': 'vp_drafter', 'first_drafter': '/none'}"],
      "first_drafter='/none'",
    ),
    (["--config.drafter=arm:warm"], "drafter='arm:warm' role='vp_drafter'"),
    (["--config.drafter=/none"], "drafter='/none'"),
    (["--config.decodings={'plain': {}}"], "decodings=['plain']"),
    (["--config.decodings.other={'arm': 'x'}"], "decodings.other: arm='x'"),
    (["--config.decodings.other={'arm': 'warm', 'k': 2}"], "config key 'k'"),
    (["--config.max_new_tokens=1"], "max_new_tokens=1"),
    (["--out=r.md"], "out='r.md'"),
    (["--minutes=soon"], "soon"),
  ],
)
def test_mistakes_are_one_line_and_told_first(
  run, flags, told, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    ablation_arms, "load_target", lambda *_: pytest.fail("loaded")
  )
  monkeypatch.setattr(
    ablation_arms, "read_data", lambda *_: pytest.fail("read")
  )
  status, _, errors = run(*flags)
  assert (status, errors.count("\n")) == (2, 1)
  assert told in errors
  assert not (tmp_path / "new").exists()


def test_a_choice_brings_what_it_needs(run):
  status, listed, _ = run("--list", "--arms=oth*")
  assert status == 0
  assert listed.splitlines() == [
    "plain: base",
    "warm: base, role='vp_drafter', init_from='arm:plain',"
    " first_drafter='arm:plain'",
    "other: warm, forbid_repeat=False",
  ]


def test_paired_differences_by_hand():
  row = lambda name, counts: {
    **{"arm": name, "counts_cut": counts, "alpha_cut": 2.0, "device": "cpu"},
  }
  # α of both prompts alone and of both together: 3, 1.5, 2.25 and 2, 3.5, 2.75.
  rows = {
    "base": row("base", [[4, 2], [7, 2]]) | {"alpha_cut": 2.75},
    "arm": row("arm", [[6, 2], [3, 2]]) | {"alpha_cut": 2.25},
  }
  found = compare("arm", "base", rows)
  assert found == {"arm": "arm", "difference": -0.5, "ci95": [-2.0, 1.0]}
  unknown = {"difference": None, "ci95": [None, None]}
  assert compare("base", "base", rows) == {"arm": "base", **unknown}
  assert compare("late", "base", rows) == {"arm": "late", **unknown}


def test_the_shipped_config():
  config = cli.load_config(AblationConfig, "ablation_smollm2")
  arms = make_arms(config, load_base(config))
  assert {arm.train.num_steps for arm in arms.values()} == {1500}
  assert (config.num_prompts, config.max_new_tokens) == (128, 128)
  assert {arms[name].train.num_layers for name in config.groups["layers"]} == {
    *(3, 4, 5)
  }
  # A group's arms differ in one choice.
  for members in config.groups.values():
    first = arms[members[0]]
    for name in members[1:]:
      arm = arms[name]
      train, tree = vars(arm.train), vars(arm.tree)
      changed = [k for k, v in train.items() if v != vars(first.train)[k]]
      changed += [k for k, v in tree.items() if v != vars(first.tree)[k]]
      assert len(changed) == 1

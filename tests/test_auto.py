"""`--mode=auto`: what was accepted, what passes cost, and the choice."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from d2sd_jax import Models, UsageError
from d2sd_jax.config import MODES, TreeConfig
from d2sd_jax.decoding import auto, costs
from d2sd_jax.decoding.acceptance import (
  ACCEPTANCE_FILE,
  Acceptance,
  read_acceptance,
  write_acceptance,
)
from d2sd_jax.decoding.answers import Answer, Request
from d2sd_jax.decoding.costs import CostTable, cost_table
from d2sd_jax.decoding.decode_config import DecodeConfig
from d2sd_jax.decoding.plan import Plan
from d2sd_jax.eval import acceptance as measuring

pytestmark = pytest.mark.usefixtures("quick_compilation")

# 10 cycles that committed 1 token, 6 that committed 2, 4 that committed 5.
_CHAIN = Acceptance(
  mode="dflash",
  temperature=0.0,
  block_size=5,
  num_branches=0,
  counts=(0, 10, 6, 0, 0, 4),
)
_TREE = dataclasses.replace(
  _CHAIN, mode="d2sd", num_branches=2, counts=(0, 2, 6, 2, 0, 10)
)
_LOOKUP = dataclasses.replace(
  _CHAIN, mode="prompt_lookup", counts=(0, 15, 0, 0, 0, 5), drafting=0.4
)
# Every row costs an accelerator little, and a CPU a lot.
_FLAT = CostTable(
  verify={1: 10.0, 9: 12.0}, drafts=({4: 1.0, 8: 1.0}, {4: 2.0, 8: 2.0})
)
_STEEP = CostTable(
  verify={1: 10.0, 9: 90.0}, drafts=({4: 9.0, 8: 9.0}, {4: 9.0, 8: 9.0})
)


def test_alpha_by_hand():
  assert _CHAIN.alpha(5) == (10 + 12 + 20) / 20
  assert _CHAIN.alpha(3) == (10 + 12 + 12) / 20
  assert _CHAIN.alpha(2) == (10 + 12 + 8) / 20
  assert dataclasses.replace(_CHAIN, counts=()).alpha(4) == 1


def test_costs_between_and_beyond_what_was_measured():
  assert _FLAT.verification(1) == 10
  assert _FLAT.verification(5) == 11
  assert _FLAT.verification(17) == 14
  assert _FLAT.draft(1, 2) == 2
  falling = CostTable(verify={1: 5.0, 3: 4.0}, drafts=())
  assert falling.verification(9) == 4


def test_a_cycle_by_hand():
  by_size = {c.tree.block_size: c for c in auto.candidates(_FLAT, [_CHAIN])}
  assert sorted(by_size) == [2, 3, 4, 5]
  chosen = by_size[5]
  assert chosen.cycle == pytest.approx((11 + 1) / 10)
  assert chosen.speedup == pytest.approx(2.1 / 1.2)
  (*_, tree) = auto.candidates(_FLAT, [_TREE])
  # 5 nodes of the trunk, 4 and 3 of the branches, in whole tiles; two blocks
  # of 5 re-drafted.
  assert tree.tree == TreeConfig(block_size=5, num_branches=2)
  assert tree.cycle == pytest.approx((13.75 + 1 + 2) / 10)
  (*_, lookup) = auto.candidates(_FLAT, [_LOOKUP])
  assert lookup.cycle == pytest.approx((0.4 * 11 + 0.6 * 10) / 10)


def test_the_fastest_is_chosen_and_never_one_slower_than_ar():
  found = [_CHAIN, _TREE, _LOOKUP]
  assert auto.choose(_FLAT, found, 0.0).mode == "d2sd"
  assert auto.choose(_FLAT, [_CHAIN, _LOOKUP], 0.0).mode == "prompt_lookup"
  for temperature in (0.0, 0.7):
    choice = auto.choose(_STEEP, found, temperature)
    assert (choice.mode, choice.speedup) == ("ar", 1)
  assert auto.choose(_FLAT, [], 0.0).mode == "ar"
  # What is accepted of greedy text says nothing of sampled text.
  assert auto.choose(_FLAT, found, 0.7).mode == "ar"
  warm = dataclasses.replace(_CHAIN, temperature=1.0)
  assert auto.choose(_FLAT, [*found, warm], 0.7).mode == "dflash"
  # A gain within the error of both tables is none.
  slight = dataclasses.replace(_CHAIN, counts=(0, 70, 0, 0, 0, 6))
  assert auto.choose(_FLAT, [slight], 0.0).mode == "ar"
  # Modes whose cost the table cannot tell are left out.
  other = dataclasses.replace(_TREE, mode="d2sd_3")
  assert list(auto.candidates(_FLAT, [other])) == []
  assert set(auto.MODES) < set(MODES)
  none = dataclasses.replace(_FLAT, drafts=())
  assert [c.mode for c in auto.candidates(none, [_CHAIN])] == []


def test_counts_are_kept_in_a_file(tmp_path):
  path = tmp_path / ACCEPTANCE_FILE
  assert read_acceptance(tmp_path) == []
  write_acceptance(path, [_CHAIN, _LOOKUP])
  assert read_acceptance(tmp_path) == [_CHAIN, _LOOKUP]
  for text in ('{"a": 1}', "[1]", "[", '[{"mode": "ar"}]'):
    path.write_text(text)
    with pytest.raises(UsageError, match=r"acceptance\.json: expected counts"):
      read_acceptance(tmp_path)


def _models():
  drafters = tiny.drafter(tiny.DFLASH, 1), tiny.drafter(tiny.VP, 2)
  return Models(target=tiny.target(0), drafters=drafters)


@pytest.mark.slow
def test_costs_are_measured_once_and_kept(tmp_path, monkeypatch):
  monkeypatch.setenv("D2SD_CACHE", str(tmp_path))
  monkeypatch.setattr(costs, "VERIFY_SIZES", (1, 6))
  monkeypatch.setattr(costs, "DRAFT_SIZES", (3,))
  monkeypatch.setattr(costs, "_SECONDS", 1e-4)
  told = []
  table = cost_table(_models(), 2, 64, told.append)
  assert told == [
    *("verification of 1", "verification of 6"),
    *("draft 1 of 3", "draft 2 of 3"),
  ]
  assert sorted(table.verify) == [1, 6]
  assert [sorted(draft) for draft in table.drafts] == [[3]] * 2
  assert min(table.verify.values()) > 0
  again = cost_table(_models(), 2, 64, told.append)
  assert again == table
  assert len(told) == 4

  # Other shapes are other entries, and neither loses the first.
  path = tmp_path / costs.COSTS_FILE
  cost_table(Models(target=tiny.target(0)), 1, 64, told.append)
  assert len(told) == 6
  assert len(json.loads(path.read_text())) == 2
  assert cost_table(_models(), 2, 64, told.append) == table
  # Another kernel's code, another table.
  assert {"lone_row.py", "layers.py"} <= {p.name for p in costs._sources()}
  source = tmp_path / "kernel.py"
  source.write_text("faster")
  monkeypatch.setattr(costs, "_sources", lambda: [source])
  cost_table(Models(target=tiny.target(0)), 1, 64, told.append)
  assert len(told) == 8
  # A damaged file is measured anew.
  path.write_text("[]")
  cost_table(Models(target=tiny.target(0)), 1, 64, told.append)
  assert len(told) == 10


@pytest.fixture
def plan(tmp_path):
  trees = {"d2sd": TreeConfig(block_size=5, num_branches=2)}
  return Plan(
    config=DecodeConfig(max_new_tokens=20, dtype="float32"),
    target=tiny.TARGET,
    drafters=(tmp_path, tmp_path),
    trees=trees,
  )


_REQUESTS = [Request(sequence_id=0, tokens=(3, 4, 5))]


def test_the_plan_says_what_was_chosen(plan, tmp_path, monkeypatch, capsys):
  models = _models()
  arguments = (models.target, models.drafters, _REQUESTS)
  bare = auto.resolve(plan, *arguments)
  assert list(bare.trees) == ["ar"]
  assert bare.chosen == "auto: ar, no acceptance.json beside drafter 1"

  write_acceptance(tmp_path / ACCEPTANCE_FILE, [_CHAIN])
  asked = []

  def table(models, batch, capacity, progress):
    asked.append((len(models.drafters), batch, capacity))
    progress("nothing")
    return _FLAT

  monkeypatch.setattr(auto, "cost_table", table)
  chosen = auto.resolve(plan, *arguments)
  assert asked == [(2, 1, 512)]
  assert chosen.trees == {"dflash": TreeConfig(block_size=5, num_branches=0)}
  assert chosen.chosen == "auto: dflash, block 5, 1.75x expected"
  told = capsys.readouterr().err.splitlines()
  assert told == [
    bare.chosen,
    "measuring this device, once: nothing",
    chosen.chosen,
  ]


def test_where_lookup_drafts_by_hand():
  answer = Answer(
    request=Request(sequence_id=0, tokens=(7, 8, 9)),
    mode="prompt_lookup",
    tokens=[7, 8, 9, 1, 2],
    origins=[0] * 5,
    accepted_per_cycle=[1, 2, 1],
    num_verified=3,
    prefill_seconds=0.0,
    decode_seconds=1.0,
    batch_rows=1,
    implementation="xla",
  )
  # Cycles begin behind 789 7, 789 78 and 789 789 1: 78 was seen before.
  assert measuring._drafting([answer]) == pytest.approx(1 / 3)
  assert measuring._drafting([]) == 0


def test_measured_counts_belong_to_real_decoding(monkeypatch):
  class Session:
    def with_sampling(self, sampling):
      return self

  class Bench:
    config = dataclasses.make_dataclass("C", ["batch_size"])(4)

    def requests(self):
      return _REQUESTS

    def session(self, policy, tree, requests, size):
      assert (policy, size) == ("dflash", 1)
      return Session()

    def sampling(self, temperature):
      return temperature

  trees = lambda policy: [TreeConfig(block_size=4, num_branches=0)]
  Bench.config.trees = trees
  answers = [
    dataclasses.make_dataclass("A", ["accepted_per_cycle"])(n)
    for n in ([1, 3, 3], [4])
  ]
  monkeypatch.setattr(measuring, "decode_all", lambda *_: answers)
  got = measuring._measure(Bench(), "dflash", 1.0)
  assert got.counts == (0, 1, 0, 2, 1)
  assert (got.block_size, got.temperature) == (4, 1.0)
  assert got.alpha(4) == np.mean([1, 3, 3, 4])
  assert jnp.isfinite(got.alpha(2))

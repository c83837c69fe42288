"""Corpora of several seeds become one."""

import json

import pytest

from d2sd_jax import cli
from d2sd_jax.training import join_corpora
from d2sd_jax.training.data import read_conversations
from d2sd_jax.training.manifest import manifest_path, sha256_of


def _write(path, *turns):
  lines = [
    json.dumps(
      {
        "messages": [
          {"role": "user", "content": turn},
          {"role": "assistant", "content": "ü"},
        ],
        "prompt_tokens": [1, 2],
        "tokens": list(range(3, 5 + i)),
      },
      ensure_ascii=False,
    )
    for i, turn in enumerate(turns)
  ]
  path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
  return lines


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)

  def call(*flags):
    status = cli.run(join_corpora.main, flags)
    found = capsys.readouterr()
    return status, found.out, found.err

  return call


def test_each_turn_once_and_none_that_is_held_out(run, tmp_path):
  first = _write(tmp_path / "a.jsonl", "one", "two", "three", "two")
  second = _write(tmp_path / "b.jsonl", "four", "three", "one", "five")
  _write(tmp_path / "held.jsonl", "four", "six")
  status, told, _ = run(
    "a.jsonl", "b.jsonl", "--heldout=held.jsonl", "--out=all.jsonl"
  )
  assert status == 0
  path = tmp_path / "all.jsonl"
  assert path.read_text("utf-8").splitlines() == [*first[:3], second[3]]
  assert json.loads(told) == {
    **{"batches": 0, "records": 4, "tokens": 2 + 3 + 4 + 5},
    **{"seen before": 3, "held out": 1},
  }
  assert len(read_conversations(path, 10)) == 4
  parts = json.loads(manifest_path(path).read_text())["identity"]["parts"]
  assert parts == {
    name: sha256_of(tmp_path / name) for name in ("a.jsonl", "b.jsonl")
  }
  # Training notices what is missing.
  path.write_text(path.read_text("utf-8")[:-9], "utf-8")
  with pytest.raises(ValueError, match="cut off"):
    read_conversations(path, 10)


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    (["none.jsonl", "--out=x.jsonl"], "part 1="),
    (["a.jsonl", "none.jsonl", "--out=x.jsonl"], "part 2="),
    (["a.jsonl", "--heldout=none.jsonl", "--out=x.jsonl"], "heldout="),
    (["a.jsonl", "--out=a.jsonl"], "out="),
    (["a.jsonl", "--heldout=a.jsonl", "--out=x.jsonl"], "not held out"),
    (["bad.jsonl", "--out=x.jsonl"], "bad.jsonl, line 2"),
    (["cut.jsonl", "--out=x.jsonl"], "cut off"),
    (["a.jsonl"], "--out"),
    (["--out=x.jsonl"], "PART"),
  ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
  run, tmp_path, flags, told
):
  _write(tmp_path / "a.jsonl", "one")
  (line,) = _write(tmp_path / "bad.jsonl", "one")
  (tmp_path / "bad.jsonl").write_text(f"{line}\n{{}}\n", "utf-8")
  _write(tmp_path / "b.jsonl", "one", "two")
  assert run("b.jsonl", "--out=cut.jsonl")[0] == 0
  (tmp_path / "cut.jsonl").write_text(line, "utf-8")
  before = sorted(p.name for p in tmp_path.iterdir())
  status, _, error = run(*flags)
  assert (status, error.count("\n")) == (2, 1)
  assert told in error
  assert sorted(p.name for p in tmp_path.iterdir()) == before
  assert (tmp_path / "a.jsonl").read_text("utf-8") == f"{line}\n"

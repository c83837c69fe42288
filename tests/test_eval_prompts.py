"""Evaluation prompts: formats on made-up records, counts on the real ones."""

import json

import pytest

from d2sd_jax import cli
from d2sd_jax.errors import UsageError
from d2sd_jax.eval import prompts
from d2sd_jax.io import fetch


def test_formats():
  assert prompts.mt_bench_prompt({"turns": ["one", "two"]}) == "one"
  assert prompts.gsm8k_prompt({"question": "How many?"}) == (
    "How many?\nPlease reason step by step, and put your final answer within"
    " \\boxed{}."
  )
  assert "```python\ndef f():\n```" in prompts.humaneval_prompt(
    {"prompt": "def f():"}
  )
  assert prompts.plain_prompt({"prompt": "Write."}) == "Write."
  assert prompts.cruxeval_prompt({"function": "def f(x):", "input": "1"}) == (
    "What does this call return?\n```python\ndef f(x):\n\nf(1)\n```"
  )


def _real(*arguments):
  try:
    return prompts.load_prompts(*arguments)
  except fetch.DownloadError as error:
    pytest.skip(str(error))


def test_mt_bench_has_80_first_turns_in_order():
  loaded = _real("mt_bench")
  assert [p["id"] for p in loaded] == [f"mt_bench/{i}" for i in range(81, 161)]
  assert loaded[0]["prompt"].startswith("Compose an engaging travel blog post")
  assert _real("mt_bench", 3) == loaded[:3]


def test_second_turns_are_mt_benchs_own():
  follow_ups = prompts.load_follow_ups
  try:
    loaded = follow_ups("mt_bench", 2)
  except fetch.DownloadError as error:
    pytest.skip(str(error))
  assert len(loaded) == 2
  assert loaded[0].startswith("Rewrite your previous response.")


def test_aime25_is_picked_out_of_its_file(tmp_path, monkeypatch):
  source = tmp_path / "source.json"
  cases = [
    {"source": kind, "id": f"case-{i}", "question": f"What is {i}?"}
    for i, kind in enumerate(["GPQA Diamond", "AIME2025", "AIME2025"])
  ]
  source.write_text(json.dumps({"count": 3, "cases": cases}))
  monkeypatch.setattr(prompts, "fetch", lambda pinned: source)
  loaded = prompts.load_prompts("aime25", 2)
  assert [p["id"] for p in loaded] == ["aime25/case-1", "aime25/case-2"]
  assert loaded[0]["prompt"] == f"What is 1?{prompts.REASONING_SUFFIX}"
  assert prompts.load_follow_ups("aime25", 2) == []


def test_aime25_has_25_problems():
  loaded = _real("aime25")
  assert len({p["id"] for p in loaded}) == 25
  assert loaded[0]["prompt"].startswith("Find the sum of all integer bases")


def test_written_lines(tmp_path, monkeypatch):
  source = tmp_path / "source.jsonl"
  lines = [{"task_id": f"MBPP/{i}", "prompt": f"é\u2028{i}"} for i in range(3)]
  source.write_text("".join(json.dumps(x) + "\n" for x in lines))
  monkeypatch.setattr(prompts, "fetch", lambda pinned: source)
  out = tmp_path / "out.jsonl"
  assert cli.run(prompts.main, ["mbpp", "--num=2", f"--out={out}"]) == 0
  written = [json.loads(x) for x in out.read_text("utf-8").split("\n")[:-1]]
  assert written == [
    {"prompt": "é\u20280", "id": "mbpp/MBPP/0"},
    {"prompt": "é\u20281", "id": "mbpp/MBPP/1"},
  ]


def test_all_sets_with_second_turns(tmp_path, monkeypatch):
  source = tmp_path / "source.jsonl"
  source.write_text('{"question_id": 81, "turns": ["one", "two"]}\n')
  monkeypatch.setattr(prompts, "fetch", lambda pinned: source)
  one = {"mt_bench": prompts.PROMPT_SETS["mt_bench"]}
  monkeypatch.setattr(prompts, "PROMPT_SETS", one)
  out = tmp_path / "out.jsonl"
  flags = ["all", "--follow_ups", "--num=1", f"--out={out}"]
  assert cli.run(prompts.main, flags) == 0
  written = [json.loads(x)["prompt"] for x in out.read_text().splitlines()]
  assert written == ["one", "two"]


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    (["alpaca", "--out=x"], "sets='alpaca'"),
    (["mt_bench", "--num=81", "--out=x"], "num=81"),
    (["mt_bench", "--num=0", "--out=x"], "num=0"),
    (["mt_bench", "--num=many", "--out=x"], "--num"),
    (["mt_bench"], "--out"),
  ],
)
def test_mistakes_are_one_line_and_status_2(
  arguments, told, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  assert cli.run(prompts.main, arguments) == 2
  errors = capsys.readouterr().err
  assert told in errors
  assert errors.count("\n") == 1
  assert list(tmp_path.iterdir()) == []


def test_load_prompts_names_the_known_sets():
  with pytest.raises(UsageError, match="expected one of mt_bench, gsm8k"):
    prompts.load_prompts("alpaca")

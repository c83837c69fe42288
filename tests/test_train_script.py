"""`train.py` from corpus to export, on a tiny GGUF target."""

import dataclasses
import json
import time

import pytest
import tiny

import train
from d2sd_jax import UsageError, cli, load_drafter
from d2sd_jax.io.models import read_target_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

_CONFIG = """\
from ml_collections import ConfigDict

def get_config():
  return ConfigDict({})
"""


@pytest.fixture(autouse=True)
def _no_compilation_cache(monkeypatch):
  monkeypatch.setattr(cli, "setup_jax_cache", lambda: None)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
  config = dataclasses.replace(tiny.GGUF_TARGET, vocab_size=len(tiny.TOKENS))
  metadata = tiny.tokenizer_metadata() | tiny.gguf_metadata(config)
  path = tmp_path_factory.mktemp("target") / "tiny.gguf"
  return tiny.write_gguf(path, metadata, tiny.gguf_tensors(config))


@pytest.fixture
def run(tmp_path, target, capsys):
  """Runs `train.py`: `run(workdir, key=value...)` gives status and stderr."""
  ids = [
    {"prompt_tokens": [1, 9, 8], "tokens": list(range(20 + i, 33 + i))}
    for i in range(5)
  ]
  turns = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "hello"},
  ]
  lines = [json.dumps(line) for line in [*ids, {"messages": turns}]]
  (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
  (tmp_path / "heldout.jsonl").write_text("\n".join(lines[:2]))
  values = {
    "target": str(target),
    "corpus": str(tmp_path / "corpus.jsonl"),
    "heldout": str(tmp_path / "heldout.jsonl"),
    "role": "vp_drafter",
    "num_layers": 1,
    "block_size": 4,
    "mask_token_id": 3,
    "num_anchors": 3,
    "max_length": 47,
    "batch_size": 2,
    "num_steps": 6,
    "dtype": "float32",
    "log_every": 2,
    "eval_every": 4,
    "checkpoint_every": 4,
  }
  config = tmp_path / "tiny_config.py"
  config.write_text(_CONFIG.replace("{}", repr(values)))

  def call(workdir, **overrides):
    flags = [f"--config={config}", f"--workdir={tmp_path / workdir}"]
    flags += [f"--config.{k}={v}" for k, v in overrides.items()]
    status = cli.run(train.main, flags)
    return status, capsys.readouterr().err

  return call


def _export(workdir):
  return {p.name: p.read_bytes() for p in (workdir / "export").iterdir()}


def _metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  timed = ("seconds_per_step", "model_tflops_per_second")
  assert all(json.loads(line).keys() >= set(timed) for line in lines)
  return [
    {k: v for k, v in json.loads(line).items() if k not in timed}
    for line in lines
  ]


def test_trains_exports_and_resumes(run, tmp_path, target, monkeypatch):
  status, _ = run("straight")
  assert status == 0
  metrics = _metrics(tmp_path / "straight")
  assert [line["step"] for line in metrics] == [2, 4, 6]
  assert ["heldout_alpha" in line for line in metrics] == [False, True, True]
  assert 1 <= metrics[-1]["heldout_alpha"] <= 4
  assert len(metrics[0]["accuracy"]) == 3
  target_config = read_target_config(target)
  drafter = load_drafter(tmp_path / "straight" / "export", target_config)
  assert drafter.config.training_mode == "vp_drafter"
  assert drafter.config.block_size == 4
  assert drafter.config.mask_token_id == 3

  # Stops in the last evaluation, with the checkpoint of step 4 on the disk.
  evaluate = train.evaluate
  calls = []

  def stop_at_the_second(*args):
    calls.append(args)
    if len(calls) == 2:
      # Checkpoints are written in the background.
      while not (tmp_path / "stopped/checkpoints/4").is_dir():
        time.sleep(0.01)
      raise KeyboardInterrupt
    return evaluate(*args)

  monkeypatch.setattr(train, "evaluate", stop_at_the_second)
  assert run("stopped")[0] == 130
  # The export is the checkpoint's: step 4, not yet the last.
  assert _export(tmp_path / "stopped") != _export(tmp_path / "straight")
  monkeypatch.setattr(train, "evaluate", evaluate)
  status, error = run("stopped")
  assert status == 0
  assert "step 4 of 6" in error
  assert _metrics(tmp_path / "stopped") == metrics
  assert _export(tmp_path / "stopped") == _export(tmp_path / "straight")

  status, error = run("stopped", learning_rate=0.5)
  assert status == 2
  assert "learning_rate" in error

  with (tmp_path / "corpus.jsonl").open("a") as lines:
    lines.write("\n")
  status, error = run("stopped")
  assert (status, error.count("\n")) == (2, 1)
  assert "corpus_sha256" in error
  assert _metrics(tmp_path / "stopped") == metrics
  assert _export(tmp_path / "stopped") == _export(tmp_path / "straight")


@pytest.mark.slow
def test_a_first_drafter_may_move_but_not_change(run, tmp_path):
  assert run("first", role="dflash", num_steps=2)[0] == 0
  first = tmp_path / "first" / "export"
  assert run("second", num_steps=4, first_drafter=first)[0] == 0
  plain = run("plain", num_steps=4)
  assert plain[0] == 0
  assert _metrics(tmp_path / "second") != _metrics(tmp_path / "plain")

  moved = first.rename(tmp_path / "moved")
  status, error = run("second", num_steps=4, first_drafter=moved)
  assert (status, "step 4 of 4" in error) == (0, True)
  assert run("other", role="dflash", num_steps=3)[0] == 0
  other = tmp_path / "other" / "export"
  status, error = run("second", num_steps=4, first_drafter=other)
  assert (status, error.count("\n")) == (2, 1)
  assert "first_drafter_sha256" in error
  # A second drafter is no first one.
  second = tmp_path / "second" / "export"
  status, error = run("third", first_drafter=second)
  assert (status, error.count("\n")) == (2, 1)
  assert "first_drafter role='vp_drafter': expected dflash" in error


@pytest.mark.parametrize(
  ("overrides", "told"),
  [
    ({"corpus": "/none.jsonl"}, "corpus='/none.jsonl'"),
    ({"heldout": "/none.jsonl"}, "heldout='/none.jsonl'"),
    ({"target": "/none.gguf"}, "target='/none.gguf'"),
    ({"init_from": "/none"}, "init_from='/none'"),
    ({"init_from": "/"}, "init_from='/': expected a folder with config.json"),
    (
      {"first_drafter": "x", "role": "dflash"},
      "first_drafter='x': expected none, for only",
    ),
    (
      {"first_drafter": "/none", "role": "vp_drafter"},
      "first_drafter='/none'",
    ),
    ({"failing_share": 2}, "failing_share=2"),
    ({"num_layers": 9}, "num_layers=9"),
    ({"role": "trunk"}, "role='trunk'"),
    ({"anchors": 3}, "config key 'anchors'"),
    ({"num_steps": "many"}, "num_steps='many'"),
    ({"num_anchors": 48}, "num_anchors=48"),
    ({"mask_token_id": 260}, "mask_token_id=260"),
    (
      {"mask_token_id": 2},
      "mask_token_id=2: expected an id that marks no turn",
    ),
    ({"target_layer_ids": "(2,)"}, "target_layer_ids"),
    ({"batch_size": 7}, "batch_size = 7"),
  ],
)
def test_a_mistake_is_one_line_and_status_2(run, tmp_path, overrides, told):
  status, error = run("run", **overrides)
  assert status == 2
  assert error.startswith("error: ")
  assert error.count("\n") == 1
  assert told in error
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["corpus", "heldout"])
def test_a_file_without_a_usable_line_is_named_by_its_field(
  run, tmp_path, field
):
  (tmp_path / f"{field}.jsonl").write_text("\n")
  status, error = run("run")
  assert status == 2
  assert error.startswith(f"error: {field}='")


def test_a_workdir_that_cannot_be_written_is_told_first(
  run, tmp_path, monkeypatch
):
  fetch = lambda _: pytest.fail("fetched")
  monkeypatch.setattr(train, "load_tokenizer", fetch)
  (tmp_path / "file").touch()
  status, error = run("file/run")
  assert (status, error.count("\n")) == (2, 1)
  assert error.startswith("error: workdir='")


def test_metrics_are_cut_at_the_checkpoint_or_refused(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 2}\n{"step": 4}\n{"step": 5, "lo')
  train.open_metrics(path, 3).close()
  assert path.read_text() == '{"step": 2}\n'
  for damaged in ("{}", "[3]", '{"step": 1}}', '{"step": "1"}', "\0"):
    text = f'{damaged}\n{{"step": 2}}\n'
    path.write_text(text)
    with pytest.raises(UsageError, match=r"metrics\.jsonl, line 1: expected"):
      train.open_metrics(path, 3)
    assert path.read_text() == text


@pytest.mark.parametrize("field", ["corpus", "heldout"])
def test_a_malformed_line_is_one_line_and_status_2(run, tmp_path, field):
  (tmp_path / f"{field}.jsonl").write_text(
    '{"prompt_tokens": [1], "tokens": [2, 3]}\n{"messages": []}\n'
  )
  status, error = run("run")
  assert status == 2
  assert error.count("\n") == 1
  assert f"{field}.jsonl, line 2: " in error

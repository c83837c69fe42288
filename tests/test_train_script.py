"""`train.py` from corpus to export, on a tiny GGUF target."""

import dataclasses
import json
import time

import pytest
import test_io_gguf as gguf_files

import train
from d2sd_jax import cli, load_drafter
from d2sd_jax.io.models import read_target_config
from d2sd_jax.io.tokenizer import _BYTE_OF, DEFAULT_SYSTEM

_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TOKENS = [*_MARKS, *sorted(_BYTE_OF), "he"]
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
  config = dataclasses.replace(gguf_files._TINY, vocab_size=len(_TOKENS))
  tokenizer = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": _TOKENS,
    "token_type": [3] * len(_MARKS) + [1] * (len(_TOKENS) - len(_MARKS)),
    "merges": ["h e"],
  }
  metadata = {f"tokenizer.ggml.{k}": v for k, v in tokenizer.items()}
  template = f"<|im_start|>system {DEFAULT_SYSTEM}"
  metadata |= {"tokenizer.chat_template": template}
  metadata |= gguf_files._metadata(config)
  path = tmp_path_factory.mktemp("target") / "tiny.gguf"
  return gguf_files._write(path, metadata, gguf_files._tensors(config))


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
  timeless = lambda line: line.pop("seconds_per_step") and line
  return [timeless(json.loads(line)) for line in lines]


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
  assert not (tmp_path / "stopped" / "export").exists()
  monkeypatch.setattr(train, "evaluate", evaluate)
  status, error = run("stopped")
  assert status == 0
  assert "step 4 of 6" in error
  assert _metrics(tmp_path / "stopped") == metrics
  assert _export(tmp_path / "stopped") == _export(tmp_path / "straight")

  status, error = run("stopped", learning_rate=0.5)
  assert status == 2
  assert "learning_rate" in error


@pytest.mark.parametrize(
  ("overrides", "told"),
  [
    ({"corpus": "/none.jsonl"}, "corpus='/none.jsonl'"),
    ({"heldout": "/none.jsonl"}, "heldout='/none.jsonl'"),
    ({"target": "/none.gguf"}, "target='/none.gguf'"),
    ({"init_from": "/none"}, "init_from='/none'"),
    ({"role": "trunk"}, "role='trunk'"),
    ({"anchors": 3}, "config key 'anchors'"),
    ({"num_steps": "many"}, "num_steps='many'"),
    ({"num_anchors": 48}, "num_anchors=48"),
    ({"mask_token_id": 260}, "mask_token_id=260"),
    ({"target_layer_ids": "(2,)"}, "target_layer_ids"),
    ({"batch_size": 7}, "batch_size = 7"),
  ],
)
def test_a_mistake_is_one_line_and_status_2(run, overrides, told):
  status, error = run("run", **overrides)
  assert status == 2
  assert error.startswith("error: ")
  assert error.count("\n") == 1
  assert told in error


@pytest.mark.parametrize("field", ["corpus", "heldout"])
def test_a_malformed_line_is_one_line_and_status_2(run, tmp_path, field):
  (tmp_path / f"{field}.jsonl").write_text(
    '{"prompt_tokens": [1], "tokens": [2, 3]}\n{"messages": []}\n'
  )
  status, error = run("run")
  assert status == 2
  assert error.count("\n") == 1
  assert f"{field}.jsonl, line 2: " in error

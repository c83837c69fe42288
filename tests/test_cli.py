"""The command line of `decode.py`: every mistake is one line and status 2."""

import dataclasses
import functools
import importlib.util
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest
import tiny
from flax import nnx

from d2sd_jax import (
  POLICIES,
  Drafter,
  DrafterConfig,
  UsageError,
  __version__,
  cli,
)
from d2sd_jax.decoding import plan as planning
from d2sd_jax.decoding import report
from d2sd_jax.decoding.answers import Answer, Request
from d2sd_jax.decoding.decode_config import DecodeConfig
from d2sd_jax.io import models, paths
from d2sd_jax.io.drafter_format import save_drafter
from d2sd_jax.io.fetch import SMOLLM2_135M, DownloadError
from d2sd_jax.io.gguf_tokenizer import gguf_tokenizer
from d2sd_jax.io.tokenizer import TextStream

ROOT = pathlib.Path(__file__).resolve().parents[1]
OLD = "what was there before"


def load_script(name):
  spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


decode = load_script("decode")


@pytest.fixture(scope="module")
def drafters(tmp_path_factory):
  """Two drafter folders that fit the default target, as small as can be."""
  folder = tmp_path_factory.mktemp("drafters")
  for role in ("dflash", "vp_drafter"):
    config = DrafterConfig(
      vocab_size=SMOLLM2_135M.vocab_size,
      hidden_size=SMOLLM2_135M.hidden_size,
      intermediate_size=3,
      num_layers=1,
      num_heads=2,
      num_kv_heads=1,
      head_dim=4,
      rope_theta=1e4,
      rms_norm_eps=1e-6,
      max_length=512,
      block_size=7,
      mask_token_id=16,
      target_layer_ids=(15,),
      num_target_layers=SMOLLM2_135M.num_layers,
      training_mode=role,
    )
    save_drafter(Drafter(config, rngs=nnx.Rngs(0)), folder / role)
  return folder


@pytest.fixture
def files(tmp_path, drafters, monkeypatch):
  """A folder of bad files to stand in; anything fetched fails the test."""
  monkeypatch.chdir(tmp_path)

  def refuse(*_):
    raise AssertionError("a download was tried")

  monkeypatch.setattr(models, "fetch_default_target", refuse)
  monkeypatch.setattr(cli, "setup_jax_cache", lambda: None)
  write = lambda name, text: (tmp_path / name).write_text(text, "utf-8")
  write("out.json", OLD)
  write("good.jsonl", '{"prompt": "hi"}\n')
  write("empty.jsonl", "\n \n")
  write("broken.jsonl", '{"prompt": "hi"}\n\n{"prompt": \n')
  write("blank.jsonl", '{"prompt": "hi"}\n{"prompt": " "}\n')
  write("neither.jsonl", '{"text": "hi"}\n')
  write("number.jsonl", "3\n")
  write("role.jsonl", '{"messages": [{"role": "owl", "content": "hi"}]}\n')
  write("turns.jsonl", '{"messages": []}\n')
  write("surrogate.jsonl", '{"prompt": "\\ud800"}\n')
  (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
  write("raises.py", "raise RuntimeError('first\\nsecond')\n")
  write("nothing.py", "x = 1\n")
  write("none.py", "get_config = lambda: None\n")
  config = "import ml_collections as m\nget_config = lambda: m.ConfigDict(%s)\n"
  write("key.py", config % "{'temprature': 1.0}")
  write("value.py", config % "{'temperature': -2.0}")
  write("not.gguf", "no such thing")

  changes = {
    "narrow": {"hidden_size": 575},
    "words": {"vocab_size": 49151},
    "layers": {"num_target_layers": 29},
    "taps": {"target_layer_ids": [30]},
    "mask": {"mask_token_id": 2},
    "bias": {"attention_bias": True},
  }
  for name, change in changes.items():
    copy_drafter(drafters / "dflash", tmp_path / name, change)
  copy_drafter(drafters / "dflash", tmp_path / "cut", {}, keep=900)
  (tmp_path / "hollow").mkdir()
  (tmp_path / "light").mkdir()
  copied = (drafters / "vp_drafter" / "config.json").read_bytes()
  (tmp_path / "light" / "config.json").write_bytes(copied)
  os.mkfifo(tmp_path / "fifo")
  return tmp_path


def copy_drafter(source, folder, change, keep=None):
  folder.mkdir()
  raw = json.loads((source / "config.json").read_text())
  for key, value in change.items():
    (raw if key in raw else raw["dflash_config"])[key] = value
  (folder / "config.json").write_text(json.dumps(raw))
  weights = (source / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(weights[:keep])


# Arguments beside `--prompt=hi` and good drafters, and what the line says.
MISTAKES = [
  (
    ["--mode=fast"],
    ["mode='fast'", "ar, prompt_lookup, dflash", "d2sd_3, compare"],
  ),
  (["--temprature=1"], ["unknown flag '--temprature=1'", "--temperature"]),
  (["--temp=1"], ["unknown flag '--temp=1'"]),
  (["hello"], ["'hello'"]),
  (["--dtype=float16"], ["dtype='float16'", "float32, bfloat16"]),
  (["--mode"], ["--mode", "expected one argument"]),
  (["--temperature=warm"], ["--temperature", "'warm'", "a number"]),
  (["--top_k=1.5"], ["--top_k", "'1.5'", "a whole number"]),
  (["--temperature=-0.1"], ["temperature=-0.1", "0 or more"]),
  (["--temperature=nan"], ["temperature=nan", "0 or more"]),
  (["--top_k=-1"], ["top_k=-1", "0 (off) or more"]),
  (["--top_p=0"], ["top_p=0.0", "above 0"]),
  (["--top_p=1.01"], ["top_p=1.01", "at most 1"]),
  (["--max_new_tokens=0"], ["max_new_tokens=0", "at least 1"]),
  (["--max_new_tokens=8192"], ["max_new_tokens=8192", "8192"]),
  (["--batch_size=0"], ["batch_size=0", "at least 1"]),
  (["--seed=-1"], ["seed=-1", "0 to"]),
  (["--block_size=1"], ["block_size=1", "at least 2"]),
  (["--block_size=0"], ["block_size=0", "at least 2"]),
  (["--block_size=9999"], ["block_size=9999", "8192"]),
  (["--num_branches=-1"], ["num_branches=-1", "0 or more"]),
  (["--block_size=5", "--num_branches=5"], ["num_branches=5", "= 4"]),
  (["--mode=compare", "--stream"], ["stream=True", "compare"]),
  (["--batch_size=2", "--stream"], ["stream=True", "batch_size=1"]),
  (["--config=no.py"], ["config='no.py'", "smollm2"]),
  (["--config=raises.py"], ["raises.py", "RuntimeError: first second"]),
  (["--config=nothing.py"], ["nothing.py", "get_config()"]),
  (["--config=none.py"], ["none.py", "ConfigDict"]),
  (["--config=key.py"], ["'temprature'", "temperature"]),
  (["--config=value.py"], ["temperature=-2.0", "0 or more"]),
  (["--config.temprature=1"], ["'temprature'", "temperature"]),
  (["--config.top_k=many"], ["top_k='many'", "int"]),
  (["--config.temperature=nan"], ["temperature=nan", "0 or more"]),
  (["--config.top_k"], ["--config.top_k", "a value"]),
  (["--target=no.gguf"], ["target='no.gguf'", "GGUF"]),
  (["--target=hollow"], ["target='hollow'", "GGUF"]),
  (["--target=not.gguf"], ["not.gguf", "GGUF"]),
  (["--drafter=nowhere"], ["drafter='nowhere'"]),
  (["--vp_drafter=nowhere"], ["vp_drafter='nowhere'"]),
  (["--drafter=hollow"], ["drafter='", "hollow", "config.json"]),
  (["--vp_drafter=hollow"], ["vp_drafter='", "hollow", "config.json"]),
  (["--vp_drafter=light"], ["vp_drafter='", "light", "model.safetensors"]),
  (["--drafter=narrow"], ["narrow", "hidden_size=575", "576"]),
  (["--drafter=words"], ["words", "vocab_size=49151", "49152"]),
  (["--drafter=layers"], ["layers", "num_target_layers=29", "30"]),
  (["--drafter=taps"], ["taps", "target_layer_ids=(30,)", "below 30"]),
  (["--drafter=mask"], ["mask", "mask_token_id=2", "never produces"]),
  (["--vp_drafter=mask"], ["mask", "mask_token_id=2", "never produces"]),
  (["--drafter=bias"], ["bias", "attention_bias=True", "False"]),
  (["--drafter=cut"], ["cut", "whole safetensors file"]),
  (["--json=hollow"], ["json='hollow'", "a file"]),
  (["--json=good.jsonl/x"], ["json='good.jsonl/x'", "writing"]),
  (["--json="], ["json=''", "a file"]),
  (["--json=fifo"], ["json='fifo'", "a file"]),
  (["--json=/proc/self/x.json"], ["json='/proc/self/x.json'", "writing"]),
  (["--config.seed=0x" + "f" * 5000], ["seed=...", "2^32"]),
]
PROMPT_MISTAKES = [
  ([], ["--prompt", "--prompts_file", "neither"]),
  (["--prompt=hi", "--prompts_file=good.jsonl"], ["both"]),
  (["--prompt="], ["prompt=''", "some text"]),
  (["--prompt= \n "], ["prompt=", "some text"]),
  (["--prompt=-"], ["prompt='\\n'", "some text"]),
  (["--prompt=\udcff"], ["prompt", "UTF-8"]),
  (["--prompts_file=no.jsonl"], ["prompts_file='no.jsonl'", "JSON lines"]),
  (["--prompts_file=hollow"], ["prompts_file='hollow'", "JSON lines"]),
  (["--prompts_file=empty.jsonl"], ["empty.jsonl", "at least one"]),
  (["--prompts_file=broken.jsonl"], ["broken.jsonl", "line 3", "JSON"]),
  (["--prompts_file=blank.jsonl"], ["line 2", "prompt=' '", "some text"]),
  (["--prompts_file=neither.jsonl"], ["line 1", "prompt or messages"]),
  (["--prompts_file=number.jsonl"], ["line 1", "int"]),
  (["--prompts_file=role.jsonl"], ["line 1", "'owl'", "user"]),
  (["--prompts_file=turns.jsonl"], ["line 1", "messages=[]", "one turn"]),
  (["--prompts_file=latin.jsonl"], ["line 1", "JSON object"]),
  (["--prompts_file=surrogate.jsonl"], ["line 1", "UTF-8"]),
  (
    ["--prompts_file=good.jsonl", "--json=./good.jsonl"],
    ["json='./good.jsonl'", "another file"],
  ),
]


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    *((["--prompt=hi", *given], words) for given, words in MISTAKES),
    *PROMPT_MISTAKES,
  ],
)
def test_a_mistake_is_one_line_before_any_download(
  files, drafters, monkeypatch, capsys, arguments, words
):
  monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
  before = {p: p.read_bytes() for p in files.rglob("*") if p.is_file()}
  status = cli.run(
    decode.main,
    [
      f"--drafter={drafters / 'dflash'}",
      f"--vp_drafter={drafters / 'vp_drafter'}",
      "--json=out.json",
      *arguments,
    ],
  )
  out, err = capsys.readouterr()
  assert (status, out, err.count("\n")) == (2, "", 1)
  assert err.startswith("error: ")
  assert [word for word in words if word not in err] == []
  assert {p: p.read_bytes() for p in files.rglob("*") if p.is_file()} == before


def test_closed_standard_input(files, monkeypatch, capsys):
  monkeypatch.setattr(sys, "stdin", None)
  assert cli.run(decode.main, ["--mode=ar", "--prompt=-"]) == 2
  assert capsys.readouterr().err.startswith("error: prompt=-: expected")


def test_the_download_comes_after_all_checks(files, drafters, monkeypatch):
  """And what it says is told like any other mistake."""
  offline = lambda: (_ for _ in ()).throw(DownloadError("no network"))
  monkeypatch.setattr(models, "fetch_default_target", offline)
  arguments = [
    f"--drafter={drafters / 'dflash' / 'model.safetensors'}",
    f"--vp_drafter={drafters / 'vp_drafter'}",
    "--prompt=hi",
    "--json=new/folder/out.json",
  ]
  with pytest.raises(DownloadError):
    decode.main(arguments)
  assert cli.run(decode.main, arguments) == 2
  assert not (files / "new").exists()


@pytest.mark.parametrize(
  ("mode", "block"), [("ar", 2), ("prompt_lookup", 16), ("dflash", 7)]
)
def test_what_a_mode_does_not_use_is_not_checked(drafters, mode, block):
  unused = {"vp_drafter": "nowhere", "num_branches": 99}
  used = mode == "dflash"
  unused["drafter"] = str(drafters / "dflash") if used else "nowhere"
  plan = planning.make_plan(DecodeConfig(mode=mode, **unused))
  assert list(plan.trees) == [mode]
  assert plan.trees[mode].num_branches == 0
  assert plan.trees[mode].block_size == block


def test_prompt_longer_than_the_context():
  config = DecodeConfig(mode="ar", max_new_tokens=192)
  plan = planning.make_plan(config)
  longest = Request(sequence_id=0, tokens=(5,) * 8000)
  plan.check_context([longest])
  too_long = Request(sequence_id=1, tokens=(5,) * 8001)
  with pytest.raises(UsageError, match=r"prompt 2 tokens=8001: .* 8000"):
    plan.check_context([longest, too_long])


def test_long_prompt_is_one_line(smollm2_path, monkeypatch, capsys):
  del smollm2_path  # There is a target to fetch.
  monkeypatch.setattr(cli, "setup_jax_cache", lambda: None)
  monkeypatch.setattr(
    planning, "load_target", lambda *_, **__: pytest.fail("weights were loaded")
  )
  status = cli.run(decode.main, ["--mode=ar", "--prompt=" + "owl " * 8000])
  out, err = capsys.readouterr()
  assert (status, out, err.count("\n")) == (2, "", 1)
  assert "expected at most 7936" in err


def test_chat_ids_known_beforehand(smollm2_path):
  tokenizer = gguf_tokenizer(smollm2_path)
  assert tokenizer.chat_ids == planning.DEFAULT_CHAT_IDS


def test_the_config_and_what_overrides_it(files):
  arguments = ["--config.temperature=0.5", "--config.mode", "ar", "--seed=4"]
  flags, overrides = decode.flag_parser().parse(arguments)
  assert (flags.config, flags.seed) == ("smollm2", 4)
  assert overrides == {"temperature": 0.5, "mode": "ar"}
  config = cli.load_config(DecodeConfig, "smollm2", overrides)
  assert (config.mode, config.temperature) == ("ar", 0.5)
  assert config.max_new_tokens == 256


def test_config_files_leave_nothing_behind(files):
  (files / "own.py").write_text(
    "import ml_collections as m\n"
    "def get_config():\n"
    "  return m.ConfigDict({'top_k': helper()})\n"
    "def helper():\n"
    "  return 3\n"
  )
  before = sorted(files.rglob("*"))
  assert cli.load_config(DecodeConfig, "own.py").top_k == 3
  assert sorted(files.rglob("*")) == before


def test_one_entry_of_a_mapping_is_overridden(files):
  (files / "own.py").write_text(
    "import ml_collections as m\n"
    "def get_config():\n"
    "  return m.ConfigDict({'sizes': {'a': 1, 'b': {'c': 2}}})\n"
  )
  nested = dataclasses.make_dataclass("Nested", [("sizes", dict)])
  load = lambda **overrides: cli.load_config(nested, "own.py", overrides).sizes
  assert load() == {"a": 1, "b": {"c": 2}}
  assert load(**{"sizes.a": 3}) == {"a": 3, "b": {"c": 2}}
  assert load(**{"sizes.d": 4}) == {"a": 1, "b": {"c": 2}, "d": 4}
  with pytest.raises(UsageError, match=r"config key 'size\.a'"):
    load(**{"size.a": 3})


def test_help_and_version(capsys):
  assert cli.run(decode.main, ["--help"]) == 0
  text = capsys.readouterr().out
  for name, *_ in decode.CONFIG_FLAGS:
    assert f"--{name}" in text
  assert "examples:\n  python decode.py" in text
  assert max(map(len, text.splitlines())) <= 80
  assert cli.run(decode.main, ["--version"]) == 0
  assert capsys.readouterr().out == f"d2sd_jax {__version__}\n"


@pytest.mark.parametrize(
  ("error", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)]
)
def test_ends_quietly(error, status, capsys):
  def main(arguments):
    raise error

  assert cli.run(main, []) == status
  assert capsys.readouterr() == ("", "")


def test_a_full_device_is_one_line(capsys):
  def main(arguments):
    raise jax.errors.JaxRuntimeError(arguments[0])

  assert cli.run(main, ["RESOURCE_EXHAUSTED: Out of\nmemory"]) == 2
  out, err = capsys.readouterr()
  assert (out, err.count("\n")) == ("", 1)
  assert "smaller sizes" in err
  with pytest.raises(jax.errors.JaxRuntimeError):
    cli.run(main, ["INTERNAL: a bug"])


def test_a_closed_pipe_is_told_to_the_script(monkeypatch):
  class Closed(io.StringIO):
    def write(self, text):
      raise BrokenPipeError

  monkeypatch.setattr(sys, "stdout", Closed())
  with pytest.raises(BrokenPipeError):
    report.console().print("a line")


def test_closed_standard_output(monkeypatch):
  for name in ("stdout", "stderr"):
    monkeypatch.setattr(sys, name, None)
  assert cli.run(lambda _: print("a line"), []) == 0


def test_patient_interrupt():
  default = signal.default_int_handler
  before = signal.signal(signal.SIGINT, default)
  interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
  try:
    with cli.patient_interrupt() as check:
      check()
      interrupt()  # is only noted
      with pytest.raises(KeyboardInterrupt):
        check()
      with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert signal.getsignal(signal.SIGINT) is default
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with cli.patient_interrupt() as check:
      interrupt()
      check()
  finally:
    signal.signal(signal.SIGINT, before)


def test_overrides_are_for_scripts_with_a_config(capsys):
  parser = cli.FlagParser("x", "Does x.", "  x")
  with pytest.raises(UsageError, match=r"unknown flag '--config\.a=1'.*--help"):
    parser.parse(["--config.a=1"])
  assert "--config" not in parser.format_help()
  parser.add_argument("--config")
  assert parser.parse(["--config.a=1"])[1] == {"a": 1}
  assert "[--config.KEY=VALUE ...]" in parser.format_help()


def test_json_goes_where_a_link_points(files):
  (files / "link.json").symlink_to("out.json")
  report.write_json(paths.check_output("link.json"), [{"target": "\udcff"}])
  assert (files / "link.json").is_symlink()
  # Even of a path that is no UTF-8.
  assert json.loads((files / "out.json").read_bytes()) == [{"target": "\udcff"}]


def test_interrupted_json_leaves_the_old_one(files, monkeypatch):
  def interrupt(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(json, "dumps", interrupt)
  before = sorted(files.iterdir())
  with pytest.raises(KeyboardInterrupt):
    report.write_json(files / "out.json", [{}])
  assert (files / "out.json").read_text() == OLD
  assert sorted(files.iterdir()) == before


class FakeTokenizer:
  """A letter per id; the shape of the real one."""

  stop_ids = (61,)

  def check_mask_token(self, token_id):
    assert 0 <= token_id < 61

  def encode_chats(self, conversations):
    return [
      [3 + ord(c) % 50 for m in messages for c in m["content"]]
      for messages in conversations
    ]

  def token_bytes(self, token_id):
    return bytes([64 + token_id])

  def stream(self):
    return TextStream(self)

  def decode(self, ids):
    return "".join(chr(64 + i) for i in ids)


@pytest.fixture
def tiny_target(tmp_path, monkeypatch):
  """The whole script around a tiny target; gives the flags for it."""
  monkeypatch.setattr(planning, "read_target_config", lambda _: tiny.TARGET)
  monkeypatch.setattr(cli, "setup_jax_cache", lambda: None)
  monkeypatch.setattr(planning, "load_target", lambda *_, **__: tiny.target())
  monkeypatch.setattr(decode, "load_tokenizer", lambda _: FakeTokenizer())
  save_drafter(tiny.drafter(), tmp_path / "one")
  save_drafter(tiny.drafter(tiny.VP), tmp_path / "two")
  return [
    f"--drafter={tmp_path / 'one'}",
    f"--vp_drafter={tmp_path / 'two'}",
    "--max_new_tokens=9",
    "--block_size=4",
    "--dtype=float32",
    "--mode=d2sd",
  ]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_auto_says_what_it_took(tiny_target, tmp_path, capsys):
  output = tmp_path / "out.json"
  arguments = [*tiny_target, "--prompt=owl", f"--json={output}", "--mode=auto"]
  assert cli.run(decode.main, arguments) == 0
  out, err = capsys.readouterr()
  (record,) = json.loads(output.read_text())
  assert (record["requested_mode"], record["mode"]) == ("auto", "ar")
  told = "auto: ar, no acceptance.json beside drafter 1"
  assert err.splitlines()[0] == told
  assert f"({told}, prefill" in out


@pytest.mark.usefixtures("quick_compilation")
def test_answer_closing_line_and_json(tiny_target, tmp_path, capsys):
  output = tmp_path / "new" / "out.json"
  arguments = [*tiny_target, "--prompt=owl", f"--json={output}"]
  assert cli.run(decode.main, arguments) == 0
  out, err = capsys.readouterr()
  text, closing = out.split("\n\n")
  (record,) = json.loads(output.read_text())
  assert record["text"] == text
  assert record["requested_mode"] == "d2sd"
  assert record["drafter_weights"] == "bfloat16"
  assert (record["mode"], len(record["tokens"])) == ("d2sd", 9)
  assert (record["block_size"], record["num_branches"]) == (4, 3)
  assert [p.name for p in output.parent.iterdir()] == ["out.json"]
  assert "9 tokens" in closing
  assert "α" in closing
  assert "tokens/s" in closing
  assert err.startswith("compiling d2sd for ")
  assert err.count("\n") == 1


def test_swapped_drafters_are_warned_of(
  tiny_target, tmp_path, monkeypatch, capsys
):
  def stop(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(decode, "Session", stop)
  one, two = tmp_path / "one", tmp_path / "two"
  arguments = [*tiny_target, "--prompt=owl"]
  swapped = [f"--drafter={two}", f"--vp_drafter={one}"]
  assert cli.run(decode.main, [*arguments, *swapped]) == 130
  first, second, compiling = capsys.readouterr().err.splitlines()
  assert first == (
    f"warning: drafter='{two}': trained as 'vp_drafter', expected 'dflash'"
  )
  assert second.startswith(f"warning: vp_drafter='{one}': trained as 'dflash'")
  assert compiling.startswith("compiling")


class FakeSession:
  """Answers at once, and in mode dflash one token otherwise than `ar`."""

  def __init__(self, models, requests, sampling, *, mode, batch_size, **_):
    assert batch_size == 2
    assert len(models.drafters) == POLICIES[mode].num_drafters
    self.mode, self._requests = mode, requests

  def warm_up(self):
    pass

  def batches(self):
    return [self._requests]

  def decode(self, requests):
    wrong = self.mode == "dflash"
    return [
      Answer(
        request=request,
        mode=self.mode,
        tokens=[8, 9, 10 + (wrong and request.sequence_id == 1)],
        origins=[0, 1, 0],
        accepted_per_cycle=[1, 1] if self.mode == "ar" else [2],
        num_verified=2,
        prefill_seconds=0.5,
        decode_seconds=0.25,
        batch_rows=len(requests),
        implementation="xla",
      )
      for request in requests
    ]


def test_compare(tiny_target, tmp_path, monkeypatch, capsys):
  prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.json"
  prompts.write_text('{"prompt": "owl"}\n{"prompt": "a cat"}\n')
  margins = []
  measure = lambda target, tokens, *_: margins.append(tokens) or 0.25
  monkeypatch.setattr(decode, "choice_margin", measure)
  monkeypatch.setattr(decode, "Session", FakeSession)
  arguments = [
    *("--mode=compare", f"--prompts_file={prompts}", f"--json={output}"),
    *("--batch_size=2", "--trace"),
  ]
  assert cli.run(decode.main, [*tiny_target, *arguments]) == 0
  out = capsys.readouterr().out
  assert out.count("yes (2 of 2)") == 2
  assert "no (1 of 2)" in out
  assert "dflash, prompt 2: token 2 differs" in out
  assert "0.25 apart: not a tie" in out
  # The target's choice is judged after the prompt and the tokens before it.
  letters = FakeTokenizer().encode_chats([[{"content": "a cat"}]])[0]
  assert margins == [[*letters, 8, 9]]
  assert out.index("ar, prompt 2 of 2") < out.index("d2sd, prompt 2 of 2")
  records = json.loads(output.read_text())
  assert [r["mode"] for r in records] == ["ar", "dflash", "d2sd"] * 2
  assert [len(r["prompt_tokens"]) for r in records] == [3] * 3 + [5] * 3
  assert [r["tokens_per_second"] for r in records] == [8.0] * 6


@functools.cache
def environment():
  return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def test_the_script_itself(tmp_path):
  """A mistake, and the same line with an encoding that cannot say it."""
  done = subprocess.run(
    [sys.executable, ROOT / "decode.py", "--prompt=hi", "--mode=schön"],
    cwd=tmp_path,
    env=environment() | {"PYTHONIOENCODING": "ascii"},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.count("\n") == 1
  assert done.stderr.startswith("error: mode=")


def test_ctrl_c(tmp_path):
  """The script waits for its prompts when the interrupt comes."""
  fifo = tmp_path / "prompts"
  os.mkfifo(fifo)
  process = subprocess.Popen(
    [sys.executable, ROOT / "decode.py", "--mode=ar", f"--prompts_file={fifo}"],
    cwd=tmp_path,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  with open(fifo, "wb"):
    time.sleep(1)  # until it reads: before, a signal could pass unheard
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"")
  assert process.returncode == 130

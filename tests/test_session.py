"""Sessions: ragged batches, records, timing, streaming, interrupts."""

import copy
import dataclasses
import functools
import itertools
import json
import os
import signal
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from d2sd_jax import Models, Sampling, TreeConfig, timing
from d2sd_jax.decoding import report
from d2sd_jax.decoding import session as session_module
from d2sd_jax.decoding.answers import Request
from d2sd_jax.decoding.decode_config import DecodeConfig
from d2sd_jax.decoding.plan import Plan
from d2sd_jax.decoding.policies import POLICIES
from d2sd_jax.decoding.session import Session, bucket, interruptible
from d2sd_jax.io.tokenizer import TextStream
from d2sd_jax.kernels import device
from d2sd_jax.tree import ANCHOR, RE_DRAFT

pytestmark = pytest.mark.usefixtures("quick_compilation")

TREE = TreeConfig(block_size=5, num_branches=2)
LIMIT = 17
_TOLD = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
_TOLD_SEVERAL = {
  "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,"
  "DYNAMIC_SLICE_FUSION,COLLECTIVES"
}
# Pairwise different lengths; the last batch of two has one row to spare.
PROMPTS = ((3, 9, 4), (60, 1, 2, 33, 7, 5, 11), (8, 40, 21, 6, 13))
REQUESTS = [Request(sequence_id=i, tokens=p) for i, p in enumerate(PROMPTS)]


class FakeTokenizer:
  """Each id is one byte, and some are half a character."""

  def __init__(self, stop_ids):
    self.stop_ids = stop_ids

  def token_bytes(self, token_id):
    return bytes([0xC3 if token_id % 3 == 0 else 0xA9])

  def stream(self):
    return TextStream(self)

  def decode(self, ids):
    stream = self.stream()
    return stream.push(ids) + stream.flush()


@pytest.mark.parametrize(
  ("platform", "one_device", "flags", "expected"),
  [
    ("gpu", True, "", _TOLD),
    ("gpu", True, "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE", {}),
    ("gpu", False, "", _TOLD_SEVERAL),
    ("gpu", False, "--xla_gpu_enable_command_buffer=+COLLECTIVES", {}),
    ("cpu", False, "", {}),
    ("tpu", True, "", {}),
    ("cpu", True, "", {}),
  ],
)
def test_what_xla_is_told(monkeypatch, platform, one_device, flags, expected):
  there = types.SimpleNamespace(platform=platform)
  monkeypatch.setattr(device, "target_device", lambda: there)
  monkeypatch.setenv("XLA_FLAGS", flags)
  assert device.compiler_options(one_device=one_device) == expected


def test_several_processes_are_told_nothing(monkeypatch):
  there = types.SimpleNamespace(platform="gpu")
  monkeypatch.setattr(device, "target_device", lambda: there)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert device.compiler_options(one_device=False) == {}
  assert device.compiler_options(one_device=True) == _TOLD


def test_xla_knows_what_it_is_told():
  # It refuses names and values that it does not know, whatever the device.
  lowered = jax.jit(lambda x: x + 1).lower(1.0)
  for told in (_TOLD, _TOLD_SEVERAL):
    assert lowered.compile(compiler_options=told)(1.0) == 2.0
    with pytest.raises(Exception, match="not a valid enum"):
      lowered.compile(compiler_options=dict.fromkeys(told, "ANYHOW"))


def _time_a_step():
  step = lambda models, carry, inputs: carry + 1
  timing.time_step(step, None, jnp.int32(0), None, repeats=1, seconds=0.01)


@pytest.mark.parametrize(
  ("module", "compiling"),
  [
    (session_module, lambda: compiled_session.__wrapped__("ar", 1)),
    (timing, _time_a_step),
  ],
)
def test_programs_are_compiled_with_it(monkeypatch, module, compiling):
  options = {"no_such_option": "1"}
  monkeypatch.setattr(module, "compiler_options", lambda one_device: options)
  with pytest.raises(Exception, match="no_such_option"):
    compiling()


@pytest.mark.gpu
def test_kernels_that_overlap_change_nothing(monkeypatch):
  """In bfloat16, with the kernels of Hopper in the graphs."""
  sizes = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 64}
  config = dataclasses.replace(tiny.TARGET, **sizes)
  narrow = lambda x: x.astype(jnp.bfloat16)
  models = Models(
    target=jax.tree.map(narrow, tiny.target(config=config)),
    drafters=tuple(
      jax.tree.map(narrow, tiny.drafter(dataclasses.replace(d, **sizes)).fuse())
      for d in (tiny.DFLASH, tiny.VP)
    ),
  )

  def answers():
    session = Session(
      models,
      REQUESTS,
      Sampling.create(0.0),
      mode="d2sd",
      tree=TREE,
      max_new_tokens=LIMIT,
      stop_ids=(),
    )
    assert session.implementation == "mosaic_gpu"
    return [session.decode([request])[0].tokens for request in REQUESTS]

  overlapping = answers()
  monkeypatch.setattr(session_module, "compiler_options", lambda **_: {})
  assert answers() == overlapping


@functools.cache
def compiled_session(mode, batch_size):
  drafters = (tiny.drafter(), tiny.drafter(tiny.VP))
  used = drafters[: POLICIES[mode].num_drafters]
  return Session(
    Models(target=tiny.target(), drafters=used),
    REQUESTS,
    Sampling.create(0.9, seed=3),
    mode=mode,
    tree=TREE,
    max_new_tokens=LIMIT,
    stop_ids=(61,),
    batch_size=batch_size,
  )


def make_session(mode, batch_size=2, stop_ids=(61,)):
  """Compiled once: stop ids are an argument of the programs."""
  session = copy.copy(compiled_session(mode, batch_size))
  session._stop_ids = np.asarray(stop_ids, np.int32)
  return session


@functools.cache
def decode_all(mode, batch_size=2, stop_ids=(61,)):
  session = make_session(mode, batch_size, stop_ids)
  answers = [session.decode(batch) for batch in session.batches()]
  return [answer for batch in answers for answer in batch]


def check_identities(answers):
  for answer, prompt in zip(answers, PROMPTS, strict=True):
    assert answer.request.tokens == prompt
    assert 1 + sum(answer.accepted_per_cycle) == len(answer.tokens)
    assert len(answer.origins) == len(answer.tokens)
    assert all(n >= 1 for n in answer.accepted_per_cycle)
    parts = [answer.tokens[part] for part in answer.cycles]
    later = list(itertools.chain.from_iterable(parts))
    assert answer.tokens[:1] + later == answer.tokens


@pytest.mark.parametrize(
  "mode",
  [
    mode
    if mode in ("ar", "d2sd")
    else pytest.param(mode, marks=pytest.mark.slow)
    for mode in POLICIES
  ],
)
def test_ragged_batches(mode):
  session = make_session(mode)
  assert [len(batch) for batch in session.batches()] == [2, 1]
  answers = decode_all(mode)
  check_identities(answers)
  assert [len(a.tokens) for a in answers] == [LIMIT] * 3
  assert [a.batch_rows for a in answers] == [2, 2, 1]
  assert all(a.prefill_seconds > 0 and a.decode_seconds > 0 for a in answers)
  assert [a.tokens for a in answers] == [a.tokens for a in decode_all("ar")]


@pytest.mark.slow
def test_one_prompt_size_and_another_temperature():
  build = lambda sampling, **sizes: Session(
    Models(target=tiny.target()),
    REQUESTS,
    sampling,
    mode="ar",
    tree=TREE,
    max_new_tokens=LIMIT,
    stop_ids=(61,),
    batch_size=2,
    **sizes,
  )
  session = build(Sampling.create(), prompt_size=16)
  assert [*session._prefill] == [16]
  other = session.with_sampling(Sampling.create(0.9, seed=3))
  answers = [a for batch in other.batches() for a in other.decode(batch)]
  assert [a.tokens for a in answers] == [a.tokens for a in decode_all("ar")]
  (greedy, _) = session.decode(REQUESTS[:2])
  assert greedy.tokens != answers[0].tokens
  assert greedy.num_verified == len(greedy.accepted_per_cycle) == LIMIT - 1


def test_ar_commits_one_token_a_cycle():
  for answer in decode_all("ar"):
    assert answer.accepted_per_cycle == [1] * (LIMIT - 1)
    assert answer.origins == [ANCHOR] * LIMIT


@pytest.mark.parametrize("mode", ["ar", "d2sd"])
def test_stop_id_ends_its_row_and_is_included(mode):
  stop = decode_all("ar")[1].tokens[6]
  answers = decode_all(mode, stop_ids=(stop,))
  check_identities(answers)
  for answer, whole in zip(answers, decode_all("ar"), strict=True):
    ids = whole.tokens
    end = ids.index(stop) + 1 if stop in ids else LIMIT
    assert answer.tokens == ids[:end]


def test_the_batch_does_not_matter():
  singly = decode_all("d2sd", batch_size=1)
  assert [a.tokens for a in singly] == [a.tokens for a in decode_all("d2sd")]
  assert [a.batch_rows for a in singly] == [1, 1, 1]


@pytest.mark.parametrize("seconds", [0, 1e9])
def test_streaming_gives_the_same_in_steps(monkeypatch, seconds):
  monkeypatch.setattr(session_module, "STREAM_SECONDS", seconds)
  session = make_session("d2sd", batch_size=1)
  run, calls = session._generate, []
  session._generate = lambda *given: calls.append(given) or run(*given)
  for request, whole in zip(REQUESTS, decode_all("d2sd", 1), strict=True):
    steps = []
    on_step = lambda tokens, origins: steps.append((tokens, origins))  # noqa: B023
    (answer,) = session.decode([request], on_step)
    assert answer.tokens == whole.tokens
    assert answer.origins == whole.origins
    assert answer.accepted_per_cycle == whole.accepted_per_cycle
    pushed = itertools.chain.from_iterable(tokens for tokens, _ in steps)
    assert list(pushed) == whole.tokens
    assert [len(t) for t, _ in steps] == [1, *whole.accepted_per_cycle]
    # A call for each cycle, or for 1, 2, 4, ... of them.
    cycles = len(whole.accepted_per_cycle)
    assert len(calls) == (cycles.bit_length() if seconds else cycles)
    calls.clear()


@pytest.mark.parametrize("trace", [False, True])
def test_printed_text_is_the_same_streamed_or_not(capsys, trace):
  stop = decode_all("ar")[0].tokens[4]
  tokenizer = FakeTokenizer((stop,))
  texts = []
  for stream in (True, False):
    session = make_session("d2sd", 1, (stop,))
    printer = report.Printer(tokenizer, len(PROMPTS), stream, trace)
    answers = printer.decode_aloud(session)
    texts.append(capsys.readouterr().out)
  assert texts[0] == texts[1]
  for answer in answers:
    assert report.answer_text(tokenizer, answer.tokens) + "\n\n" in texts[0]
  # Not cut at a stop id alone: one token of a cycle per line, and prefill's.
  lines = [line for line in texts[0].splitlines() if " +" in line]
  cycles = sum(1 + len(a.accepted_per_cycle) for a in answers)
  assert len(lines) == (cycles if trace else 0)


def test_nothing_compiles_after_construction():
  session = make_session("d2sd", batch_size=1)
  compiled = []
  listen = lambda event, *_, **__: compiled.append(event)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    session.warm_up()
    compiled.clear()
    for request in REQUESTS:
      session.decode([request])
    assert [e for e in compiled if "backend_compile" in e] == []
  finally:
    jax.monitoring.clear_event_listeners()


def test_answers_name_the_attention_that_ran(monkeypatch):
  asked = []

  def choose(query, keys, sinks):
    asked.append((query.shape, keys.shape[3]))
    return "chosen"

  session = make_session("d2sd")
  monkeypatch.setattr(session_module, "default_implementation", choose)
  cache = tiny.target().init_cache(2, 64)
  assert session._implementation(cache) == "chosen"
  # Two rows, one group of all nodes (12, in whole tiles), the target's heads.
  assert asked == [((2, 1, 16, 6, 8), 8)]
  forced = dataclasses.replace(tiny.target(), implementation="reference")
  session.models = dataclasses.replace(session.models, target=forced)
  assert session._implementation(cache) == "reference"
  session.models = dataclasses.replace(session.models, target=object())
  assert session._implementation(cache) == "unknown"


def test_record():
  answer = decode_all("d2sd")[1]
  tokenizer = FakeTokenizer((answer.tokens[-1],))
  plan = Plan(
    config=DecodeConfig(temperature=0.9, seed=3, dtype="float32"),
    target=tiny.TARGET,
    drafters=(),
    trees={"d2sd": TREE, "ar": TREE},
  )
  record = report.make_record(answer, plan, tokenizer)
  assert json.loads(json.dumps(record)) == record
  assert record["prompt_tokens"] == list(PROMPTS[1])
  assert record["tokens"] == answer.tokens
  assert record["text"] == tokenizer.decode(answer.tokens[:-1])
  assert record["implementation"] == "xla"
  assert record["cycles"] == len(record["accepted_per_cycle"])
  assert record["acceptance_length"] == (LIMIT - 1) / record["cycles"]
  speed = (LIMIT - 1) / record["decode_seconds"]
  assert record["tokens_per_second"] == pytest.approx(speed)
  sizes = [record[k] for k in ("block_size", "num_branches", "node_budget")]
  assert sizes == [5, 2, 16]
  assert set(record["versions"]) == {
    *("python", "jax", "jaxlib", "flax", "d2sd_jax")
  }

  single = dataclasses.replace(
    answer, mode="ar", tokens=[4], origins=[0], accepted_per_cycle=[]
  )
  record = report.make_record(single, plan, tokenizer)
  assert record["acceptance_length"] is None
  assert (record["cycles"], record["tokens_per_second"]) == (0, 0)
  assert (record["block_size"], record["node_budget"]) == (1, 1)


def test_comparison_lists_differences(capsys):
  ar = decode_all("ar")
  other = dataclasses.replace(
    ar[2], mode="dflash", tokens=[*ar[2].tokens[:9], 60]
  )
  answers = {"ar": ar, "dflash": [*ar[:2], other]}
  plan = Plan(
    config=DecodeConfig(top_k=3), target=tiny.TARGET, drafters=(), trees={}
  )
  report.print_comparison(answers, {("dflash", 2): 4e-4}, plan)
  out = capsys.readouterr().out
  assert "yes (3 of 3)" in out
  assert "no (2 of 3)" in out
  assert "dflash, prompt 3: token 9 differs" in out
  assert out.rstrip().endswith("a tie")
  report.print_comparison(answers, {("dflash", 2): 0.5}, plan)
  assert "not a tie by scores" in capsys.readouterr().out


def test_no_cycle_has_no_acceptance_length(capsys):
  one = dataclasses.replace(
    decode_all("ar")[0], tokens=[4], origins=[0], accepted_per_cycle=[]
  )
  plan = Plan(
    config=DecodeConfig(dtype="float32"),
    target=tiny.TARGET,
    drafters=(),
    trees={},
  )
  report.print_closing_line([one], plan)
  assert "0 cycles, acceptance length α -, 0.0" in capsys.readouterr().out
  report.print_comparison({"ar": [one]}, {}, plan)
  assert "nan" not in capsys.readouterr().out


def test_trace_names_the_passes(capsys):
  trace = report.Trace(FakeTokenizer(()))
  trace.step([3], [ANCHOR])
  trace.step([3, 1, 4], [RE_DRAFT, RE_DRAFT, ANCHOR])
  first, second = capsys.readouterr().out.splitlines()
  assert first.split()[:3] == ["prefill", "+1", "target"]
  assert second.split()[:4] == ["cycle", "1", "+3", "re-draft"]
  assert 're-draft "é" target' in second


@pytest.mark.parametrize(
  ("size", "padded"), [(1, 64), (64, 64), (65, 128), (129, 256)]
)
def test_bucket(size, padded):
  assert bucket(size) == padded


def test_ctrl_c_is_heard_while_the_device_works():
  release = threading.Event()
  # Whoever started the tests may have had the signal ignored.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
  threading.Timer(0.1, interrupt).start()
  start = time.perf_counter()
  with pytest.raises(KeyboardInterrupt):
    interruptible(lambda: release.wait(30))
  signal.signal(signal.SIGINT, before)
  release.set()
  assert time.perf_counter() - start < 10

"""The corpus writer, with a tiny random target and a made-up tokenizer."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sd_jax import cli
from d2sd_jax.config import TargetConfig
from d2sd_jax.errors import UsageError
from d2sd_jax.io.tokenizer import ChatTokenizer
from d2sd_jax.models.target import LAYER_TENSORS, target_from_tensors
from d2sd_jax.training import corpus, turns

_WORDS = [f" w{i}" for i in range(20)]
_TEXTS = ["<end>", "<start>", *_WORDS]


class FakeTokenizer:
  """A word per id; 0 ends a turn, 1 begins one."""

  stop_ids = (0,)
  special_ids = (0, 1)

  def encode_chat(self, messages):
    (message,) = messages
    words = message["content"].split()
    ids = [_TEXTS.index(f" {w}") if f" {w}" in _TEXTS else 2 for w in words]
    return [1, 3, 0, 1, 4, *ids, 0, 1, 5]

  def encode_prompt(self, text):
    return self.encode_chat([{"role": "user", "content": text}])

  def decode(self, ids):
    return "".join(_TEXTS[i] for i in ids)


@pytest.fixture(scope="module")
def target():
  config = TargetConfig(
    vocab_size=len(_TEXTS),
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    max_length=128,
    tied_head=True,
  )
  rng = np.random.default_rng(0)
  shapes = {
    "q_proj": (32, 16),
    "k_proj": (16, 16),
    "v_proj": (16, 16),
    "o_proj": (16, 32),
    "gate_proj": (24, 16),
    "up_proj": (24, 16),
    "down_proj": (16, 24),
  }
  tensors = {
    "model.embed_tokens.weight": rng.normal(size=(len(_TEXTS), 16)) * 0.3,
    "model.norm.weight": np.ones(16),
  }
  for i in range(2):
    for field, name in LAYER_TENSORS.items():
      if field in ("q_norm", "k_norm"):
        continue
      shape = shapes.get(field, (16,))
      weight = rng.normal(size=shape) * 0.3 if field in shapes else np.ones(16)
      tensors[f"model.layers.{i}.{name}.weight"] = weight
  return target_from_tensors(config, tensors, jnp.float32)


def _config(folder, **changes):
  flags = {
    "out": str(folder / "corpus.jsonl"),
    "heldout": str(folder / "heldout.jsonl"),
    "num_conversations": 19,
    "num_heldout": 5,
    "batch_size": 6,
    "seed": 3,
    "max_turn_tokens": 40,
    "max_answer_tokens": 30,
    "max_prefix_tokens": 24,
    "max_prompt_tokens": 64,
    "min_answer_tokens": 3,
  }
  return corpus.CorpusConfig(**{**flags, **changes})


def _read(path):
  return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def written(target, tmp_path_factory):
  config = _config(tmp_path_factory.mktemp("whole"))
  corpus.write_corpus(target, FakeTokenizer(), config)
  return config


def test_records_hold_the_ids_that_their_texts_came_from(written):
  records = _read(written.out) + _read(written.heldout)
  tokenizer = FakeTokenizer()
  for record in records:
    user, answer = record["messages"]
    assert (user["role"], answer["role"]) == ("user", "assistant")
    assert tokenizer.encode_prompt(user["content"]) == record["prompt_tokens"]
    shown = [i for i in record["tokens"] if i not in tokenizer.stop_ids]
    assert tokenizer.decode(shown) == answer["content"]
    assert written.min_answer_tokens <= len(record["tokens"])
    assert len(record["tokens"]) <= written.max_answer_tokens
    assert not set(record["tokens"][:-1]) & set(tokenizer.stop_ids)
  assert max(len(r["tokens"]) for r in records) > 8


def test_counts_temperatures_and_manifest(written):
  records, heldout = _read(written.out), _read(written.heldout)
  assert len(records) == 19
  assert len(heldout) == 5
  assert {r["temperature"] for r in heldout} == {0.0}
  assert {r["temperature"] for r in records} == {0.0, 0.8}
  path = Path(written.out).with_suffix(".manifest.json")
  manifest = json.loads(path.read_text())
  answers = manifest["answers"]
  assert answers["records"] == 19
  assert answers["tokens"] == sum(len(r["tokens"]) for r in records)
  assert manifest["identity"]["seed"] == 3
  assert len(manifest["sha256"]) == 64


def test_heldout_is_disjoint_and_no_turn_comes_twice(written):
  texts = [
    turns.words(record["messages"][0]["content"])
    for path in (written.heldout, written.out)
    for record in _read(path)
  ]
  assert len({tuple(text) for text in texts}) == len(texts)


def test_a_greedy_answer_is_the_targets_own(written, target):
  record = max(_read(written.heldout), key=lambda r: len(r["tokens"]))
  ids = record["prompt_tokens"] + record["tokens"]
  score = jax.jit(lambda t, n: target.prefill(t, n, ()).logits)
  for n in range(len(record["prompt_tokens"]), len(ids)):
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(ids)] = ids
    logits = score(jnp.asarray(padded), jnp.array([n]))
    assert int(logits.argmax()) == ids[n]


@pytest.mark.parametrize("stop_after", [1, 2, 4, 7])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
  written, target, tmp_path, stop_after
):
  config = _config(tmp_path)
  calls = 0

  def show(*_):
    nonlocal calls
    calls += 1
    if calls == stop_after:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    corpus.write_corpus(target, FakeTokenizer(), config, show)
  # What a run killed in the middle of a line leaves.
  part = "corpus" if (tmp_path / "corpus.manifest.json").exists() else "heldout"
  for name in (f"{part}.jsonl", f"{part}.turns.jsonl"):
    with open(tmp_path / name, "a") as file:
      file.write('{"messages": [{"ro')
  corpus.write_corpus(target, FakeTokenizer(), config)
  for field in ("out", "heldout"):
    whole, resumed = (Path(getattr(c, field)) for c in (written, config))
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_finished_corpus_is_left_alone(written, target, monkeypatch):
  before = Path(written.out).read_bytes()
  monkeypatch.setattr(corpus.Writer, "start", None)
  corpus.write_corpus(target, FakeTokenizer(), written)
  assert Path(written.out).read_bytes() == before


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"seed": 4}, "seed=3, expected 4"),
    ({"batch_size": 5}, "batch_size=6, expected 5"),
    ({"num_conversations": 20}, "num_conversations=19, expected 20"),
  ],
)
def test_a_manifest_of_other_flags_is_refused(written, changes, told):
  config = dataclasses.replace(written, **changes)
  with pytest.raises(UsageError, match=told):
    corpus.open_parts(config, [])


def _copy(written, folder):
  for path in Path(written.out).parent.iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  return _config(folder)


@pytest.mark.parametrize(
  ("damage", "told"),
  [
    (lambda data: data[:-9], "was cut off"),
    (lambda data: b"[" + data[1:], "expected sha256"),
  ],
)
def test_a_damaged_corpus_is_refused(written, tmp_path, damage, told):
  config = _copy(written, tmp_path)
  path = Path(config.out)
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(UsageError, match=told):
    corpus.open_parts(config, [])


def test_a_file_without_a_manifest_is_not_overwritten(tmp_path):
  config = _config(tmp_path)
  Path(config.out).write_text("mine")
  with pytest.raises(UsageError, match="expected a new file"):
    corpus.open_parts(config, [])
  assert Path(config.out).read_text() == "mine"


def test_excluded_turns_are_dropped_and_counted(target, written, tmp_path):
  turn = next(
    text
    for record in _read(written.out)
    if len(turns.words(text := record["messages"][0]["content"])) >= 13
  )
  exclude = tmp_path / "exclude.jsonl"
  exclude.write_text(json.dumps({"prompt": f"Say: {turn} w1, w2."}) + "\n")
  config = _config(tmp_path, exclude=str(exclude))
  corpus.write_corpus(target, FakeTokenizer(), config)
  kept = [r["messages"][0]["content"] for r in _read(config.out)]
  assert turn not in kept
  path = Path(config.out).with_suffix(".manifest.json")
  assert json.loads(path.read_text())["turns"]["dropped"]["excluded"] >= 1


_LONG = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    (_LONG, "duplicate"),
    # Two of its three 8-grams were seen; then one of three.
    ("One, two, three, four, five, six, seven, eight, nine, 10", "duplicate"),
    ("one two three four five six seven eight 9 10", ""),
    ("short and new", ""),
    ("A short text!", "duplicate"),
    ("?!", "empty"),
    ("so " + " ".join("abcdefghijklm"), "excluded"),
    ("so " + " ".join("abcdefghijkl"), ""),
  ],
)
def test_turn_filter(text, reason):
  turn_filter = turns.TurnFilter([" ".join("zabcdefghijklmn")])
  assert turn_filter.reject(_LONG) == ""
  assert turn_filter.reject("a short text") == ""
  assert turn_filter.reject(text) == reason


@pytest.mark.parametrize(
  ("opening", "ids", "expected"),
  [
    ("w1", [4, 5, 0], ("w1 w2 w3", "")),
    ("", [4, 5], ("", "unfinished")),
    ("", [0], ("", "empty")),
    ("w1", [0], ("w1", "empty")),
    ("", [4, 1, 0], (" w2<start>".strip(), "garbled")),
    ("", [4] * 60 + [0], (" ".join(["w2"] * 60), "long")),
  ],
)
def test_read_turn(tmp_path, opening, ids, expected):
  longest = _config(tmp_path).max_prompt_tokens
  assert turns.read_turn(FakeTokenizer(), opening, ids, longest) == expected


def test_a_prefix_ends_where_the_turn_goes_on():
  assert turns.turn_prefix(FakeTokenizer(), "w1") == [1, 3, 0, 1, 4, 3]


def test_openings_are_seeded_and_half_are_free():
  drawn = turns.draw_openings(1000, (1, 2, 3))
  assert drawn == turns.draw_openings(1000, (1, 2, 3))
  assert drawn != turns.draw_openings(1000, (1, 2, 4))
  assert 430 < drawn.count("") < 570
  assert {*drawn} == {"", *turns.OPENINGS}


def test_real_prefixes_fit_their_bucket(smollm2_path):
  tokenizer = ChatTokenizer.from_gguf(smollm2_path)
  assert len(turns.turn_prefix(tokenizer, "")) == 24
  for opening in turns.OPENINGS:
    prefix = turns.turn_prefix(tokenizer, opening)
    assert 24 < len(prefix) <= 40
    assert tokenizer.decode(prefix).endswith(f"user\n{opening}")


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    (["--out=a.jsonl"], "--heldout"),
    (["--out=a.jsonl", "--heldout=a.json"], "heldout="),
    (["--out=a", "--heldout=b", "--batch_size=0"], "batch_size=0"),
    (["--out=a", "--heldout=b", "--batch_size=x"], "--batch_size"),
    (["--out=a", "--heldout=b", "--dtype=int8"], "dtype='int8'"),
    (["--out=a", "--heldout=b", "--exclude=none"], "exclude='none'"),
    (["--out=a", "--heldout=b", "--colour=red"], "--colour=red"),
  ],
)
def test_mistakes_are_one_line_and_status_2(
  flags, told, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  assert cli.run(corpus.main, flags) == 2
  errors = capsys.readouterr().err
  assert told in errors
  assert errors.count("\n") == 1
  assert list(tmp_path.iterdir()) == []


def test_a_malformed_exclusion_is_named_by_its_line(tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text('{"prompt": "a"}\n{"messages": 3}\n')
  with pytest.raises(UsageError, match="line 2"):
    turns.read_excluded(str(path))

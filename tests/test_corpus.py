"""The corpus writer, with a tiny random target and a made-up tokenizer."""

import ast
import dataclasses
import json
import threading
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sd_jax import cli
from d2sd_jax.config import TargetConfig
from d2sd_jax.errors import UsageError
from d2sd_jax.io.gguf_tokenizer import gguf_tokenizer
from d2sd_jax.io.hf_names import LAYER_TENSORS
from d2sd_jax.io.hf_tensors import target_from_tensors
from d2sd_jax.training import corpus, ngrams, openings, synthesis, turns
from d2sd_jax.training.data import read_conversations
from d2sd_jax.training.sources import TopUp
from d2sd_jax.training.writer import Written, one_ahead

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

  def encode_prompts(self, texts):
    return [self.encode_prompt(text) for text in texts]

  def decode(self, ids):
    return "".join(_TEXTS[i] for i in ids)


@pytest.fixture(scope="module")
def target(quick_compilation):
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
    "max_prefix_tokens": 64,
    "max_prompt_tokens": 64,
    "prompt_lengths": (32, 80),
    "min_answer_tokens": 3,
    "sort_window": 2,
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
  temperatures = {r["temperature"] for r in records}
  assert len(temperatures) >= 2
  assert min(temperatures) == 0.0
  assert all(t == 0 or 0.7 <= t <= 1 for t in temperatures)
  path = Path(written.out).with_suffix(".manifest.json")
  manifest = json.loads(path.read_text())
  answers = manifest["answers"]
  assert answers["records"] == 19
  assert answers["tokens"] == sum(len(r["tokens"]) for r in records)
  assert manifest["identity"]["seed"] == 3
  assert manifest["finished"]
  (file,) = manifest["files"].values()
  assert len(file["sha256"]) == 64
  assert file["records"] == 19
  for field in ("prompt_lengths", "answer_lengths", "temperatures"):
    assert sum(answers[field].values()) == 19
  for length in (len(r["tokens"]) for r in records):
    start = length // 16 * 16
    assert f"{start:03}-{start + 15:03}" in answers["answer_lengths"]
  kinds = manifest["turns"]["kinds"]
  assert sum(kinds.values()) == manifest["turns"]["kept"]
  assert {r["kind"] for r in records} <= {*kinds} <= {*openings.KINDS}


def test_heldout_is_disjoint_and_no_turn_comes_twice(written):
  texts = [
    ngrams.words(record["messages"][0]["content"])
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
  with pytest.raises(KeyboardInterrupt):
    corpus.write_corpus(
      target, FakeTokenizer(), config, _stop_after(stop_after)
    )
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
  monkeypatch.setattr(corpus.Writer, "prepare", None)
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
  of = lambda config: _read(Path(config.out).with_suffix(".turns.jsonl"))
  turn = next(
    turn["text"]
    for turn in of(written)
    if len(ngrams.words(turn["text"])) >= 13
  )
  exclude = tmp_path / "exclude.jsonl"
  suffix = openings.REASONING_SUFFIX
  line = json.dumps({"prompt": f"Say: {turn} w1, w2.{suffix}"})
  exclude.write_text(line + "\n")
  config = _config(tmp_path, exclude=str(exclude))
  corpus.write_corpus(target, FakeTokenizer(), config)
  assert turn not in [turn["text"] for turn in of(config)]
  path = Path(config.out).with_suffix(".manifest.json")
  manifest = json.loads(path.read_text())
  assert manifest["turns"]["dropped"]["excluded"] >= 1
  assert manifest["identity"]["excluded_prompts"] == 1


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
  turn_filter = ngrams.TurnFilter([" ".join("zabcdefghijklmn")])
  assert turn_filter.reject(_LONG) == ""
  assert turn_filter.reject("a short text") == ""
  assert turn_filter.reject(text) == reason


@pytest.mark.parametrize(
  ("start", "ids", "expected"),
  [
    ("w1", [4, 5, 0], ("w1 w2 w3", "")),
    ("", [4, 5], ("", "unfinished")),
    ("", [0], ("", "empty")),
    ("w1", [0], ("w1", "empty")),
    ("", [4, 1, 0], ("w2<start>", "garbled")),
    ("", [4] * 60 + [0], (" ".join(["w2"] * 60), "long")),
  ],
)
def test_read_turns(start, ids, expected):
  # Beside a turn of another length, and before garbage.
  tokens = np.full((2, 62), 1)
  tokens[0, :4] = [6, 7, 8, 0]
  tokens[1, : len(ids)] = ids
  begun = [
    openings.Opening(kind="free", before="w9 ", after=" w8"),
    openings.Opening(kind="general", start=start),
  ]
  written = Written(tokens, np.array([4, len(ids)]))
  other, read = turns.read_turns(FakeTokenizer(), begun, written, 65)
  assert other[0].prompt == "w9 w4 w5 w6 w8"
  assert (other[0].text, other[0].kind, other[1]) == ("w4 w5 w6", "free", "")
  turn, reason = read
  assert (turn.text, reason) == expected
  prompt = FakeTokenizer().encode_prompt(turn.prompt)
  measured = reason in ("", "long")
  assert turn.prompt_length == (len(prompt) if measured else 0)


_DOCSTRING = openings.Opening(
  kind="docstring", start='def f(a):\n    """', stop=openings.DOCSTRING_END
)
_STORY = openings.Opening(kind="arithmetic", start="Tom")
_CALL = openings.Opening(
  kind="call", start="def f(a):\n", stop=openings.FENCE_END
)


@pytest.mark.parametrize(
  ("opening", "written", "finished", "expected"),
  [
    (_DOCSTRING, 'Add."""\n  return', False, ('def f(a):\n    """Add."""', "")),
    (_DOCSTRING, "Add.\n", True, ("", "unfinished")),
    (_DOCSTRING, ' """', True, ('def f(a):\n    """ """', "shapeless")),
    (_CALL, "  return a\n```\nWhy", False, ("def f(a):\n  return a", "")),
    (
      _CALL,
      "  return a\n\n  # b",
      True,
      ("def f(a):\n  return a\n\n  # b", ""),
    ),
    (_CALL, "  return a\n\nf(3)", False, ("def f(a):\n  return a", "")),
    (_CALL, "  return a\n", False, ("", "unfinished")),
    (_CALL, "  pass\n```", True, ("def f(a):\n  pass", "shapeless")),
    (_STORY, " has 2. ", True, ("Tom has 2.", "")),
    (_STORY, " has two.", True, ("Tom has two.", "shapeless")),
    (_STORY, " has 2", False, ("", "unfinished")),
  ],
)
def test_a_turn_is_cut_where_its_format_says(
  opening, written, finished, expected
):
  text = opening.start + written
  assert turns.own_text(opening, text, finished) == expected


def _turn(length):
  return turns.Turn(text="", kind="free", prompt_length=length)


def test_a_batch_answers_neighbours_in_length(tmp_path):
  config = _config(tmp_path, batch_size=2, sort_window=3)
  lengths = [5, 3, 9, 4, 3, 8, 2, 7, 6, 1, 1, 4, 2, 9]
  written = [_turn(length) for length in lengths]
  batches = [
    synthesis.batch_of_window(written, batch, 5, config) for batch in range(7)
  ]
  # A window of three batches, one of the two that remain, two of one each.
  assert [[turn.prompt_length for turn in turns] for turns in batches] == [
    *([3, 3], [5, 4], [9, 8]),
    *([2, 1], [7, 6]),
    *([1, 4], [2, 9]),
  ]


def test_prompts_take_the_smallest_static_length(tmp_path):
  prompt = lambda length: [0] * length
  sizes = [[3, 32], [33, 2], [64], [40]]
  config = _config(tmp_path, prompt_lengths=(48, 80, 32))
  got = [synthesis.static_length([*map(prompt, s)], config) for s in sizes]
  assert got == [32, 48, 64, 48]


@pytest.mark.parametrize("window", [1, 2, 5])
def test_half_of_the_answers_are_greedy_at_every_length(tmp_path, window):
  config = _config(tmp_path, sort_window=window)
  part = synthesis.Part(index=1, num_records=9, greedy_only=False, ledger=None)
  drawn = np.array(
    [
      synthesis.answer_temperature(part, batch, config)
      for batch in range(window * 100)
    ]
  ).reshape(100, window)
  assert ((drawn == 0).sum(0) == 50).all()
  sampled = drawn[drawn > 0]
  assert 0.7 <= sampled.min() < 0.73
  assert 0.97 < sampled.max() <= 1
  part = dataclasses.replace(part, greedy_only=True)
  assert synthesis.answer_temperature(part, 1, config) == 0


def test_the_next_batch_is_written_while_one_is_read():
  begun = [threading.Event() for _ in range(4)]

  def prepare(number):
    def write():
      begun[number].set()
      return number

    return f"batch {number}", write

  seen = []
  for info, result in one_ahead(prepare, 1, lambda n: len(seen) + n < 3):
    if result < 3:
      assert begun[result + 1].wait(10)
    seen.append((info, result))
  assert seen == [(f"batch {n}", n) for n in (1, 2, 3)]


def test_a_failure_on_the_device_is_raised():
  def prepare(number):
    return number, lambda: 1 // number

  with pytest.raises(ZeroDivisionError):
    list(one_ahead(prepare, 0, lambda running: True))


def test_a_failure_to_write_is_raised(target, tmp_path, monkeypatch):
  def full(*_):
    raise OSError("no space left")

  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(OSError, match="no space left"):
    corpus.write_corpus(target, FakeTokenizer(), _config(tmp_path))


def test_a_prefix_ends_where_the_turn_goes_on():
  assert turns.turn_prefix(FakeTokenizer(), "w1") == [1, 3, 0, 1, 4, 3]


def test_openings_are_seeded_and_of_all_kinds():
  drawn = openings.draw_openings(3000, (1, 2, 3))
  assert drawn == openings.draw_openings(3000, (1, 2, 3))
  assert drawn != openings.draw_openings(3000, (1, 2, 4))
  kinds = Counter(opening.kind for opening in drawn)
  assert sum(share for share, _ in openings.KINDS.values()) == pytest.approx(1)
  for kind, (share, group) in openings.KINDS.items():
    assert kinds[kind] / 3000 == pytest.approx(share, abs=0.025)
    starts = {opening.start for opening in group}
    mine = [opening for opening in drawn if opening.kind == kind]
    assert {opening.start for opening in mine} <= starts
    suffixed = sum(opening.after != "" for opening in mine) / len(mine)
    expected = {"docstring": 1, "call": 1}.get(kind, 0)
    if kind in ("arithmetic", "competition", "writing"):
      expected = 0.6
    assert suffixed == pytest.approx(expected, abs=0.1)


def test_drawn_calls_are_calls_of_their_functions():
  for opening in openings.draw_openings(300, (5,)):
    if opening.kind == "call":
      arguments = ast.parse(opening.start.split("\n")[0] + " 0").body[0].args
      call = opening.after.strip().removesuffix("```").strip()
      (values,) = [ast.parse(call, mode="eval").body.args]
      assert len(values) == len(arguments.args)
      assert [ast.literal_eval(value) for value in values]


def test_the_formats_words_are_no_part_of_n_grams():
  suffix = openings.REASONING_SUFFIX
  assert corpus.own_texts([f"How many?{suffix}"]) == ["How many?\n"]
  (own,) = corpus.own_texts([openings._SOLVE + "def f():\n```"])
  assert ngrams.words(own) == ["def", "f"]


def test_real_prefixes_fit_their_bucket(smollm2_path, tmp_path):
  tokenizer = gguf_tokenizer(smollm2_path)
  prefixes = turns.turn_prefixes(tokenizer, 96)
  assert len(prefixes[""]) == 24
  assert all(
    tokenizer.decode(prefix).endswith(f"user\n{begun}")
    for begun, prefix in prefixes.items()
  )
  with pytest.raises(UsageError, match="max_prefix_tokens=40"):
    turns.turn_prefixes(tokenizer, 40)


_TOP_UPS = (
  TopUp(
    name="nq_open",
    share=0.25,
    prompts=[f"w{i} w{i} w{j}" for i in range(20) for j in range(20)],
  ),
  # One that is too long, one that is a duplicate, and then no more.
  TopUp(name="mmlu", share=0.1, prompts=["w3", " W3! ", "w1 " * 80]),
)


def test_sources_top_up_the_turns(target, tmp_path, monkeypatch):
  monkeypatch.setattr(corpus, "load_top_ups", lambda shares: _TOP_UPS)
  config = _config(tmp_path, num_conversations=30)
  corpus.write_corpus(target, FakeTokenizer(), config)
  path = Path(config.out).with_suffix(".manifest.json")
  manifest = json.loads(path.read_text())
  counts, looked_at = (manifest["turns"][k] for k in ("kinds", "looked_at"))
  kept = manifest["turns"]["kept"]
  assert counts["nq_open"] / kept == pytest.approx(0.25, abs=0.07)
  assert looked_at["nq_open"] >= counts["nq_open"]
  assert looked_at["mmlu"] == 3
  # It was trained on, or else held out.
  texts = [
    record["messages"][0]["content"]
    for path in (config.out, config.heldout)
    for record in _read(path)
    if record["kind"] == "mmlu"
  ]
  assert len(texts) <= 1
  described = manifest["identity"]["sources"]
  assert [source["name"] for source in described] == ["nq_open", "mmlu"]
  assert described[0]["licence"] == "CC BY-SA 3.0"

  # Stopped anywhere, it goes on with the same prompts.
  for stop_after in (1, 5):
    folder = tmp_path / str(stop_after)
    folder.mkdir()
    again = _config(folder, num_conversations=30)
    with pytest.raises(KeyboardInterrupt):
      corpus.write_corpus(
        target, FakeTokenizer(), again, _stop_after(stop_after)
      )
    corpus.write_corpus(target, FakeTokenizer(), again)
    assert Path(again.out).read_bytes() == Path(config.out).read_bytes()


def _stop_after(calls):
  left = iter(range(calls - 1))

  def show(*_):
    if next(left, None) is None:
      raise KeyboardInterrupt

  return show


def test_shards_together_are_the_corpus(written, target, tmp_path):
  config = _config(tmp_path, num_shards=3)
  with pytest.raises(KeyboardInterrupt):
    corpus.write_corpus(target, FakeTokenizer(), config, _stop_after(7))
  corpus.write_corpus(target, FakeTokenizer(), config)
  shards = sorted(tmp_path.glob("corpus-*.jsonl"))
  assert [len(_read(shard)) for shard in shards] == [7, 7, 5]
  assert shards[1].name == "corpus-00001-of-00003.jsonl"
  whole = b"".join(shard.read_bytes() for shard in shards)
  assert whole == Path(written.out).read_bytes()

  manifest = tmp_path / "corpus.manifest.json"
  got, expected = (
    read_conversations(path, 94) for path in (manifest, written.out)
  )
  assert got.tokens.tolist() == expected.tokens.tolist()
  assert len(got) == 19
  (shard,) = [read_conversations(shards[1], 94)]
  assert shard.prompt_lengths.tolist() == got.prompt_lengths[7:14].tolist()
  shards[2].write_bytes(shards[2].read_bytes()[:-9])
  with pytest.raises(UsageError, match=r"00002-of-00003.jsonl was cut off"):
    read_conversations(manifest, 94)


def _edit(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
  ("damage", "told"),
  [
    (lambda c, m: c.write_bytes(c.read_bytes()[:-9]), "was cut off"),
    (lambda c, m: c.write_bytes(b"[" + c.read_bytes()[1:]), "expected sha256"),
    (lambda c, m: _edit(m, finished=False), "expected a finished corpus"),
    (lambda c, m: _edit(m, files={"../x": {"bytes": 0}}), "the manifest of a"),
    (lambda c, m: m.write_text("{}"), "expected the manifest of a corpus"),
    (lambda c, m: m.write_text("[3"), "expected the manifest of a corpus"),
    (lambda c, m: c.unlink(), "was cut off|expected a file of JSON lines"),
  ],
)
def test_a_corpus_that_does_not_fit_its_manifest_is_not_read(
  written, tmp_path, damage, told
):
  config = _copy(written, tmp_path)
  manifest = Path(config.out).with_suffix(".manifest.json")
  assert len(read_conversations(config.out, 94)) == 19
  damage(Path(config.out), manifest)
  for path in (config.out, manifest):
    with pytest.raises(UsageError, match=told):
      read_conversations(path, 94)


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    (["--out=a.jsonl"], "'heldout' is missing"),
    (["--out=a", "--heldout=b", "--share_boolq=1"], "share_boolq=1.0"),
    (["--out=a", "--heldout=b", "--share_boolq=some"], "--share_boolq"),
    (["--out=a", "--heldout=b", "--config.share=1"], "config key 'share'"),
    (["--out=a", "--heldout=b", "--num_shards=70000"], "num_shards=70000"),
    (["--config=none"], "config='none'"),
    (["--out=a", "--heldout=b", "--config.prompt_lengths=(0,)"], "=(0,)"),
    (["--out=a.jsonl", "--heldout=a.json"], "heldout="),
    (["--out=a", "--heldout=b", "--batch_size=0"], "batch_size=0"),
    (["--out=a", "--heldout=b", "--batch_size=99999999"], "1 to 65536"),
    (["--out=/proc/a/b", "--heldout=b"], "out='/proc/a/b'"),
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


def test_flags_go_before_overrides_and_these_before_the_file():
  name = "--config=corpus_smollm2"
  from_file = corpus.parse_flags([name])
  assert from_file.num_conversations == 120_000
  assert from_file.shares["boolq"] == 0.06
  config = corpus.parse_flags(
    [name, "--config.seed=5", "--config.batch_size=6", "--batch_size=7"]
  )
  changed = dataclasses.replace(from_file, seed=5, batch_size=7)
  assert config == changed


def test_a_malformed_exclusion_is_named_by_its_line(tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text('{"prompt": "a"}\n{"messages": 3}\n')
  with pytest.raises(UsageError, match="line 2"):
    ngrams.read_excluded(str(path))

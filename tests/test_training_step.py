"""Updates, checkpoints and data: a run that was stopped goes on exactly."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from d2sd_jax import Drafter
from d2sd_jax.errors import UsageError
from d2sd_jax.training.checkpoint import Checkpointer
from d2sd_jax.training.data import (
  eval_batches,
  make_dataset,
  read_conversations,
)
from d2sd_jax.training.flops import step_flops
from d2sd_jax.training.step import eval_step, init_train_state, train_step
from d2sd_jax.training.train_config import TrainConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

_CONFIG = TrainConfig(
  corpus="corpus.jsonl",
  heldout="heldout.jsonl",
  role="vp_drafter",
  num_layers=tiny.VP.num_layers,
  block_size=tiny.VP.block_size,
  target_layer_ids=tiny.VP.target_layer_ids,
  mask_token_id=tiny.VP.mask_token_id,
  num_anchors=6,
  max_length=18,
  batch_size=8,
  num_steps=30,
  learning_rate=1e-2,
  dtype="float32",
)


def _write(path, records):
  lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
  path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
  return path


def _record(prompt, answer):
  return {"prompt_tokens": list(prompt), "tokens": list(answer)}


@pytest.fixture
def records(tmp_path):
  """Counting by threes from 11 starts: easy to learn."""
  count = lambda i: [(3 * j + i) % 20 + 30 for j in range(16)]
  lines = [_record(count(i)[:4], count(i)[4 : 12 + i % 4]) for i in range(11)]
  return read_conversations(_write(tmp_path / "c.jsonl", lines), 18)


def test_step_flops_by_hand():
  # Width 24, 6 + 6 + 2 + 2 heads of 8, MLP 40: a target layer's weights.
  target = 24 * 16 * 8 + 3 * 24 * 40
  # 4 + 4 + 1 + 1 heads of 10, MLP 28.
  drafter = 24 * 10 * 10 + 3 * 24 * 28
  tokens, slots = 8 * 18, 8 * 6 * 5
  expected = [
    2 * 3 * target * tokens,
    4 * 3 * 6 * 8 * 9 * tokens,
    6 * (2 * 24 * 24 + 2 * 24 * 10) * tokens,
    6 * drafter * slots,
    12 * 4 * 10 * (9 + 5) * slots,
    4 * 24 * 61 * 8 * 6 * 4,
  ]
  got = step_flops(_CONFIG, tiny.TARGET, tiny.VP)
  assert got == pytest.approx(sum(expected))
  # The last tap is the last layer: a teacher adds its head's logits.
  distilled = dataclasses.replace(_CONFIG, loss="distillation")
  more = step_flops(distilled, tiny.TARGET, tiny.VP) - got
  assert more == pytest.approx(2 * 24 * 61 * 8 * 6 * 4)
  # A first drafter goes forwards through all that the drafter does.
  helped = dataclasses.replace(_CONFIG, first_drafter="smollm2-135m-dflash")
  more = step_flops(helped, tiny.TARGET, tiny.VP) - got
  assert more == pytest.approx(sum(expected[2:5]) / 3 + expected[5] / 2)
  # Of 19 experts of 14 a token takes 2, and all 19 scores.
  mixed = 24 * 16 * 8 + 24 * 19 + 2 * 3 * 24 * 14
  more = step_flops(_CONFIG, tiny.GPT_OSS, tiny.VP) - got
  assert more == pytest.approx(2 * 3 * (mixed - target) * tokens)


def _start():
  return init_train_state(Drafter(tiny.VP, rngs=nnx.Rngs(0)), _CONFIG)


def _train(graphdef, state, dataset, stop, config=_CONFIG):
  losses = []
  for step in range(int(state.step), stop):
    state, metrics = train_step(
      graphdef, state, tiny.target(), dataset[step], config=config
    )
    losses.append(float(metrics["loss"]))
  return state, losses


def _assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_training_lowers_the_loss_and_resumes_exactly(records, tmp_path):
  dataset = make_dataset(records, _CONFIG.batch_size, _CONFIG.seed)
  graphdef, state = _start()
  straight, losses = _train(graphdef, state, dataset, 30)
  assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])

  graphdef, state = _start()
  state, first = _train(graphdef, state, dataset, 13)
  checkpointer = Checkpointer(tmp_path / "run", _CONFIG)
  checkpointer.save(state)
  # The state is donated to the next step while it is being written.
  _train(graphdef, state, dataset, 15)
  checkpointer.close()

  graphdef, fresh = _start()
  checkpointer = Checkpointer(tmp_path / "run", _CONFIG)
  restored = checkpointer.restore(fresh)
  checkpointer.close()
  assert int(restored.step) == 13
  again = make_dataset(records, _CONFIG.batch_size, _CONFIG.seed)
  resumed, rest = _train(graphdef, restored, again, 30)
  assert first + rest == losses
  _assert_same(resumed, straight)


@pytest.mark.slow
def test_a_first_drafter_moves_a_share_of_the_prefixes(records):
  dataset = make_dataset(records, _CONFIG.batch_size, _CONFIG.seed)
  first = tiny.drafter(tiny.DFLASH).fuse()

  def losses(share, first):
    graphdef, state = _start()
    config = dataclasses.replace(
      _CONFIG, first_drafter="a folder", failing_share=share
    )
    found = []
    for step in range(3):
      state, metrics = train_step(
        graphdef, state, tiny.target(), dataset[step], first, config=config
      )
      found.append(float(metrics["loss"]))
    return found

  prior = losses(0.75, None)
  assert losses(0.0, first) == prior
  always = losses(1.0, first)
  assert np.all(np.isfinite(always))
  assert always[0] != prior[0]


@pytest.mark.slow
def test_distillation_brings_the_drafter_nearer_to_the_target(records):
  dataset = make_dataset(records, _CONFIG.batch_size, _CONFIG.seed)
  config = dataclasses.replace(
    _CONFIG, loss="distillation", slot_weighting="d_pace", num_steps=40
  )
  graphdef, state = _start()
  _, losses = _train(graphdef, state, dataset, 40, config)
  assert min(losses) > 0
  assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_without_a_checkpoint_the_state_is_the_first(tmp_path):
  _, state = _start()
  checkpointer = Checkpointer(tmp_path, _CONFIG)
  assert checkpointer.restore(state) is state
  checkpointer.close()


def test_a_workdir_of_another_config_is_refused(tmp_path):
  Checkpointer(tmp_path, _CONFIG).close()
  free = dataclasses.replace(_CONFIG, log_every=7, checkpoint_every=3)
  Checkpointer(tmp_path, free).close()
  other = dataclasses.replace(_CONFIG, learning_rate=0.5)
  with pytest.raises(UsageError, match=r"learning_rate=0\.01, expected 0\.5"):
    Checkpointer(tmp_path, other)


@pytest.mark.parametrize("field", ["corpus", "heldout"])
def test_data_may_move_but_not_change(tmp_path, field):
  before, moved = _write(tmp_path / "a", ["one"]), tmp_path / "b"
  config = dataclasses.replace(_CONFIG, **{field: str(before)})
  Checkpointer(tmp_path / "run", config).close()
  before.rename(moved)
  config = dataclasses.replace(_CONFIG, **{field: str(moved)})
  Checkpointer(tmp_path / "run", config).close()
  _write(moved, ["two"])
  with pytest.raises(UsageError, match=f"{field}_sha256='.*expected '"):
    Checkpointer(tmp_path / "run", config)


def test_a_damaged_checkpoint_is_named(tmp_path):
  _, state = _start()
  checkpointer = Checkpointer(tmp_path, _CONFIG)
  checkpointer.save(state)
  checkpointer.close()
  for path in (tmp_path / "checkpoints" / "0").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  with pytest.raises(UsageError, match="checkpoints/0: expected a whole"):
    Checkpointer(tmp_path, _CONFIG).restore(state)


def test_checkpoints_that_are_no_folder_are_refused(tmp_path):
  (tmp_path / "checkpoints").touch()
  with pytest.raises(UsageError, match="checkpoints': expected a folder"):
    Checkpointer(tmp_path, _CONFIG)


def test_records_are_cut_padded_or_dropped(tmp_path):
  lines = [
    _record([1, 2], [3, 4, 5]),
    "",
    _record([1, 2, 3], range(10, 16)),  # cut
    _record([1, 2, 3, 4, 5], [6, 7, 8]),  # one token of the answer fits
    _record([1], [2]),  # nothing to predict
    _record([1, 2, 3, 4], [5, 6]),  # just fits
  ]
  got = read_conversations(_write(tmp_path / "c.jsonl", lines), 6)
  assert [r["tokens"].tolist() for r in got] == [
    [1, 2, 3, 4, 5, 0],
    [1, 2, 3, 10, 11, 12],
    [1, 2, 3, 4, 5, 6],
  ]
  assert [int(r["prompt_lengths"]) for r in got] == [2, 3, 4]
  assert [int(r["lengths"]) for r in got] == [5, 6, 6]
  for part in (got[1:], got[1:9], got[-2:]):
    assert [int(r["prompt_lengths"]) for r in part] == [3, 4]
    np.testing.assert_array_equal(part[-1]["tokens"], got[2]["tokens"])
  assert len(got[2:1]) == 0
  with pytest.raises(IndexError):
    got[3]


@pytest.mark.parametrize(
  ("vocab_size", "dtype"),
  [(None, np.int32), (65537, np.int32), (65536, np.uint16)],
)
def test_tokens_are_kept_small(tmp_path, vocab_size, dtype):
  lines = [_record([1], [65535, 2]), _record([7, 65534], [3, 4, 5])]
  path = _write(tmp_path / "c.jsonl", lines)
  got = read_conversations(path, 6, vocab_size=vocab_size)
  assert got.tokens.dtype == dtype
  assert got.tokens.tolist() == [1, 65535, 2, 7, 65534, 3, 4, 5]
  assert got[0]["tokens"].dtype == np.int32
  assert got[0]["tokens"].tolist() == [1, 65535, 2, 0, 0, 0]


@pytest.mark.parametrize(
  ("line", "told"),
  [
    ("{", "Expecting"),
    ("[1]", "not an object"),
    ('{"tokens": [1, 2]}', "prompt_tokens"),
    ('{"prompt_tokens": [1], "tokens": 5}', "not iterable"),
    ('{"prompt_tokens": [1], "tokens": [2, true]}', "whole number"),
    ('{"prompt_tokens": [1], "tokens": [2, 61]}', "below 61"),
    ('{"prompt_tokens": [1], "tokens": [2, 3.0]}', "whole number"),
    ('{"prompt_tokens": [-1], "tokens": [2, 3]}', "whole number"),
  ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path, line, told):
  good = _record([1], [2, 60])
  path = _write(tmp_path / "c.jsonl", [good, "", line, good])
  with pytest.raises(UsageError, match=rf"c\.jsonl, line 3: .*{told}"):
    read_conversations(path, 9, vocab_size=61)


def test_a_file_that_is_no_text_is_refused(tmp_path):
  path = tmp_path / "c.jsonl"
  path.write_bytes(b'{"prompt_tokens": [1], "tokens": [2, 3]}\n\xff\xfe\n')
  with pytest.raises(UsageError, match=r"c\.jsonl"):
    read_conversations(path, 9)


def test_messages_need_the_assistant_last(tmp_path):
  class Letters:
    stop_ids = (7, 8)

    def encode(self, text):
      return [ord(c) for c in text]

    def encode_chat(self, messages):
      return [1, *self.encode("".join(m["content"] for m in messages)), 2]

  user = {"role": "user", "content": "ab"}
  answer = {"role": "assistant", "content": "cd"}
  path = _write(tmp_path / "c.jsonl", [{"messages": [user, answer]}])
  (record,) = read_conversations(path, 9, Letters())
  assert record["tokens"].tolist() == [1, 97, 98, 2, 99, 100, 7, 0, 0]
  for messages in ([answer, user], [answer], []):
    _write(path, [{"messages": messages}])
    with pytest.raises(UsageError, match="line 1"):
      read_conversations(path, 9, Letters())


def test_nothing_usable_is_refused(tmp_path):
  with pytest.raises(UsageError, match="file of JSON lines"):
    read_conversations(tmp_path / "none.jsonl", 9)
  path = _write(tmp_path / "c.jsonl", [_record([1], [2])])
  with pytest.raises(UsageError, match="at least one usable line"):
    read_conversations(path, 9)


def _ids(batch):
  """Which records a batch holds: every prompt begins with another token."""
  return np.asarray(batch.tokens)[:, 0].tolist()


def test_dataset_is_a_function_of_the_step_and_covers_epochs(records):
  dataset, other = (make_dataset(records, 3, seed) for seed in (0, 1))
  order = [i for step in range(11) for i in _ids(dataset[step])]
  epochs = [order[i : i + 11] for i in range(0, 33, 11)]
  everything = sorted(int(r["tokens"][0]) for r in records)
  assert len(set(everything)) == 11
  assert [sorted(epoch) for epoch in epochs] == [everything] * 3
  assert epochs[0] != epochs[1]
  again = make_dataset(records, 3, 0)
  backwards = [_ids(again[step]) for step in reversed(range(11))]
  assert [i for b in reversed(backwards) for i in b] == order
  assert [i for step in range(11) for i in _ids(other[step])] != order


def test_a_corpus_smaller_than_a_batch_is_refused(records):
  with pytest.raises(UsageError, match="at least batch_size = 12"):
    make_dataset(records, 12, 0)


def test_filler_rows_of_evaluation_count_nothing(records):
  graphdef, state = _start()
  config = dataclasses.replace(_CONFIG, role="dflash")

  def evaluate(batch_size):
    parts = [
      eval_step(graphdef, state.params, tiny.target(), batch, config=config)
      for batch in eval_batches(records, batch_size)
    ]
    return jax.tree.map(lambda *xs: np.sum(xs, axis=0).tolist(), *parts)

  sums = evaluate(7)  # 11 records and 3 rows of filler
  assert sums == evaluate(11)
  answers = [int(r["lengths"] - r["prompt_lengths"]) for r in records]
  assert sums["anchors"] == sum(n - 1 for n in answers)
  assert sums["supervised"] == [
    sum(n - k for n in answers) for k in range(1, _CONFIG.block_size)
  ]

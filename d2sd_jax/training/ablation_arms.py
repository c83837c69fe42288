"""Trains an arm of an ablation, and judges it in the decode loop."""

import collections
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from d2sd_jax import cli
from d2sd_jax.decoding.answers import Request
from d2sd_jax.decoding.report import versions
from d2sd_jax.decoding.session import Session
from d2sd_jax.decoding.state import Models
from d2sd_jax.errors import require
from d2sd_jax.eval import measure
from d2sd_jax.eval.results_file import Row, finite
from d2sd_jax.io.drafter_format import (
  WEIGHTS_FILE,
  load_drafter_folder,
  save_drafter,
)
from d2sd_jax.io.models import file_sha256, load_target, load_tokenizer
from d2sd_jax.io.paths import find_checkpoint
from d2sd_jax.models.target import LlamaTarget
from d2sd_jax.progress import progress_bar
from d2sd_jax.sampling import Sampling
from d2sd_jax.sharding import make_mesh, shard_batch, shard_weights
from d2sd_jax.training.ablation_config import ARM, AblationConfig, Arm
from d2sd_jax.training.data import Batches, Records, make_dataset
from d2sd_jax.training.run import (
  evaluate,
  init_drafter,
  load_first_drafter,
  read_data,
  trained_drafter,
)
from d2sd_jax.training.step import init_train_state, train_step
from d2sd_jax.training.train_config import TrainConfig

# The final loss is the mean over this many last steps: one batch is noisy.
_LAST_STEPS = 20
# Called with the steps made so far.
Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lab:
  """What all arms share, loaded once.

  Attributes:
    target: frozen; the dtype of its weights is that of everything.
    dataset: the batch of every step.
    heldout: conversations that α is simulated on.
    requests: their prompts, or more or fewer, to be decoded.
    stop_ids: ids that end an answer.
    decode_batch_size, max_new_tokens: of decoding.
    folder: where each arm's drafter goes.
  """

  target: LlamaTarget
  dataset: Batches
  heldout: Records
  requests: Sequence[Request]
  stop_ids: tuple[int, ...]
  decode_batch_size: int
  max_new_tokens: int
  folder: Path

  def drafter_folder(self, name: str) -> Path:
    """Where a drafter is, an arm's or any other."""
    if name.startswith(ARM):
      return self.folder / name.removeprefix(ARM)
    return find_checkpoint(name)


def set_up(
  config: AblationConfig,
  base: TrainConfig,
  arms: Mapping[str, Arm],
  folder: Path,
) -> Lab:
  """Loads what all arms share.

  Raises:
    UsageError: a file is damaged, an id for masks is one that the target
      produces, or a prompt is too long.
  """
  tokenizer = load_tokenizer(base.target)
  for mask_id in {arm.train.mask_token_id for arm in arms.values()}:
    tokenizer.check_mask_token(mask_id)
  records, heldout = read_data(base, tokenizer)
  dataset = make_dataset(records, base.batch_size, base.seed)
  requests = [
    Request(
      sequence_id=i,
      tokens=tuple(record["tokens"][: record["prompt_lengths"]].tolist()),
    )
    for i, record in enumerate(heldout[: config.num_prompts])
  ]
  target = load_target(base.target, base.dtype)
  longest = max(len(request.tokens) for request in requests)
  room = target.config.max_length - longest
  expected = f"at most {room}, what the longest prompt leaves of the context"
  fits = config.max_new_tokens <= room
  require(fits, "max_new_tokens", config.max_new_tokens, expected)
  return Lab(
    target=target,
    dataset=dataset,
    heldout=heldout[: base.eval_sequences],
    requests=requests,
    stop_ids=tokenizer.stop_ids,
    decode_batch_size=config.decode_batch_size,
    max_new_tokens=config.max_new_tokens,
    folder=folder,
  )


def measure_arm(lab: Lab, arm: Arm, done: Mapping[str, Row]) -> Row:
  """Trains an arm's drafter, unless it only decodes, and judges it.

  Args:
    lab: what all arms share.
    arm: the arm.
    done: rows of those that are measured, by name.

  Returns:
    A row of the results, but for its `settings`.
  """
  if arm.is_trained:
    with _progress(arm) as advance:
      trained = train_arm(lab, arm, advance)
  else:
    keys = ("loss", "heldout_alpha", "ms_per_step", "weights_sha256")
    trained = {key: done[arm.trained_as][key] for key in keys}
  return {
    "arm": arm.name,
    **decode_arm(lab, arm),
    **trained,
    "device": jax.devices()[0].device_kind,
    "versions": versions(),
  }


def train_arm(lab: Lab, arm: Arm, advance: Advance) -> dict[str, Any]:
  """One run from its start to the exported drafter.

  The first step is not timed.

  Returns:
    `loss`, `heldout_alpha`, `ms_per_step` and `weights_sha256`.
  """
  mesh = make_mesh(None)
  place = lambda name: name and str(lab.drafter_folder(name))
  config = dataclasses.replace(
    arm.train,
    init_from=place(arm.train.init_from),
    first_drafter=place(arm.train.first_drafter),
  )
  first_drafter = load_first_drafter(config, lab.target.config, mesh)
  drafter = init_drafter(config, lab.target.config)
  graphdef, state = init_train_state(drafter, config)
  state = shard_weights(mesh, state)
  batch = lambda step: shard_batch(mesh, lab.dataset[step])
  arguments = state, lab.target, batch(0), first_drafter
  update = train_step.lower(
    graphdef, *arguments, config=config, mesh=mesh
  ).compile()

  losses: collections.deque = collections.deque(maxlen=_LAST_STEPS)
  with cli.patient_interrupt() as stop_if_interrupted:
    for step in range(config.num_steps):
      state, metrics = update(state, lab.target, batch(step), first_drafter)
      losses.append(metrics["loss"])
      if step % config.log_every == 0:
        jax.block_until_ready(state)
        advance(step + 1)
      if step == 0:
        clock = time.perf_counter()
      stop_if_interrupted()
    jax.block_until_ready(state)
  seconds = time.perf_counter() - clock
  steps = config.num_steps - 1
  folder = lab.folder / arm.name
  save_drafter(trained_drafter(graphdef, state.params, mesh), folder)
  heldout = lab.heldout
  found = evaluate(graphdef, state.params, lab.target, heldout, config, mesh)
  return {
    "loss": finite(statistics.fmean(map(float, losses))),
    "heldout_alpha": finite(found["heldout_alpha"]),
    "ms_per_step": finite(1000 * seconds / steps) if steps else None,
    "weights_sha256": file_sha256(folder / WEIGHTS_FILE),
  }


def decode_arm(lab: Lab, arm: Arm) -> dict[str, Any]:
  """α of an arm in the decode loop, with the drafters as they are exported."""
  names = [] if arm.drafter is None else [arm.drafter]
  names.append(f"{ARM}{arm.trained_as}")
  drafters = tuple(
    load_drafter_folder(
      lab.drafter_folder(name), lab.target.config, arm.train.dtype
    )
    for name in names
  )
  session = Session(
    Models(target=lab.target, drafters=drafters),
    lab.requests,
    Sampling.create(0.0),
    mode=arm.mode,
    tree=arm.tree,
    max_new_tokens=lab.max_new_tokens,
    stop_ids=lab.stop_ids,
    batch_size=lab.decode_batch_size,
    prompt_size=measure.prompt_size(lab.requests),
  )
  size = min(lab.decode_batch_size, len(lab.requests))
  answers = measure.decode_all(session, lab.requests, size)
  return measure.acceptance(range(len(answers)), answers)


@contextlib.contextmanager
def _progress(arm: Arm) -> Iterator[Advance]:
  """Yields what a run calls; a bar goes to a terminal."""
  device = jax.devices()[0].device_kind
  print(f"{arm.name}: compiling for {device}", file=sys.stderr, flush=True)
  with progress_bar(transient=True, redirect_stdout=False) as bar:
    task = bar.add_task(arm.name, total=arm.train.num_steps)
    yield lambda steps: bar.update(task, completed=steps)

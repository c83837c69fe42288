"""Choices made by measurement: arms of one training run, side by side.

`python -m d2sd_jax.training.ablation --config=configs/ablation_smollm2.py`

Every arm trains on the same batches and is then judged by decoding held-out
prompts: α, and the difference to its group's baseline, prompt by prompt. Target
and corpus are loaded once. A finished arm is written at once, its drafter
beside the results, so the same command goes on where it was stopped.
"""

import collections
import contextlib
import dataclasses
import fnmatch
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from d2sd_jax import cli
from d2sd_jax.config import TrainConfig
from d2sd_jax.decoding.report import versions
from d2sd_jax.decoding.session import Request, Session
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
from d2sd_jax.io.paths import check_output, find_checkpoint
from d2sd_jax.models.target import LlamaTarget
from d2sd_jax.progress import progress_bar
from d2sd_jax.sampling import Sampling
from d2sd_jax.sharding import make_mesh, shard_batch, shard_weights
from d2sd_jax.training.ablation_config import (
  ARM,
  AblationConfig,
  Arm,
  check_arms,
  load_base,
  make_arms,
)
from d2sd_jax.training.ablation_results import (
  PROGRAM,
  changes,
  make_meta,
  make_settings,
  resume,
  write_results,
)
from d2sd_jax.training.data import Batches, Records, make_dataset
from d2sd_jax.training.run import (
  evaluate,
  init_drafter,
  read_data,
  trained_drafter,
)
from d2sd_jax.training.step import init_train_state, train_step

# The final loss is the mean over this many last steps: one batch is noisy.
_LAST_STEPS = 20
# Called with the steps made so far.
Advance = Callable[[int], None]
EXAMPLES = f"""\
  python -m {PROGRAM} --config=configs/ablation_smollm2.py
  python -m {PROGRAM} --config=configs/ablation_smollm2.py --list
  python -m {PROGRAM} --config=configs/ablation_smollm2.py --minutes=9 \\
      --arms='layers_*,exponential' --config.overrides.num_steps=300
"""


def flag_parser() -> cli.FlagParser:
  """All flags of this script."""
  parser = cli.FlagParser(f"-m {PROGRAM}", str(__doc__), EXAMPLES)
  add = parser.add_argument
  add(
    "--config",
    metavar="FILE",
    default="ablation_smollm2",
    help="a Python file with get_config(), or a shipped name (default"
    " ablation_smollm2); --config.KEY=VALUE overrides any key",
  )
  add(
    "--arms",
    metavar="GLOB,..",
    default="*",
    help="which arms, as 'layers_*,vp_warm' (default all); baselines and"
    " arms whose drafters they need come along",
  )
  add("--list", action="store_true", help="print the arms, no more")
  add(
    "--minutes",
    type=cli.number,
    metavar="N",
    help="begin no arm after so long; the same command goes on later",
  )
  add("--out", metavar="FILE", help="results; default is the config's")
  return parser


def main(arguments: Sequence[str]) -> None:
  """Everything the script does."""
  # Parse and check.
  started = time.monotonic()
  flags, overrides = flag_parser().parse(arguments)
  if flags.out is not None:
    overrides["out"] = flags.out
  config = cli.load_config(AblationConfig, flags.config, overrides)
  base = load_base(config)
  arms = make_arms(config, base)
  wanted = _choose(arms, flags.arms, config.groups)
  if flags.list:
    print("\n".join(_describe(name, arms, base) for name in wanted))
    return
  check_arms(arms, base)
  out = check_output(config.out, "out")
  # The tables lie beside it under another suffix.
  require(out.suffix == ".json", "out", config.out, "a name that ends in .json")

  # What is there already, and what is missing.
  settings = {name: make_settings(arm, base) for name, arm in arms.items()}
  results = resume(out, make_meta(config, base), settings)
  done = {row["arm"]: row for row in results["rows"]}
  left = [arms[name] for name in wanted if name not in done]
  folder = out.with_suffix("")
  for name in {name for arm in left for name in arm.needs} & done.keys():
    _check_export(folder / name, done[name])
  if not left:
    print(f"{out} has all of these arms")
    return

  # Load, train, decode, write.
  cli.setup_jax_cache()
  lab = set_up(config, base, arms, folder)
  for i, arm in enumerate(left):
    if flags.minutes and time.monotonic() - started > 60 * flags.minutes:
      print(f"{len(left) - i} arms are left", file=sys.stderr, flush=True)
      break
    row = {**measure_arm(lab, arm, done), "settings": settings[arm.name]}
    done[arm.name] = row
    results["rows"].append(row)
    write_results(out, results, config.groups)
    print(_line(row), flush=True)
  print(f"{out} and {out.with_suffix('.md')} are written")


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
  config, mesh = arm.train, make_mesh(None)
  if config.init_from is not None:
    start = str(lab.drafter_folder(config.init_from))
    config = dataclasses.replace(config, init_from=start)
  drafter = init_drafter(config, lab.target.config)
  graphdef, state = init_train_state(drafter, config)
  state = shard_weights(mesh, state)
  batch = lambda step: shard_batch(mesh, lab.dataset[step])
  update = train_step.lower(
    graphdef, state, lab.target, batch(0), config=config, mesh=mesh
  ).compile()

  losses: collections.deque = collections.deque(maxlen=_LAST_STEPS)
  with cli.patient_interrupt() as stop_if_interrupted:
    for step in range(config.num_steps):
      state, metrics = update(state, lab.target, batch(step))
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


def _choose(
  arms: Mapping[str, Arm], globs: str, groups: Mapping[str, Sequence[str]]
) -> list[str]:
  """The arms that a glob fits, and those they need or are compared with."""
  chosen: list[str] = []
  for glob in globs.split(","):
    fitting = fnmatch.filter(arms, glob)
    require(bool(fitting), "arms", glob, f"a glob of {', '.join(arms)}")
    chosen += fitting
  baselines = {m[0] for m in groups.values() if {*m} & {*chosen}}
  todo, found = [*chosen, *baselines], set()
  while todo:
    name = todo.pop()
    found.add(name)
    todo += arms[name].needs
  return [name for name in arms if name in found]


def _describe(name: str, arms: Mapping[str, Arm], base: TrainConfig) -> str:
  """An arm in words."""
  arm = arms[name]
  told, start = changes(arm, base), "base"
  if not arm.is_trained:
    start, tree = arm.trained_as, vars(arms[arm.trained_as].tree)
    told = {k: v for k, v in vars(arm.tree).items() if v != tree[k]}
  said = [f"{k}={v!r}" for k, v in told.items()]
  return f"{name}: {', '.join([start, *said])}"


def _check_export(folder: Path, row: Row) -> None:
  """Raises `UsageError` unless an arm's drafter is there as it was measured."""
  weights = folder / WEIGHTS_FILE
  found = file_sha256(weights) if weights.is_file() else None
  expected = f"{row['weights_sha256']}, as in the results"
  require(found == row["weights_sha256"], f"{weights} sha256", found, expected)


@contextlib.contextmanager
def _progress(arm: Arm) -> Iterator[Advance]:
  """Yields what a run calls; a bar goes to a terminal."""
  device = jax.devices()[0].device_kind
  print(f"{arm.name}: compiling for {device}", file=sys.stderr, flush=True)
  with progress_bar(transient=True, redirect_stdout=False) as bar:
    task = bar.add_task(arm.name, total=arm.train.num_steps)
    yield lambda steps: bar.update(task, completed=steps)


def _line(row: Row) -> str:
  """A row in words."""
  shown = lambda key: "-" if row[key] is None else f"{row[key]:.3f}"
  low, high = row["ci95_cut"]
  return (
    f"{row['arm']}: α {shown('alpha_cut')} [{low}, {high}]"
    f" ({shown('alpha')} over all tokens), simulated {shown('heldout_alpha')},"
    f" loss {shown('loss')}, {shown('ms_per_step')} ms per step"
  )


if __name__ == "__main__":
  cli.exit_with(cli.run(main))

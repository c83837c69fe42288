"""Choices made by measurement: arms of one training run, side by side.

`python -m d2sd_jax.training.ablation --config=configs/ablation_smollm2.py`

Every arm trains on the same batches and is then judged by decoding held-out
prompts: α, and the difference to its group's baseline, prompt by prompt. Target
and corpus are loaded once. A finished arm is written at once, its drafter
beside the results, so the same command goes on where it was stopped.
"""

import fnmatch
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from d2sd_jax import cli
from d2sd_jax.errors import require
from d2sd_jax.eval.results_file import Row
from d2sd_jax.io.drafter_format import WEIGHTS_FILE
from d2sd_jax.io.models import file_sha256
from d2sd_jax.io.paths import check_output
from d2sd_jax.training.ablation_arms import measure_arm, set_up
from d2sd_jax.training.ablation_config import (
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
from d2sd_jax.training.train_config import TrainConfig

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
    type=cli.positive_number,
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
  _check_exports(folder, left, done)
  if not left:
    write_results(out, results, config.groups)  # They may be new ones.
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


def _check_exports(
  folder: Path, left: Sequence[Arm], done: Mapping[str, Row]
) -> None:
  """What arms need is there as it was measured; what they write is free.

  Raises:
    UsageError: a drafter is missing or another one, or a folder that an arm
      would write into holds something else.
  """
  weights = lambda name: folder / name / WEIGHTS_FILE
  for name in {name for arm in left for name in arm.needs} & done.keys():
    path, expected = weights(name), done[name]["weights_sha256"]
    found = file_sha256(path) if path.is_file() else None
    told = f"{expected}, as in the results"
    require(found == expected, f"{path} sha256", found, told)
  for arm in left:
    # A run that was stopped may have left the drafter of its last arm.
    free = not (folder / arm.name).exists() or weights(arm.name).is_file()
    place = str(folder / arm.name)
    require(free, "out", place, "a folder that is free, or a drafter's")


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

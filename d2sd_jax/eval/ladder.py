"""What each idea of the method is worth: every policy on every task.

`python -m d2sd_jax.eval.ladder --config=configs/ladder_smollm2.py`

α is measured in batches, wall-clock at batch 1 beside `ar` in the same
process, and every answer is compared with `ar`'s. Each finished row is written
at once, so the same command goes on where it was stopped, and other sets,
policies, temperatures or dtypes add rows to the same file.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from rich.progress import MofNCompleteColumn, TimeElapsedColumn

from d2sd_jax import cli
from d2sd_jax.config import DTYPES, MODES
from d2sd_jax.decoding.plan import Plan, make_plan
from d2sd_jax.decoding.report import versions
from d2sd_jax.errors import require
from d2sd_jax.eval.bench import (
  Bench,
  Cell,
  LadderConfig,
  measure_policy,
  set_up,
)
from d2sd_jax.eval.measure import Measured, make_row
from d2sd_jax.eval.prompts import PROMPT_SETS
from d2sd_jax.eval.results import resume, row_key, write_results
from d2sd_jax.eval.tasks import load_task_prompts, prompt_sha256
from d2sd_jax.io.drafter_format import WEIGHTS_FILE
from d2sd_jax.io.models import file_sha256, target_sha256
from d2sd_jax.io.paths import check_output
from d2sd_jax.progress import progress_bar

_T = TypeVar("_T")
EXAMPLES = """\
  python -m d2sd_jax.eval.ladder --config=configs/ladder_smollm2.py
  python -m d2sd_jax.eval.ladder --sets=gsm8k --policies=ar,d2sd \\
      --temperatures=0 --out=row.json
"""


def flag_parser() -> cli.FlagParser:
  """All flags of this script."""
  parser = cli.FlagParser(
    "-m d2sd_jax.eval.ladder",
    "Measures every policy on the evaluation sets.",
    EXAMPLES,
  )
  parser.add_argument(
    "--config",
    metavar="FILE",
    default="ladder_smollm2",
    help="a Python file with get_config(), or a shipped name (default"
    " ladder_smollm2); the flags below, and --config.KEY=VALUE for any key,"
    " override it",
  )
  for name, kind, shown, text in (
    ("sets", _list_of(str), "A,B", ", ".join(PROMPT_SETS)),
    ("policies", _list_of(str), "A,B", ", ".join(MODES)),
    ("temperatures", _list_of(cli.number), "T,T", "default 0,1"),
    ("num_prompts", cli.whole_number, "N", "of each set (default 40)"),
    ("max_new_tokens", cli.whole_number, "N", "default 256"),
    ("batch_size", cli.whole_number, "N", "rows together, for α (default 40)"),
    ("timing_prompts", cli.whole_number, "N", "timed one by one (default 10)"),
    ("dtype", str, "|".join(DTYPES), "default float32 on a CPU, else bfloat16"),
    ("target", str, "PATH", "a GGUF file, its folder or a name"),
    ("drafter", str, "PATH", "drafter 1: a folder or a shipped name"),
    ("vp_drafter", str, "PATH", "drafter 2: a folder or a shipped name"),
    ("out", str, "FILE", "results, with a table beside them"),
  ):
    parser.add_argument(f"--{name}", type=kind, metavar=shown, help=text)
  return parser


def main(arguments: Sequence[str]) -> None:
  """Everything the script does."""
  # Parse and check.
  flags, overrides = flag_parser().parse(arguments)
  given = {k: v for k, v in vars(flags).items() if v is not None}
  name = given.pop("config")
  config = cli.load_config(LadderConfig, name, {**overrides, **given})
  plan = make_plan(config.decode_config("d2sd"))
  for policy in config.policies:
    config.trees(policy)
  out = check_output(config.out, "out")
  # The table lies beside it under another suffix.
  require(out.suffix == ".json", "out", config.out, "a name that ends in .json")
  if out.exists():
    resume(out, {})

  # What is there already, and what is missing.
  prompts = {
    name: load_task_prompts(name, config.num_prompts) for name in config.sets
  }
  results = resume(out, _meta(config, plan, prompts))
  dtype = plan.config.dtype or "float32"
  done = {row_key(row) for row in results["rows"]}
  missing = {
    policy: [
      (name, temperature)
      for temperature in config.temperatures
      for name in config.sets
      if (name, policy, temperature, dtype) not in done
    ]
    for policy in config.policies
  }
  total = sum(map(len, missing.values()))
  if not total:
    print(f"{out} has all of these rows")
    return

  # Load, measure, write.
  cli.setup_jax_cache()
  needed = {name for cells in missing.values() for name, _ in cells}
  some = {name: prompts[name] for name in config.sets if name in needed}
  bench = set_up(config, plan, some)
  with _progress(total) as advance:
    for row in _rows(bench, missing):
      results["rows"].append(row)
      write_results(out, results)
      advance(row)
  print(f"{out} and {out.with_suffix('.md')} are written")


def _rows(
  bench: Bench, missing: Mapping[str, Sequence[Cell]]
) -> Iterator[dict[str, Any]]:
  """The rows that are missing; `ar` is always run, to compare with."""
  cells = list(dict.fromkeys(c for some in missing.values() for c in some))
  todo = {"ar": cells, **{p: c for p, c in missing.items() if p != "ar"}}
  reference: dict[Cell, Measured] = {}
  for policy, some in todo.items():
    if some:
      device = jax.devices()[0].device_kind
      print(f"compiling {policy} for {device}", file=sys.stderr, flush=True)
    for cell, measured in measure_policy(bench, policy, some) if some else ():
      reference.setdefault(cell, measured)
      if cell in missing.get(policy, ()):
        yield _row(bench, policy, cell, measured, reference[cell])


def _row(
  bench: Bench,
  policy: str,
  cell: Cell,
  measured: Measured,
  reference: Measured,
) -> dict[str, Any]:
  """One row; see `make_row`."""
  name, temperature = cell
  row = make_row(
    bench.tasks[name],
    policy,
    temperature,
    bench.dtype,
    measured,
    reference,
    bench.margin(temperature),
  )
  return {**row, "timing_prompts": bench.config.timing_prompts}


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
  """Yields `advance(row)`, which prints it; a bar goes to a terminal."""
  columns = MofNCompleteColumn(), TimeElapsedColumn()
  with progress_bar(*columns, transient=True, redirect_stdout=False) as bar:
    task = bar.add_task("rows", total=total)

    def advance(row: dict[str, Any]) -> None:
      print(_line(row), flush=True)
      bar.advance(task)

    yield advance


def _line(row: Mapping[str, Any]) -> str:
  """A row in words."""
  shown = lambda key: "-" if row[key] is None else f"{row[key]:.2f}"
  same = "identical" if row["identical"] else f"{len(row['ties'])} ties"
  if row["differences"]:
    same += f", {len(row['differences'])} other differences"
  return (
    f"{row['set']} {row['policy']} T={row['temperature']:g} {row['dtype']}:"
    f" α {shown('alpha_cut')} ({shown('alpha')} over all tokens),"
    f" {shown('nodes')} nodes, {shown('ms_per_token')} ms per token,"
    f" speed-up {shown('speedup')}, {same}"
  )


def _meta(
  config: LadderConfig,
  plan: Plan,
  prompts: Mapping[str, Sequence[Mapping[str, str]]],
) -> dict[str, Any]:
  """What all rows of one file have in common."""
  tree = plan.trees["d2sd"]
  same = ("num_prompts", "max_new_tokens", "seed")
  return {
    "target": {"name": config.target, "sha256": target_sha256(config.target)},
    **{
      role: {"sha256": file_sha256(folder / WEIGHTS_FILE)}
      for role, folder in zip(
        ("drafter", "vp_drafter"), plan.drafters, strict=True
      )
    },
    "settings": {
      **{field: getattr(config, field) for field in same},
      **dataclasses.asdict(tree),
    },
    "device": jax.devices()[0].device_kind,
    "versions": versions(),
    "prompts": {
      name: {p["id"]: prompt_sha256(p) for p in some}
      for name, some in prompts.items()
    },
  }


def _list_of(kind: Callable[[str], _T]) -> Callable[[str], tuple[_T, ...]]:
  """Type of a flag that takes several values, with commas between them."""

  def parse(text: str) -> tuple[_T, ...]:
    return tuple(kind(part) for part in text.split(",") if part)

  return parse


if __name__ == "__main__":
  cli.exit_with(cli.run(main))

"""Times a decode cycle and its pieces, each figure beside its floor.

One process measures the device's own rates first, then every row that is
wanted and is not in the results file yet: random weights, random data, device
time of a step inside one loop. Each row is written as soon as it is there, so
that a long grid can be measured in parts.
"""

import dataclasses
import fnmatch
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from d2sd_jax import cli
from d2sd_jax.bench.config import BenchConfig
from d2sd_jax.bench.floors import Rates, Work
from d2sd_jax.bench.models import random_models
from d2sd_jax.bench.pieces import Piece, pieces
from d2sd_jax.bench.rates import measure_rates
from d2sd_jax.bench.results import Results, print_table
from d2sd_jax.decoding.report import versions
from d2sd_jax.decoding.state import Models
from d2sd_jax.errors import require
from d2sd_jax.io.paths import check_output
from d2sd_jax.kernels.cascade_attention import bench as op
from d2sd_jax.timing import time_step

PROGRAM = "-m d2sd_jax.bench"
EXAMPLES = f"""\
  python {PROGRAM} --config=configs/bench_qwen3_8b.py
  python {PROGRAM} --config=configs/bench_qwen3_8b.py --list
  python {PROGRAM} --config=configs/bench_qwen3_8b.py --minutes=9 \\
      --rows='*/1x1024,op/*'
  python {PROGRAM} --config=configs/bench_qwen3_8b.py --drafter_weights=int8 \\
      --rows='draft*/1x1024,ar/1x1024,cycle/1x1024'
"""


def flag_parser() -> cli.FlagParser:
  """All flags of this script."""
  parser = cli.FlagParser(PROGRAM, str(__doc__), EXAMPLES)
  add = parser.add_argument
  add(
    "--config",
    metavar="FILE",
    default="bench_qwen3_8b",
    help="a Python file with get_config(), or a shipped name (default"
    " bench_qwen3_8b); --config.KEY=VALUE overrides any key",
  )
  add(
    "--rows",
    metavar="GLOB,..",
    default="*",
    help="which rows, as '*/1x1024,op/*' (default all)",
  )
  add("--list", action="store_true", help="print the rows' names, no more")
  add("--again", action="store_true", help="measure also what is there already")
  add(
    "--minutes",
    type=cli.number,
    metavar="N",
    help="begin no row after so long; the same command goes on later",
  )
  add("--drafter_weights", metavar="bfloat16|int8", help="default bfloat16")
  add("--out", metavar="FILE", help="results; default is the config's")
  return parser


def main(arguments: Sequence[str]) -> None:
  """Everything the script does."""
  started = time.monotonic()
  flags, overrides = flag_parser().parse(arguments)
  for name in ("drafter_weights", "out"):
    if getattr(flags, name) is not None:
      overrides[name] = getattr(flags, name)
  config = cli.load_config(BenchConfig, flags.config, overrides)
  grid, shapes = pieces(config), _op_rows(config)
  wanted = _choose([*grid, *shapes], flags.rows)
  if flags.list:
    print("\n".join(wanted))
    return
  results = Results.open(check_output(config.out, "out"), _identity(config))
  left = [n for n in wanted if flags.again or n not in results.done]

  cli.setup_jax_cache()
  rates = measure_rates(config, results)
  bench = _Bench(config, grid, shapes, rates)
  for i, name in enumerate(left):
    if flags.minutes and time.monotonic() - started > 60 * flags.minutes:
      print(f"{len(left) - i} rows are left", file=sys.stderr, flush=True)
      break
    print(f"[{i + 1}/{len(left)}] {name}", file=sys.stderr, flush=True)
    results.add(name, bench.row(name))
  print_table(results)


def _identity(config: BenchConfig) -> dict[str, Any]:
  """What must be equal for a row to be the same measurement."""
  sizes = dataclasses.asdict(config)
  for field in ("batches", "caches", "verify_nodes", "grid_nodes", "out"):
    del sizes[field]
  for field in ("op_shapes", "op_implementations"):
    del sizes[field]
  return {
    "device": jax.devices()[0].device_kind,
    "versions": versions(),
    "config": {**sizes, "dtype": config.dtype_name},
  }


def _choose(names: Sequence[str], globs: str) -> list[str]:
  """The rows that one of the globs fits, in the order of the grid."""
  chosen = set()
  for glob in globs.split(","):
    fitting = fnmatch.filter(names, glob)
    require(bool(fitting), "rows", glob, f"a glob of {', '.join(names)}")
    chosen |= set(fitting)
  return [name for name in names if name in chosen]


def _op_rows(config: BenchConfig) -> dict[str, tuple[op.Shape, str]]:
  """Shape and implementation of every row of the op alone."""
  rows = {}
  for text in config.op_shapes:
    (shape,) = op.parse_shapes(
      text,
      kv_heads=config.num_kv_heads,
      group=config.num_heads // config.num_kv_heads,
      head_size=config.head_dim,
    )
    for name in config.op_implementations:
      rows[f"op/{text}/{name}"] = (shape, name)
  return rows


class _Bench:
  """Measures rows; the models are drawn when the first row needs them."""

  def __init__(
    self,
    config: BenchConfig,
    grid: Mapping[str, Callable[[Models], Piece]],
    shapes: Mapping[str, tuple[op.Shape, str]],
    rates: Rates,
  ):
    self._config, self._grid, self._shapes = config, grid, shapes
    self._rates = rates
    self._models: Models | None = None

  def row(self, name: str) -> dict[str, Any]:
    """A row's figures, or why there are none."""
    try:
      measured = self._piece(name) if name in self._grid else self._op(name)
    except Exception as error:  # A row says why; others go on.
      measured = {"failed": cli.one_line(error)}
    gc.collect()
    return {**measured, "rates": dataclasses.asdict(self._rates)}

  def _piece(self, name: str) -> dict[str, Any]:
    if self._models is None:
      self._models = random_models(self._config)
    piece = self._grid[name](self._models)
    timing = time_step(
      *(piece.step, piece.models, piece.carry, piece.inputs),
      repeats=self._config.repeats,
      seconds=self._config.seconds,
    )
    timing.check_ran(piece.implementations)
    return {
      **timing.record(),
      **self._floor(piece.works),
      "implementations": dict(piece.implementations),
    }

  def _op(self, name: str) -> dict[str, Any]:
    shape, implementation = self._shapes[name]
    config = self._config
    measured = op.measure(
      op.implementation(implementation),
      shape,
      jnp.dtype(config.dtype_name),
      config.repeats,
      config.seconds,
    )
    size = jnp.dtype(config.dtype_name).itemsize
    spread = ("median", "least", "most")
    return {
      **{f"{k}_ms": measured[f"{k}_us"] / 1e3 for k in spread},
      "repeats": config.repeats,
      "sets": measured["sets"],
      "max_error": measured["max_error"],
      **self._floor([Work(shape.bytes(size), shape.flops())]),
      "implementations": {"op": implementation},
    }

  def _floor(self, works: Sequence[Work]) -> dict[str, Any]:
    return {
      "floor_ms": sum(work.milliseconds(self._rates) for work in works),
      "bound": [work.bound(self._rates) for work in works],
      "bytes": sum(work.bytes for work in works),
      "flops": sum(work.flops for work in works),
    }


if __name__ == "__main__":
  cli.exit_with(cli.run(main))

"""Times a decode cycle and its pieces, each figure beside its floor.

One process measures the device's own rates first, then every row that is
wanted and is not in the results file yet: random weights, random data, device
time of a step inside one loop. Each row is written as soon as it is there, so
that a long grid can be measured in parts; if one failed, the exit status is 1.
On a mesh (`--mesh`) floors are those of one device, and what the devices
exchange, as measured by itself, is added.
"""

import dataclasses
import fnmatch
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from d2sd_jax import cli
from d2sd_jax.bench.cell import Piece
from d2sd_jax.bench.collectives import Message, message_timing
from d2sd_jax.bench.config import BenchConfig
from d2sd_jax.bench.floors import Rates, Work
from d2sd_jax.bench.models import random_models
from d2sd_jax.bench.pieces import collective_rows, pieces
from d2sd_jax.bench.rates import measure_rates
from d2sd_jax.bench.results import Results, print_table
from d2sd_jax.decoding.report import versions
from d2sd_jax.decoding.state import Models
from d2sd_jax.errors import require
from d2sd_jax.io.paths import check_output
from d2sd_jax.kernels.cascade_attention import bench as op
from d2sd_jax.kernels.device import compiler_options
from d2sd_jax.sharding import DECODING_AXES, TENSOR, make_mesh
from d2sd_jax.tensor_parallel import Share
from d2sd_jax.timing import Timing, time_step

PROGRAM = "-m d2sd_jax.bench"
EXAMPLES = f"""\
  python {PROGRAM} --config=configs/bench_qwen3_8b.py
  python {PROGRAM} --config=configs/bench_qwen3_8b.py --list
  python {PROGRAM} --config=configs/bench_qwen3_8b.py --minutes=9 \\
      --rows='*/1x1024,op/*'
  python {PROGRAM} --config=configs/bench_qwen3_8b.py --drafter_weights=int8 \\
      --rows='draft*/1x1024,ar/1x1024,cycle/1x1024'
  python {PROGRAM} --config=configs/bench_qwen3_32b.py --mesh=tensor:4
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
    type=cli.positive_number,
    metavar="N",
    help="begin no row after so long; the same command goes on later",
  )
  add("--drafter_weights", metavar="bfloat16|int8", help="default bfloat16")
  add(
    "--mesh",
    metavar="tensor:N",
    help="devices that share the models, or 'data:M,tensor:N' (default one)",
  )
  add(
    "--shard_drafters",
    action="store_const",
    const=True,
    help="they share the drafters too; by default each has both",
  )
  add("--out", metavar="FILE", help="results; default is the config's")
  return parser


def main(arguments: Sequence[str]) -> None:
  """Everything the script does."""
  started = time.monotonic()
  flags, overrides = flag_parser().parse(arguments)
  for name in ("drafter_weights", "mesh", "shard_drafters", "out"):
    if getattr(flags, name) is not None:
      overrides[name] = getattr(flags, name)
  config = cli.load_config(BenchConfig, flags.config, overrides)
  plan = _Plan.of(config)
  wanted = _choose(plan.names, flags.rows)
  if flags.list:
    print("\n".join(wanted))
    return
  mesh = config.mesh and make_mesh(config.mesh, DECODING_AXES)
  results = Results.open(check_output(config.out, "out"), _identity(config))
  left = [n for n in wanted if flags.again or n not in results.done]

  cli.setup_jax_cache()
  rates = measure_rates(config, results)
  bench = _Bench(config, plan, rates, mesh or None, results)
  failed = []
  for i, name in enumerate(left):
    if flags.minutes and time.monotonic() - started > 60 * flags.minutes:
      print(f"{len(left) - i} rows are left", file=sys.stderr, flush=True)
      break
    print(f"[{i + 1}/{len(left)}] {name}", file=sys.stderr, flush=True)
    row = bench.row(name)
    results.add(name, row)
    if "failed" in row:
      failed.append(name)
  print_table(results)
  if failed:
    print(f"failed: {', '.join(failed)}", file=sys.stderr)
    sys.exit(1)


def _identity(config: BenchConfig) -> dict[str, Any]:
  """What must be equal for a row to be the same measurement."""
  sizes = dataclasses.asdict(config)
  for field in ("batches", "caches", "verify_nodes", "grid_nodes", "out"):
    del sizes[field]
  for field in ("op_shapes", "op_implementations"):
    del sizes[field]
  if config.mesh is None:
    del sizes["mesh"], sizes["shard_drafters"]
  else:
    axes = config.mesh_sizes.items()
    sizes["mesh"] = ",".join(f"{axis}:{size}" for axis, size in axes)
  options = compiler_options(one_device=config.mesh is None)
  return {
    "device": jax.devices()[0].device_kind,
    "versions": versions(),
    # Rows without it hold part of what a call costs beside its steps.
    "timing": "marginal",
    # They may choose other kernels, such as those of sums over devices.
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    **({"compiler_options": options} if options else {}),
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
  """Shape and implementation of every row of the op alone.

  On a mesh it has the heads of one device.
  """
  share = Share(config=config.target, part=0, size=config.mesh_sizes[TENSOR])
  rows = {}
  for text in config.op_shapes:
    (shape,) = op.parse_shapes(
      text,
      kv_heads=len(share.key_heads),
      group=len(share.heads) // len(share.key_heads),
      head_size=config.head_dim,
    )
    for name in config.op_implementations:
      rows[f"op/{text}/{name}"] = (shape, name)
  return rows


@dataclasses.dataclass(frozen=True)
class _Plan:
  """How each row is made, by its name.

  Attributes:
    grid: rows that run the models.
    exchanges: rows of what the devices of a mesh exchange, and nothing else.
    shapes: rows of the op alone.
  """

  grid: Mapping[str, Callable[[Models], Piece]]
  exchanges: Mapping[str, Callable[[Mesh], Piece]]
  shapes: Mapping[str, tuple[op.Shape, str]]

  @classmethod
  def of(cls, config: BenchConfig) -> "_Plan":
    return cls(pieces(config), collective_rows(config), _op_rows(config))

  @property
  def names(self) -> list[str]:
    return [*self.grid, *self.exchanges, *self.shapes]


class _Bench:
  """Measures rows; the models are drawn when the first row needs them."""

  def __init__(
    self,
    config: BenchConfig,
    plan: _Plan,
    rates: Rates,
    mesh: Mesh | None,
    results: Results,
  ):
    self._config, self._plan, self._rates = config, plan, rates
    self._mesh, self._results = mesh, results
    self._models: Models | None = None
    self._latencies: dict[Message, float] = {}

  def row(self, name: str) -> dict[str, Any]:
    """A row's figures, or why there are none."""
    try:
      measured = self._measured(name)
    except Exception as error:  # A row says why; others go on.
      measured = {"failed": cli.one_line(error)}
    gc.collect()
    return {**measured, "rates": dataclasses.asdict(self._rates)}

  def _measured(self, name: str) -> dict[str, Any]:
    if name in self._plan.shapes:
      return self._op(name)
    if self._mesh is not None and name in self._plan.exchanges:
      piece = self._plan.exchanges[name](self._mesh)
    else:
      if self._models is None:
        self._models = random_models(self._config, self._mesh)
      piece = self._plan.grid[name](self._models)
    timing = self._time(piece)
    return {
      **timing.record(),
      **self._floor(piece.works, piece.messages),
      "implementations": {use.name: use.implementation for use in piece.uses},
    }

  def _time(self, piece: Piece) -> Timing:
    timing = time_step(
      *(piece.step, piece.models, piece.carry, piece.inputs),
      repeats=self._config.repeats,
      seconds=self._config.seconds,
      mesh=self._mesh,
      specs=piece.specs,
    )
    timing.check_ran(piece.uses)
    return timing

  def _op(self, name: str) -> dict[str, Any]:
    shape, implementation = self._plan.shapes[name]
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
      **self._floor([Work(shape.bytes(size), shape.flops())], {}),
      "implementations": {"op": implementation},
    }

  def _floor(
    self, works: Sequence[Work], messages: Mapping[Message, int]
  ) -> dict[str, Any]:
    exchanged = {m.row: n for m, n in messages.items()}
    exchange = sum(n * self._latency(m) for m, n in messages.items())
    work = sum(work.milliseconds(self._rates) for work in works)
    more = {"collectives_ms": exchange, "messages": exchanged}
    return {
      "floor_ms": work + exchange,
      "bound": [work.bound(self._rates) for work in works],
      "bytes": sum(work.bytes for work in works),
      "flops": sum(work.flops for work in works),
      **(more if messages else {}),
    }

  def _latency(self, message: Message) -> float:
    """Milliseconds of one message, measured once a process, as a row."""
    if message not in self._latencies:
      if self._mesh is None:
        raise ValueError(f"a message on one device: {message}")
      timing = message_timing(self._config, self._mesh, message)
      kind = {"implementations": {"message": message.kind}}
      self._results.add(message.row, {**timing.record(), **kind})
      self._latencies[message] = timing.median
    return self._latencies[message]


if __name__ == "__main__":
  cli.exit_with(cli.run(main))

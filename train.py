"""Distills one drafter from a frozen target (Sec. 3.4).

    python train.py --config=configs/smollm2_dflash.py --workdir=runs/dflash
    python train.py --config=configs/smollm2_vp.py --workdir=runs/vp
    python train.py --config=configs/smollm2_dflash.py --workdir=runs/try \
        --config.num_steps=100 --config.batch_size=8

The work directory holds checkpoints of the whole state, `metrics.jsonl`, and
under `export/` the drafter as of the last checkpoint. Started again with the
same flags and data, a run that was stopped goes on exactly where that stood.
Ctrl-C stops it after the step under way, a second one at once.

`--config.mesh=data:8` trains on eight devices, and `docs/multihost.md` says how
on several hosts; the result does not depend on either.
"""

import contextlib
import functools
import io
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

if __name__ == "__main__":
  # JAX takes a second to import; an early Ctrl-C is to end as cleanly as any.
  signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import jax
from rich.console import Console

from d2sd_jax import cli, distributed
from d2sd_jax.errors import UsageError
from d2sd_jax.io.drafter_format import save_drafter
from d2sd_jax.io.models import load_target, load_tokenizer
from d2sd_jax.io.paths import atomic_write, user_path
from d2sd_jax.progress import progress_bar
from d2sd_jax.sharding import (
  local_rows,
  make_mesh,
  replicate,
  shard_batch,
  shard_weights,
)
from d2sd_jax.training.checkpoint import (
  DATA_FIELDS,
  Checkpointer,
  check_workdir,
  plain_config,
)
from d2sd_jax.training.data import make_dataset
from d2sd_jax.training.flops import step_flops
from d2sd_jax.training.optimizer import learning_rate_schedule
from d2sd_jax.training.run import (
  check_config,
  evaluate,
  init_drafter,
  load_first_drafter,
  read_data,
  trained_drafter,
)
from d2sd_jax.training.step import init_train_state, train_step
from d2sd_jax.training.train_config import TrainConfig


def check(config: TrainConfig, workdir: Path) -> None:
  """What can be known to be wrong before anything is fetched or loaded."""
  check_config(config)
  make_mesh(config.mesh)
  check_workdir(workdir, config)


def facts(config: TrainConfig, workdir: Path) -> dict[str, Any]:
  """What all processes of a run must share; data may lie anywhere."""
  told = plain_config(config) | {"workdir": str(workdir)}
  return {k: v for k, v in told.items() if k not in DATA_FIELDS}


def train(config: TrainConfig, workdir: Path) -> None:
  """The run, from data to export."""
  main = distributed.is_main()
  console = Console(stderr=True, quiet=not main)
  distributed.agree(
    functools.partial(check, config, workdir),
    lambda _: facts(config, workdir),
  )
  mesh = make_mesh(config.mesh)

  tokenizer = load_tokenizer(config.target)
  tokenizer.check_mask_token(config.mask_token_id)
  records, heldout = read_data(config, tokenizer)
  heldout = heldout[: config.eval_sequences]
  rows = local_rows(mesh, config.batch_size)
  dataset = make_dataset(records, config.batch_size, config.seed, rows)

  place_target = shard_weights if config.shard_target else replicate
  target = place_target(mesh, load_target(config.target, config.dtype))
  drafter = init_drafter(config, target.config)
  graphdef, state = init_train_state(drafter, config)
  state = shard_weights(mesh, state)
  first_drafter = load_first_drafter(config, target.config, mesh)
  checkpointer = Checkpointer(workdir, config)
  state = checkpointer.restore(state)
  first = int(state.step)
  schedule = learning_rate_schedule(config)
  flops = step_flops(config, target.config, drafter.config)
  console.print(
    f"{config.role}: step {first} of {config.num_steps}, {len(records)} "
    f"conversations; compiling for {mesh.size} x {jax.devices()[0].device_kind}"
  )
  batch = lambda step: shard_batch(mesh, dataset[step])
  arguments = state, target, batch(first), first_drafter
  update = train_step.lower(
    graphdef, *arguments, config=config, mesh=mesh
  ).compile()

  progress = progress_bar(console=console, hidden=not main)
  task = progress.add_task("training", total=config.num_steps, completed=first)
  log_file: TextIO = (
    open_metrics(workdir / "metrics.jsonl", first) if main else io.StringIO()
  )
  # Leaving early, after Ctrl-C say, waits for a checkpoint being written.
  with (
    contextlib.closing(checkpointer),
    cli.patient_interrupt() as stop_if_interrupted,
    progress,
    log_file as log,
    distributed.losing_one_ends_all(" to go on from the last checkpoint"),
  ):
    clock, since = time.perf_counter(), first
    for step in range(first + 1, config.num_steps + 1):
      state, metrics = update(state, target, batch(step - 1), first_drafter)
      last = step == config.num_steps
      line: dict[str, Any] = {}
      if step % config.log_every == 0 or last:
        line = summarize(metrics) | {"learning_rate": float(schedule(step - 1))}
        now = time.perf_counter()
        line |= speed((now - clock) / (step - since), flops)
        clock, since = now, step
        label = f"loss {line['loss']:.3f}"
        progress.update(task, completed=step, description=label)
      if step % config.eval_every == 0 or last:
        line |= evaluate(graphdef, state.params, target, heldout, config, mesh)
        clock, since = time.perf_counter(), step
        alpha = line["heldout_alpha"]
        console.print(f"step {step}: held-out α {alpha:.3f}")
      if line:
        log.write(json.dumps({"step": step} | line) + "\n")
        log.flush()
      if step % config.checkpoint_every == 0 or last:
        checkpointer.save(state)
        trained = trained_drafter(graphdef, state.params, mesh)
        if main:
          save_drafter(trained, workdir / "export")
      stop_if_interrupted()
  console.print(f"drafter written to {workdir / 'export'}")


def speed(seconds: float, flops: float) -> dict[str, float]:
  """Seconds of a step, and the model FLOP/s that makes."""
  tflops = round(flops / seconds / 1e12, 3)
  return {"seconds_per_step": seconds, "model_tflops_per_second": tflops}


def summarize(metrics: dict[str, jax.Array]) -> dict[str, Any]:
  """One step's metrics as plain numbers; waits for the device."""
  metrics = jax.device_get(metrics)
  return {
    "loss": float(metrics["loss"]),
    "grad_norm": float(metrics["grad_norm"]),
    "accuracy": [round(float(x), 4) for x in metrics["accuracy"]],
  }


def open_metrics(path: Path, step: int) -> TextIO:
  """The log, without lines later than the checkpoint the run goes on from.

  Raises:
    UsageError: a line is no line of metrics, with its number.
  """
  text = path.read_text("utf-8", "replace") if path.is_file() else ""
  lines, kept = text.splitlines(), []
  for number, line in enumerate(lines, 1):
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line)
    except (ValueError, TypeError, KeyError) as error:
      # A run that was killed may have left half a line, the last one.
      if number < len(lines):
        raise UsageError(
          f"{path}, line {number}: expected a line of metrics"
        ) from error
  with atomic_write(path) as temporary:
    temporary.write_text("".join(f"{line}\n" for line in kept), "utf-8")
  return path.open("a", encoding="utf-8")


EXAMPLES = """\
  python train.py --config=configs/smollm2_dflash.py --workdir=runs/dflash
  python train.py --config=configs/smollm2_vp.py --workdir=runs/vp
  python train.py --config=configs/smollm2_dflash.py --workdir=runs/try \\
      --config.num_steps=100 --config.batch_size=8
  python train.py --config=configs/smollm2_dflash.py --workdir=runs/mesh \\
      --config.mesh=data:4,fsdp:2
"""


def main(arguments: Sequence[str]) -> None:
  """Reads flags and config, then trains."""
  parser = cli.FlagParser(
    "train.py", "Distills one drafter from a frozen target.", EXAMPLES
  )
  parser.add_argument("--config", required=True, help="a file in configs/")
  parser.add_argument("--workdir", required=True, help="checkpoints, metrics")
  distributed.add_flags(parser)
  flags, overrides = parser.parse(arguments)
  distributed.start(flags)
  config = cli.load_config(TrainConfig, flags.config, overrides)
  cli.setup_jax_cache()
  train(config, user_path(flags.workdir))


if __name__ == "__main__":
  signal.signal(signal.SIGINT, signal.default_int_handler)
  cli.exit_with(cli.run(main))

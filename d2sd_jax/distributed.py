"""Several processes of one run: how they start, agree, and end together."""

import argparse
import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from d2sd_jax import cli
from d2sd_jax.errors import UsageError, require

# A process that has not been heard of for so long is given up by the others.
HEARTBEAT_SECONDS = 30
# Others that take longer to start are asked for aloud.
PATIENCE_SECONDS = 15
# Exit status of a process that lost another one.
LOST = 3
_T = TypeVar("_T")


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags `start` reads."""
  parser.add_argument(
    "--distributed",
    action="store_true",
    help="several processes, as Slurm, GKE or Cloud TPU tell",
  )
  parser.add_argument(
    "--coordinator_address", help="HOST:PORT of process 0, if told by flags"
  )
  for flag, told in (
    ("num_processes", "how many processes"),
    ("process_id", "which one this is, from 0"),
  ):
    parser.add_argument(f"--{flag}", type=cli.whole_number, help=told)


def start(flags: argparse.Namespace) -> None:
  """Joins the other processes; does nothing for a run of one.

  Must come before anything asks JAX for devices. Where the others do not come
  within five minutes, or two have one number, JAX itself ends the process.

  Raises:
    UsageError: the flags are not all there or do not fit, or the environment
      tells nothing.
  """
  told = {
    name: getattr(flags, name)
    for name in ("coordinator_address", "num_processes", "process_id")
  }
  given = [value is not None for value in told.values()]
  if not any(given):
    if not flags.distributed:
      return
  else:
    _check(told)
  patience = threading.Timer(PATIENCE_SECONDS, _say_what_is_missing, [told])
  patience.start()
  try:
    jax.distributed.initialize(
      **told, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )
  except (ValueError, RuntimeError) as error:
    if any(given):
      address = told["coordinator_address"]
      what = f"coordinator_address={address!r}: expected all processes there"
    else:
      what = "distributed=True: expected Slurm, GKE or Cloud TPU"
    raise UsageError(f"{what} ({cli.one_line(error)[:200]})") from error
  finally:
    patience.cancel()


def _say_what_is_missing(told: Mapping[str, Any]) -> None:
  """A line for whoever would sit before a silent terminal."""
  count, address = told["num_processes"], told["coordinator_address"]
  what = f"{count} processes at {address}" if address else "the other processes"
  print(f"still waiting for {what}", file=sys.stderr, flush=True)


def _check(told: Mapping[str, Any]) -> None:
  """Raises `UsageError` unless the three flags fit each other."""
  address, count, number = told.values()
  missing = [name for name, value in told.items() if value is None]
  others = ", ".join(name for name in told if name not in missing)
  if missing:
    raise UsageError(f"{missing[0]}=None: expected a value beside {others}")
  host, _, port = address.rpartition(":")
  fits = bool(host) and port.isdecimal() and len(port) <= 5
  fits = fits and 0 < int(port) < 2**16
  require(fits, "coordinator_address", address, "HOST:PORT")
  require(count >= 1, "num_processes", count, "1 or more")
  require(0 <= number < count, "process_id", number, f"0 to {count - 1}")


def is_main() -> bool:
  """Whether this process is the one that logs, prints and writes."""
  return jax.process_index() == 0


def agree(
  check: Callable[[], _T], facts: Callable[[_T], Mapping[str, Any]]
) -> _T:
  """Runs a check in all processes, and compares what they are about to do.

  Args:
    check: raises `UsageError`.
    facts: of what the check returned, JSON values by name that must be the
      same in all processes; asked for only if there are several.

  Returns:
    What the check returned.

  Raises:
    UsageError: in every process, if one made a mistake or facts differ.
  """
  if jax.process_count() == 1:
    return check()
  mistake: Exception | None = None
  mine: dict[str, Any] = {}
  found: Any = None
  try:
    found = check()
    mine = {"facts": dict(facts(found))}
  except (UsageError, OSError) as error:
    mistake, mine = error, {"mistake": cli.one_line(error)}
  told = _difference(_exchange(mine))
  if mistake is not None or told:
    # Or the first to leave would look to the others like one that died.
    jax.distributed.shutdown()
    raise mistake or UsageError(told)
  return found


def _difference(everyone: list[dict[str, Any]]) -> str:
  """What is wrong with the first process that is not like process 0."""
  for number, theirs in enumerate(everyone):
    if "mistake" in theirs:
      return f"process {number}: {theirs['mistake']}"
  first = everyone[0]["facts"]
  for number, theirs in enumerate(everyone):
    for key in sorted(first.keys() | theirs["facts"].keys()):
      found, expected = theirs["facts"].get(key), first.get(key)
      if found != expected:
        return (
          f"process {number} has {key}={found!r}: expected {expected!r} as in"
          " process 0"
        )
  return ""


def _exchange(mine: dict[str, Any]) -> list[dict[str, Any]]:
  """What every process has to say, in their order."""
  text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
  sizes = np.asarray(multihost_utils.process_allgather(np.int32(text.size)))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: text.size] = text
  texts = np.asarray(multihost_utils.process_allgather(padded))
  rows = zip(texts, sizes, strict=True)
  return [json.loads(row[:size].tobytes()) for row, size in rows]


@contextlib.contextmanager
def only_main_speaks() -> Iterator[None]:
  """Within the block, other processes print nothing."""
  with contextlib.ExitStack() as stack:
    if not is_main():
      nowhere = stack.enter_context(Path(os.devnull).open("w"))
      stack.enter_context(contextlib.redirect_stdout(nowhere))
      stack.enter_context(contextlib.redirect_stderr(nowhere))
    yield


@contextlib.contextmanager
def losing_one_ends_all(then: str = "") -> Iterator[None]:
  """Within the block, a process that lost another says so and ends at once.

  Nothing is waited for: a checkpoint under way can no longer become whole,
  and one that is not whole does not count.

  Args:
    then: what starting all again does, to end the sentence with.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
      raise
    print(
      f"error: process {jax.process_index()} lost another one; start all"
      f" again{then} ({cli.one_line(error)[:200]})",
      file=sys.stderr,
      flush=True,
    )
    os._exit(LOST)

"""What the command-line scripts share: flags, configs, errors, exit status.

A script defines `main(arguments)` and ends with

    if __name__ == "__main__":
      cli.exit_with(cli.run(main))

Every mistake of the user's is a `UsageError` wherever it is found, and `run`
alone turns it into one line on standard error and status 2.
"""

import argparse
import ast
import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn, TypeVar

import jax
from ml_collections import ConfigDict

from d2sd_jax import __version__
from d2sd_jax.config import from_mapping
from d2sd_jax.errors import UsageError
from d2sd_jax.io.paths import cache_dir, find_config

OK, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 2, 130, 141
_OVERRIDE = "--config."
_T = TypeVar("_T")


class FlagParser(argparse.ArgumentParser):
  """argparse, strict: no abbreviations, and a mistake is a `UsageError`.

  A script with a `--config` flag takes `--config.KEY=VALUE` too; see `parse`.
  """

  def __init__(self, program: str, description: str, examples: str):
    """A parser with `--help` and `--version`.

    Args:
      program: name of the script.
      description: what it does, for the help.
      examples: commands to be copied, for the help.
    """
    super().__init__(
      prog=program,
      usage=f"python {program} [--flag=value ...]",
      description=description,
      epilog=f"examples:\n{examples}",
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    version = f"d2sd_jax {__version__}"
    self.add_argument("--version", action="version", version=version)

  def format_help(self) -> str:
    """The help; argparse knows nothing of `--config.KEY`."""
    text = super().format_help()
    shown = "[--flag=value ...]"
    more = f"{shown} [{_OVERRIDE}KEY=VALUE ...]"
    return text.replace(shown, more, 1) if self._has_config() else text

  def _has_config(self) -> bool:
    return "--config" in self._option_string_actions

  def error(self, message: str) -> NoReturn:
    """Raises `UsageError`, where argparse would print its usage and exit."""
    raise UsageError(message.removeprefix("argument "))

  def parse(
    self, arguments: Sequence[str]
  ) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Flags, and the overrides of the config by key.

    Args:
      arguments: of the command line, without the script's name.

    Returns:
      The flags, and what each `--config.KEY=VALUE` says, as Python values.

    Raises:
      UsageError: a flag is unknown, lacks its value or has one of a wrong type.
    """
    plain: list[str] = list(arguments)
    overrides: dict[str, Any] = {}
    if self._has_config():
      plain, overrides = _split_overrides(arguments)
    flags, left = self.parse_known_args(plain)
    if left:
      known = sorted(s for s in self._option_string_actions if s[:2] == "--")
      known += [f"{_OVERRIDE}KEY"] if self._has_config() else []
      kind = "unknown flag" if left[0].startswith("-") else "stray argument"
      raise UsageError(
        f"{kind} {left[0]!r}: expected one of {', '.join(known)}"
      )
    return flags, overrides


def whole_number(text: str) -> int:
  """Type of a flag that takes an integer."""
  try:
    return int(text)
  except ValueError:
    raise _type_error(text, "a whole number") from None


def number(text: str) -> float:
  """Type of a flag that takes a real number."""
  try:
    return float(text)
  except ValueError:
    raise _type_error(text, "a number") from None


def positive_number(text: str) -> float:
  """Type of a flag that takes a real number above 0."""
  value = number(text)
  if not value > 0:
    raise _type_error(text, "a number above 0")
  return value


def load_config(
  cls: type[_T], name: str, overrides: Mapping[str, Any] | None = None
) -> _T:
  """Runs a config file and builds the config it describes.

  Args:
    cls: the config dataclass, e.g. `DecodeConfig`.
    name: a Python file with `get_config()`, or the name of a shipped one.
    overrides: values that replace the file's; `OUTER.INNER` replaces a
      single entry of a mapping.

  Raises:
    UsageError: there is no such file, it fails, it has no `get_config`, or its
      result has an unknown key or a bad value.
  """
  path = find_config(name)
  # Not an import: that would leave compiled files beside the user's.
  module: dict[str, Any] = {"__name__": "config", "__file__": str(path)}
  expected = "expected a Python file whose get_config() returns a ConfigDict"
  try:
    exec(compile(path.read_bytes(), path, "exec"), module)
    if not callable(module.get("get_config")):
      raise UsageError(f"config={name!r}: no get_config in {path}; {expected}")
    found = module["get_config"]()
    values = found.to_dict() if isinstance(found, ConfigDict) else dict(found)
  except UsageError:
    raise
  except (Exception, SystemExit) as error:
    problem = f"{type(error).__name__}: {one_line(error)}"
    raise UsageError(
      f"config={name!r}: {path} failed with {problem}; {expected}"
    ) from error
  for key, value in (overrides or {}).items():
    outer, _, inner = key.partition(".")
    if inner and isinstance(values.get(outer), dict):
      values[outer] = {**values[outer], inner: value}
    else:
      values[key] = value
  return from_mapping(cls, values)


def setup_jax_cache() -> None:
  """Keeps compiled programs in the cache folder, for later runs.

  Whatever cache the user has set up for JAX is left alone. A folder that
  cannot be written to costs time, not the run.
  """
  if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
    return
  folder = cache_dir() / "xla"
  with contextlib.suppress(OSError):
    folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
      jax.config.update("jax_compilation_cache_dir", str(folder))
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
      jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def run(
  main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None
) -> int:
  """Runs a script's `main` and returns the exit status.

  Args:
    main: takes the arguments; raises `UsageError` for the user's mistakes.
    arguments: those of the command line by default.

  Returns:
    0; 2 after a mistake or on a full device, told in one line; 130 after
    Ctrl-C; 141 where the reader of standard output went away; what `main`
    exits with.
  """
  # On a machine whose GPU is not used, JAX says so; the scripts say where
  # they run themselves.
  logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
  # Orbax logs what it also raises.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  # Started with one of them closed, Python has none in its place.
  sys.stdout = sys.stdout or io.StringIO()
  sys.stderr = sys.stderr or io.StringIO()
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="replace")
  try:
    main(sys.argv[1:] if arguments is None else arguments)
    sys.stdout.flush()
  except BrokenPipeError:
    return BROKEN_PIPE
  except (UsageError, OSError) as error:
    print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
    return USAGE
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    print(
      "error: the device is out of memory: expected smaller sizes, of the batch"
      f" above all ({one_line(error)[:200]})",
      file=sys.stderr,
      flush=True,
    )
    return USAGE
  except KeyboardInterrupt:
    return INTERRUPTED
  except SystemExit as stop:  # --help and --version, too
    return stop.code if isinstance(stop.code, int) else OK
  return OK


@contextlib.contextmanager
def patient_interrupt() -> Iterator[Callable[[], None]]:
  """Puts Ctrl-C off until it does no harm.

  A `KeyboardInterrupt` that is raised somewhere inside a library may be
  swallowed there, or logged as a failure. Within the block the first Ctrl-C is
  only noted; a second one interrupts at once.

  Yields:
    A function that raises `KeyboardInterrupt` if Ctrl-C was noted.
  """
  noted: list[int] = []
  before = signal.getsignal(signal.SIGINT)

  def note(number: int, frame: FrameType | None) -> None:
    noted.append(number)
    if len(noted) > 1:
      signal.default_int_handler(number, frame)

  def check() -> None:
    if noted:
      raise KeyboardInterrupt

  # Whoever started the process may have had the signal ignored.
  if before is signal.default_int_handler:
    signal.signal(signal.SIGINT, note)
  try:
    yield check
  finally:
    signal.signal(signal.SIGINT, before)


def exit_with(status: int) -> NoReturn:
  """Leaves the process; unless all went well, without waiting for threads."""
  if status != OK:
    # A program on the device may go on for a while in its own thread, or one
    # that writes a checkpoint may have failed: Python would wait for either.
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    os._exit(status)
  sys.exit(status)


def one_line(error: BaseException) -> str:
  """An error's message on a single line, never empty."""
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= 500 else f"{text[:497]}..."


def _split_overrides(
  arguments: Sequence[str],
) -> tuple[list[str], dict[str, Any]]:
  """Takes `--config.KEY=VALUE` and `--config.KEY VALUE` out of the flags."""
  plain, overrides = [], {}
  rest = iter(arguments)
  for argument in rest:
    if not argument.startswith(_OVERRIDE):
      plain.append(argument)
      continue
    key, equals, text = argument.removeprefix(_OVERRIDE).partition("=")
    if not equals:
      following = next(rest, None)
      if following is None or following.startswith("--"):
        raise UsageError(f"{argument}: expected a value")
      text = following
    overrides[key] = _literal(text)
  return plain, overrides


def _literal(text: str) -> Any:
  """A Python literal, `nan` or `inf`, or else the text itself."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return float(text) if text.lstrip("+-") in ("nan", "inf") else text


def _type_error(text: str, expected: str) -> argparse.ArgumentTypeError:
  return argparse.ArgumentTypeError(f"{text!r}: expected {expected}")

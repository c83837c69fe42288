"""The one exception a user's mistake raises, and the check that raises it."""

from typing import Any


class UsageError(ValueError):
  """A mistake in what the user passed: flag, config field, file or argument.

  Its message is one line that names the field, the value and what was
  expected. The scripts print it on standard error and exit with status 2.
  """


def require(condition: bool, field: str, value: Any, expected: str) -> None:
  """Raises `UsageError("field=value: expected ...")` unless `condition`."""
  if not condition:
    raise UsageError(f"{field}={_shown(value)}: expected {expected}")


def require_fields(config: Any, *checks: tuple[str, bool, str]) -> None:
  """`require` for each (field of `config`, condition, expected)."""
  for field, condition, expected in checks:
    require(condition, field, getattr(config, field), expected)


def require_at_least(config: Any, least: int, *fields: str) -> None:
  """`require` that each of the fields of `config` is `least` or more."""
  require_fields(
    config,
    *((f, getattr(config, f) >= least, f"{least} or more") for f in fields),
  )


def _shown(value: Any) -> str:
  """The value as Python writes it, where Python is willing to."""
  try:
    return repr(value)
  except ValueError:  # an integer of thousands of digits
    return "..."

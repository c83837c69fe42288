"""Results files: JSON that grows a row at a time, and a table beside it."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from d2sd_jax.errors import UsageError
from d2sd_jax.evaluation import bootstrap_interval
from d2sd_jax.io.paths import atomic_write

Row: TypeAlias = dict[str, Any]


def read_file(
  path: Path, script: str, keys: Sequence[str], summary: str
) -> dict[str, Any]:
  """A results file, checked.

  Args:
    path: of the file.
    script: that writes such files, for the error.
    keys: what every row has.
    summary: the key of what is computed from the rows.

  Raises:
    UsageError: it cannot be read, was cut off or is something else.
  """
  expected = f"expected a results file of {script}"
  try:
    results = json.loads(path.read_text("utf-8"))
  except OSError as error:
    raise UsageError(
      f"results={str(path)!r}: {expected} ({error.strerror})"
    ) from error
  except (ValueError, RecursionError) as error:
    raise UsageError(
      f"results={str(path)!r}: {expected}, whole; this one is damaged ({error})"
    ) from error
  is_row = lambda row: isinstance(row, dict) and row.keys() >= set(keys)
  if not (
    isinstance(results, dict)
    and isinstance(results.get("meta"), dict)
    and isinstance(results.get(summary), dict)
    and isinstance(results.get("rows"), list)
    and all(map(is_row, results["rows"]))
  ):
    raise UsageError(f"results={str(path)!r}: {expected}")
  return results


def check_same(path: Path, field: str, old: Any, new: Any) -> None:
  """Raises `UsageError`, naming the innermost field that differs."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted(old.keys() | new.keys()):
      check_same(path, f"{field}.{key}", old.get(key), new.get(key))
    return
  short = lambda value: f"{value!r}"[:80]
  if old != new:
    raise UsageError(
      f"{field}={short(new)}: expected {short(old)}, as in {path}; --out names"
      " another file"
    )


def write_file(
  path: Path,
  results: Mapping[str, Any],
  summary: str,
  markdown: Callable[[Mapping[str, Any]], str],
) -> None:
  """Writes a results file, and the tables beside it.

  Args:
    path: the JSON file; the tables get its name with `.md`.
    results: `meta`, `rows` and the summary.
    summary: the key of what is computed from the rows.
    markdown: writes the tables.

  Raises:
    UsageError: a file cannot be written.
  """
  try:
    for file, content in (
      (path, _to_json(results, summary)),
      (path.with_suffix(".md"), markdown(results)),
    ):
      with atomic_write(file) as temporary:
        temporary.write_text(content, encoding="utf-8")
  except OSError as error:
    raise UsageError(
      f"out={str(path)!r}: expected a file to write ({error.strerror})"
    ) from error


def _to_json(results: Mapping[str, Any], summary: str) -> str:
  """One line for each row, so that a difference can be read."""
  dump = lambda value: json.dumps(value, ensure_ascii=False, allow_nan=False)
  rows = ",\n".join(map(dump, results["rows"]))
  meta, computed = (
    json.dumps(results[key], ensure_ascii=False, allow_nan=False, indent=1)
    for key in ("meta", summary)
  )
  return (
    f'{{"meta": {meta},\n"rows": [\n{rows}\n],\n"{summary}": {computed}}}\n'
  )


def interval(sets: Sequence[Sequence[Sequence[int]]]) -> list[float | None]:
  """See `bootstrap_interval`; as JSON has it."""
  return [finite(end) for end in bootstrap_interval(sets)]


def finite(value: float, digits: int = 5) -> float | None:
  """A rounded number for JSON, which has no NaN: that is `None`."""
  return round(value, digits) if math.isfinite(value) else None


def alpha_cell(row: Row | None, digits: int = 2) -> str:
  """α without tails and its interval, as a table shows them."""
  if row is None:
    return "-"
  shown = lambda value: number(value, digits)
  low, high = map(shown, row["ci95_cut"])
  return f"{shown(row['alpha_cut'])} [{low}, {high}] ({shown(row['alpha'])})"


def number(value: float | None, digits: int = 2) -> str:
  """A number as a table shows it."""
  return "-" if value is None else f"{value:.{digits}f}"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table in Markdown."""
  rule = ["---"] * len(titles)
  return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rule, *rows))

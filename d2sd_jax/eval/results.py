"""The ladder's results file: rows that only grow, their means, a table."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from d2sd_jax.errors import UsageError
from d2sd_jax.eval.calibration import calibration_error
from d2sd_jax.evaluation import bootstrap_interval
from d2sd_jax.io.paths import atomic_write

Row: TypeAlias = dict[str, Any]
ROW_KEYS = (
  *("set", "policy", "temperature", "dtype", "alpha", "alpha_cut", "ci95"),
  *("nodes", "ms_per_token", "speedup", "ties", "identical"),
  *("ci95_cut", "counts", "counts_cut", "accepted_lengths"),
)
_MEAN_OF = ("alpha", "alpha_cut", "nodes", "ms_per_token", "speedup")
# What of `meta` grows from run to run; all else must stay as it is.
_GROWS = ("prompts",)


def row_key(row: Mapping[str, Any]) -> tuple[str, str, float, str]:
  """What a row is the result of: set, policy, temperature, dtype."""
  return row["set"], row["policy"], row["temperature"], row["dtype"]


def read_results(path: Path) -> dict[str, Any]:
  """A results file, checked.

  Raises:
    UsageError: it cannot be read, was cut off or is something else.
  """
  expected = "expected a results file of d2sd_jax.eval.ladder"
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
  if not (
    isinstance(results, dict)
    and isinstance(results.get("meta"), dict)
    and isinstance(results.get("means"), dict)
    and isinstance(results.get("rows"), list)
    and all(_is_row(row) for row in results["rows"])
  ):
    raise UsageError(f"results={str(path)!r}: {expected}")
  return results


def _is_row(row: Any) -> bool:
  return isinstance(row, dict) and all(key in row for key in ROW_KEYS)


def resume(path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
  """What is there already, or an empty file's content.

  Args:
    path: the results file, which need not exist.
    meta: what this run would measure, and with what.

  Raises:
    UsageError: the file is damaged, or it is about another target, other
      drafters, settings, prompts, versions or another device.
  """
  if not path.exists():
    return {"meta": dict(meta), "rows": [], "means": {}}
  results = read_results(path)
  old = results["meta"]
  for key, value in meta.items():
    if key in _GROWS:
      known = old.get(key, {})
      for name in value.keys() & known.keys():
        _check_same(path, f"{key} of {name}", known[name], value[name])
      old[key] = {**known, **value}
    else:
      _check_same(path, key, old.get(key), value)
  return results


def _check_same(path: Path, field: str, old: Any, new: Any) -> None:
  """Raises `UsageError`, naming the innermost field that differs."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted(old.keys() | new.keys()):
      _check_same(path, f"{field}.{key}", old.get(key), new.get(key))
    return
  short = lambda value: f"{value!r}"[:80]
  if old != new:
    raise UsageError(
      f"{field}={short(new)}: expected {short(old)}, as in {path}; --out names"
      " another file"
    )


def write_results(path: Path, results: dict[str, Any]) -> None:
  """Writes the rows with their means, and the table beside them.

  Args:
    path: the JSON file; the table gets its name with `.md`.
    results: `meta` and `rows`; `means` is filled in.

  Raises:
    UsageError: the file cannot be written.
  """
  results["means"] = means(results["rows"])
  try:
    for file, content in (
      (path, _to_json(results)),
      (path.with_suffix(".md"), markdown(results)),
    ):
      with atomic_write(file) as temporary:
        temporary.write_text(content, encoding="utf-8")
  except OSError as error:
    raise UsageError(
      f"out={str(path)!r}: expected a file to write ({error.strerror})"
    ) from error


def _to_json(results: Mapping[str, Any]) -> str:
  """One line for each row, so that a difference can be read."""
  dump = lambda value: json.dumps(value, ensure_ascii=False, allow_nan=False)
  rows = ",\n".join(map(dump, results["rows"]))
  around = [
    json.dumps(results[key], ensure_ascii=False, allow_nan=False, indent=1)
    for key in ("meta", "means")
  ]
  return (
    f'{{"meta": {around[0]},\n"rows": [\n{rows}\n],\n"means": {around[1]}}}\n'
  )


def means(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
  """Unweighted means over sets, by policy.

  A policy's entry is that of the lowest temperature, in float32 where there
  is such a row; `more` holds its entries of other temperatures and dtypes.
  """
  groups: dict[tuple[str, float, str], list[Row]] = {}
  for row in rows:
    key = (row["policy"], row["temperature"], row["dtype"])
    groups.setdefault(key, []).append(row)
  found: dict[str, dict[str, Any]] = {}
  # "float32" comes last of the dtypes by name, and is to come first.
  by_rank = lambda key: (key[1], key[2] != "float32", key[2])
  for key in sorted(groups, key=by_rank):
    entry = _mean_entry(groups[key])
    head = found.setdefault(key[0], entry)
    if head is not entry:
      head.setdefault("more", []).append(entry)
  return {key[0]: found[key[0]] for key in groups}


def _mean_entry(rows: Sequence[Row]) -> dict[str, Any]:
  """The mean of some rows of one policy, temperature and dtype."""
  entry = {
    "temperature": rows[0]["temperature"],
    "dtype": rows[0]["dtype"],
    "sets": [row["set"] for row in rows],
    **{key: _mean(row[key] for row in rows) for key in _MEAN_OF},
    "ci95": interval([row["counts"] for row in rows]),
    "ci95_cut": interval([row["counts_cut"] for row in rows]),
    "identical": all(row["identical"] for row in rows),
    "ties": sum(len(row["ties"]) for row in rows),
  }
  summaries = [r["calibration"] for r in rows if r.get("calibration")]
  if summaries:
    entry["ece"] = finite(calibration_error(summaries))
  return entry


def _mean(values: Iterable[float | None]) -> float | None:
  """The mean, or `None` where a value is missing."""
  known = list(values)
  if not known or any(value is None for value in known):
    return None
  return finite(sum(v for v in known if v is not None) / len(known))


def interval(sets: Sequence[Sequence[Sequence[int]]]) -> list[float | None]:
  """See `bootstrap_interval`; as JSON has it."""
  return [finite(end) for end in bootstrap_interval(sets)]


def finite(value: float, digits: int = 5) -> float | None:
  """A rounded number for JSON, which has no NaN: that is `None`."""
  return round(value, digits) if math.isfinite(value) else None


def markdown(results: Mapping[str, Any]) -> str:
  """The tables of a results file, one for each temperature and dtype."""
  rows, meta = results["rows"], results["meta"]
  settings = ", ".join(f"{k} {v}" for k, v in meta["settings"].items())
  parts = [
    f"# The ladder: {meta['target']['name']}",
    f"{meta['device']}; {settings}.",
    "α: tokens committed per cycle, periodic tails cut [bootstrap 95 % interval"
    " over prompts] (over all tokens).",
  ]
  groups = dict.fromkeys((r["temperature"], r["dtype"]) for r in rows)
  for temperature, dtype in sorted(groups):
    group = [
      r for r in rows if (r["temperature"], r["dtype"]) == (temperature, dtype)
    ]
    parts += [f"## T={temperature:g}, {dtype}", *_tables(group)]
  return "\n\n".join(parts) + "\n"


def _tables(rows: Sequence[Row]) -> list[str]:
  """α by set and policy; then what each policy costs and gains."""
  sets = list(dict.fromkeys(row["set"] for row in rows))
  cells = {(row["policy"], row["set"]): row for row in rows}
  averages = means(rows)
  alphas = [
    [
      f"`{policy}`",
      _alpha_cell(mean),
      _ratio(mean, averages.get("dflash")),
      *(_alpha_cell(cells.get((policy, name))) for name in sets),
    ]
    for policy, mean in averages.items()
  ]
  costs = [
    [
      f"`{policy}`",
      _number(mean["nodes"], 1),
      _number(mean["ms_per_token"]),
      _number(mean["speedup"]),
      "yes" if mean["identical"] else "no",
      str(mean["ties"]),
    ]
    for policy, mean in averages.items()
  ]
  titles = ["policy", "nodes per cycle", "ms per token", "speed-up"]
  return [
    _table(["policy", "mean α", "of `dflash`", *sets], alphas),
    _table([*titles, "identical to `ar`", "ties"], costs),
  ]


def _alpha_cell(row: Row | None) -> str:
  if row is None:
    return "-"
  low, high = map(_number, row["ci95_cut"])
  alpha, whole = _number(row["alpha_cut"]), _number(row["alpha"])
  return f"{alpha} [{low}, {high}] ({whole})"


def _ratio(mean: Row, base: Row | None) -> str:
  if not base or not base["alpha_cut"] or mean["alpha_cut"] is None:
    return "-"
  return f"{mean['alpha_cut'] / base['alpha_cut']:.2f}"


def _number(value: float | None, digits: int = 2) -> str:
  return "-" if value is None else f"{value:.{digits}f}"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  rule = ["---"] * len(titles)
  return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rule, *rows))

"""The ladder's results file: rows that only grow, their means, a table."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2sd_jax.eval.calibration import calibration_error
from d2sd_jax.eval.results_file import (
  Row,
  alpha_cell,
  check_same,
  finite,
  interval,
  number,
  read_file,
  table,
  write_file,
)

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
  """A results file of the ladder, checked; see `read_file`."""
  return read_file(path, "d2sd_jax.eval.ladder", ROW_KEYS, "means")


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
        check_same(path, f"{key} of {name}", known[name], value[name])
      old[key] = {**known, **value}
    else:
      check_same(path, key, old.get(key), value)
  return results


def write_results(path: Path, results: dict[str, Any]) -> None:
  """Writes the rows with their means, and the table beside them.

  Args:
    path: the JSON file; the table gets its name with `.md`.
    results: `meta` and `rows`; `means` is filled in.

  Raises:
    UsageError: the file cannot be written.
  """
  results["means"] = means(results["rows"])
  write_file(path, results, "means", markdown)


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
      _named(policy, mean, sets),
      alpha_cell(mean),
      _ratio(mean, averages.get("dflash")),
      *(alpha_cell(cells.get((policy, name))) for name in sets),
    ]
    for policy, mean in averages.items()
  ]
  costs = [
    [
      _named(policy, mean, sets),
      number(mean["nodes"], 1),
      number(mean["ms_per_token"]),
      number(mean["speedup"]),
      "yes" if mean["identical"] else "no",
      str(mean["ties"]),
    ]
    for policy, mean in averages.items()
  ]
  titles = ["policy", "nodes per cycle", "ms per token", "speed-up"]
  return [
    table(["policy", "mean α", "of `dflash`", *sets], alphas),
    table([*titles, "identical to `ar`", "ties"], costs),
  ]


def _named(policy: str, mean: Row, sets: Sequence[str]) -> str:
  """The policy, and how many sets its means are of where some are missing."""
  measured, count = len(mean["sets"]), len(sets)
  return f"`{policy}`" + (
    f", {measured} of {count} sets" if measured < count else ""
  )


def _ratio(mean: Row, base: Row | None) -> str:
  if not base or {*base["sets"]} != {*mean["sets"]}:
    return "-"  # Means of other sets.
  if not base["alpha_cut"] or mean["alpha_cut"] is None:
    return "-"
  return f"{mean['alpha_cut'] / base['alpha_cut']:.2f}"

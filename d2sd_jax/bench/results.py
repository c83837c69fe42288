"""The results file, a row at a time, and the short table at the end."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from d2sd_jax.decoding.report import console, write_json
from d2sd_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Results:
  """A JSON list of rows of any devices, versions and configs.

  Attributes:
    path: of the file.
    identity: `device`, `versions`, `config` and what XLA was told, of the rows
      being measured.
    rows: all of them, other identities' as well.
  """

  path: Path
  identity: Mapping[str, Any]
  rows: list[dict[str, Any]]

  @classmethod
  def open(cls, path: Path, identity: Mapping[str, Any]) -> "Results":
    """Reads the file, where there is one.

    Raises:
      UsageError: it is something else, or holds rows of another mesh.
    """
    # As JSON gives them back: tuples are lists there.
    identity = json.loads(json.dumps(identity))
    if not path.exists():
      return cls(path, identity, [])
    try:
      rows = json.loads(path.read_text(encoding="utf-8"))
      named = all(isinstance(row["row"], str) for row in rows)
    except (OSError, ValueError, TypeError, KeyError) as error:
      raise UsageError(
        f"out={str(path)!r}: expected a results file of this script"
      ) from error
    if not (named and isinstance(rows, list)):
      raise UsageError(f"out={str(path)!r}: expected a list of rows")
    mesh = identity["config"].get("mesh")
    for row in rows:
      found = row.get("config", {}).get("mesh")
      if found != mesh:
        raise UsageError(
          f"out={str(path)!r}: expected a new file, or one of mesh {mesh};"
          f" its rows are of mesh {found}"
        )
    return cls(path, identity, rows)

  def own(self) -> dict[str, dict[str, Any]]:
    """The rows of this identity, by name."""
    return {row["row"]: row for row in self.rows if self._is_own(row)}

  @property
  def done(self) -> set[str]:
    """The rows that need not be measured again."""
    return {name for name, row in self.own().items() if "failed" not in row}

  def add(self, name: str, measured: Mapping[str, Any]) -> None:
    """Adds a row, in the place of an older one, and writes the file."""
    kept = [
      row for row in self.rows if row["row"] != name or not self._is_own(row)
    ]
    self.rows[:] = [*kept, {"row": name, **self.identity, **measured}]
    write_json(self.path, self.rows)

  def _is_own(self, row: Mapping[str, Any]) -> bool:
    return all(row.get(k) == v for k, v in self.identity.items())


def print_table(results: Results) -> None:
  """Every row of this identity, and a whole cycle beside an AR step."""
  rows = results.own()
  table = Table()
  table.add_column("row", no_wrap=True)
  for title in ("ms", "least", "most", "floor", "of floor"):
    table.add_column(title, justify="right")
  table.add_column("runs")
  for name, row in rows.items():
    if "failed" in row:
      table.add_row(name, "failed", *[""] * 4, row["failed"][:60])
      continue
    floor = row.get("floor_ms")
    runs = row.get("implementations", {})
    last = ", ".join(dict.fromkeys(runs.values()))
    if "per_second" in row:
      last = f"{row['per_second'] / 1e12:.3f} T/s"
    table.add_row(
      name,
      *(f"{row[f'{k}_ms']:.4f}" for k in ("median", "least", "most")),
      f"{floor:.4f}" if floor else "",
      f"{row['median_ms'] / floor:.2f}" if floor else "",
      last,
    )
  out = console()
  out.print(table)
  for name, row in rows.items():
    piece, _, place = name.partition("/")
    step = rows.get(f"ar/{place}", {})
    if piece == "cycle" and "median_ms" in row and "median_ms" in step:
      ratio = row["median_ms"] / step["median_ms"]
      floor = row["floor_ms"] / step["floor_ms"]
      out.print(
        f"cycle over AR step, {place}: {ratio:.2f} (floors {floor:.2f})"
      )

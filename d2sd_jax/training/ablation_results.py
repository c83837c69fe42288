"""An ablation's results: a row for each arm, a table for each group."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2sd_jax.eval.results_file import (
  Row,
  alpha_cell,
  check_same,
  finite,
  number,
  read_file,
  table,
  write_file,
)
from d2sd_jax.evaluation import paired_interval
from d2sd_jax.io.drafter_format import WEIGHTS_FILE
from d2sd_jax.io.models import file_sha256, target_sha256
from d2sd_jax.io.paths import find_checkpoint
from d2sd_jax.training.ablation_config import ARM, AblationConfig, Arm
from d2sd_jax.training.checkpoint import DATA_FIELDS, plain_config
from d2sd_jax.training.train_config import TrainConfig

PROGRAM = "d2sd_jax.training.ablation"
ROW_KEYS = (
  *("arm", "settings", "alpha", "ci95", "counts", "alpha_cut", "ci95_cut"),
  *("counts_cut", "loss", "heldout_alpha", "ms_per_step", "weights_sha256"),
  *("device", "versions"),
)
# What of the base an arm's row tells itself, or what changes no result.
_NOT_SHARED = (
  *(
    "target",
    "init_from",
    "first_drafter",
    "log_every",
    "eval_every",
    "checkpoint_every",
  ),
  *DATA_FIELDS,
)


def make_meta(config: AblationConfig, base: TrainConfig) -> dict[str, Any]:
  """What all rows of one file have in common, as JSON gives it back."""
  settings = {
    k: v for k, v in plain_config(base).items() if k not in _NOT_SHARED
  }
  return {
    "target": {"name": base.target, "sha256": target_sha256(base.target)},
    "base": settings,
    "decoding": {
      "num_prompts": config.num_prompts,
      "max_new_tokens": config.max_new_tokens,
    },
  }


def make_settings(arm: Arm, base: TrainConfig) -> dict[str, Any]:
  """What an arm's result depends on beside that, as JSON gives it back."""
  settings = {
    "changes": changes(arm, base),
    "tree": vars(arm.tree),
    "trained_as": arm.trained_as,
    "init_from": _identity(arm.train.init_from),
    "first_drafter": _identity(arm.train.first_drafter),
    "drafter": _identity(arm.drafter),
  }
  return json.loads(json.dumps(settings))


def changes(arm: Arm, base: TrainConfig) -> dict[str, Any]:
  """The fields in which an arm's training is not the base's."""
  return {k: v for k, v in vars(arm.train).items() if v != getattr(base, k)}


def _identity(drafter: str | None) -> str | None:
  """A drafter by its weights, or by the arm that they are made in."""
  if drafter is None or drafter.startswith(ARM):
    return drafter
  return file_sha256(find_checkpoint(drafter) / WEIGHTS_FILE)


def resume(
  path: Path, meta: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
  """What is there already, or an empty file's content.

  Args:
    path: the results file, which need not exist.
    meta: see `make_meta`.
    settings: of every arm by name; see `make_settings`.

  Raises:
    UsageError: the file is damaged, or it is about other settings, another
      corpus or another target.
  """
  if not path.exists():
    return {"meta": dict(meta), "rows": [], "groups": {}}
  results = read_file(path, PROGRAM, ROW_KEYS, "groups")
  check_same(path, "meta", results["meta"], dict(meta))
  for row in results["rows"]:
    name = row["arm"]
    if name in settings:
      check_same(path, f"arms.{name}", row["settings"], settings[name])
  return results


def write_results(
  path: Path, results: dict[str, Any], groups: Mapping[str, Sequence[str]]
) -> None:
  """Writes the rows with what their groups say, and the tables beside them.

  Args:
    path: the JSON file; the tables get its name with `.md`.
    results: `meta` and `rows`; `groups` is filled in.
    groups: by name, the arms that are compared, the baseline first.

  Raises:
    UsageError: a file cannot be written.
  """
  rows = {row["arm"]: row for row in results["rows"]}
  results["groups"] = {
    group: [compare(name, members[0], rows) for name in members]
    for group, members in groups.items()
  }
  write_file(path, results, "groups", markdown)


def compare(name: str, baseline: str, rows: Mapping[str, Row]) -> Row:
  """An arm beside its group's baseline, prompt by prompt, tails cut.

  Args:
    name: of the arm.
    baseline: of the group.
    rows: by arm, those that are measured.

  Returns:
    The `difference` of α and its interval; `None` for the baseline itself, and
    where one of both is not measured yet.
  """
  found: Row = {"arm": name, "difference": None, "ci95": [None, None]}
  if name == baseline or not rows.keys() >= {name, baseline}:
    return found
  mine, theirs = rows[name], rows[baseline]
  if mine["alpha_cut"] is not None and theirs["alpha_cut"] is not None:
    found["difference"] = finite(mine["alpha_cut"] - theirs["alpha_cut"])
  ends = paired_interval(mine["counts_cut"], theirs["counts_cut"])
  return {**found, "ci95": [finite(end) for end in ends]}


def markdown(results: Mapping[str, Any]) -> str:
  """A table for each group of which two arms are measured."""
  meta = results["meta"]
  base, new = meta["base"], meta["decoding"]["max_new_tokens"]
  rows = {row["arm"]: row for row in results["rows"]}
  devices = list(dict.fromkeys(row["device"] for row in rows.values()))
  prompts = max((len(row["counts"]) for row in rows.values()), default=0)
  parts = [
    f"# Ablation: {meta['target']['name']}",
    f"{', '.join(devices)}; {base['num_steps']} steps of"
    f" {base['batch_size']} conversations, the same for all arms;"
    f" {base['dtype']}.",
    f"α: tokens committed per cycle, T=0, {new} new tokens behind {prompts}"
    " held-out prompts, periodic tails cut [bootstrap 95 % interval over"
    " prompts] (over all tokens). Difference:"
    " to the first arm, paired by prompt [its interval]. Simulated α: over all"
    " anchors of held-out answers. Losses compare only where their kind and"
    " their weights are the same.",
  ]
  for group, entries in results["groups"].items():
    lines = [
      _line(entry, rows[entry["arm"]], devices)
      for entry in entries
      if entry["arm"] in rows
    ]
    if len(lines) > 1:
      parts += [f"## {group}", table(_TITLES, lines)]
  return "\n\n".join(parts) + "\n"


_TITLES = (
  *("arm", "α", "difference", "simulated α", "final loss", "ms per step"),
)


def _line(entry: Row, row: Row, devices: Sequence[str]) -> list[str]:
  """An arm's line in the table of a group."""
  low, high = (_signed(end) for end in entry["ci95"])
  difference = entry["difference"]
  where = f" ({row['device']})" if len(devices) > 1 else ""
  return [
    f"`{entry['arm']}`",
    alpha_cell(row, 3),
    "-" if difference is None else f"{_signed(difference)} [{low}, {high}]",
    number(row["heldout_alpha"], 3),
    number(row["loss"], 3),
    number(row["ms_per_step"], 1) + where,
  ]


def _signed(value: float | None) -> str:
  return "-" if value is None else f"{value:+.3f}"

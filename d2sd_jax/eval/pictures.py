"""Pictures of a results file of the ladder.

`python -m d2sd_jax.eval.pictures results/ladder_smollm2.json` draws, beside
the file: confidence against acceptance (the paper's Figure 2a), the boundary
posterior against where drafts really failed, how many tokens cycles commit in
each mode, and α by task. Needs the extra `plots`.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2sd_jax import cli
from d2sd_jax.errors import UsageError, require
from d2sd_jax.eval.calibration import calibration_error
from d2sd_jax.eval.results import read_results
from d2sd_jax.eval.results_file import Row
from d2sd_jax.io.paths import atomic_write, user_path

EXAMPLES = """\
  python -m d2sd_jax.eval.pictures results/ladder_smollm2.json
"""
_SIZE = (7.0, 4.2)


def confidence(rows: Sequence[Row], axes: Any) -> None:
  """Share of accepted tokens by the confidence drafter 1 had in them."""
  bins = [r["calibration"]["confidence"] for r in rows]
  count, total, accepted = (
    np.sum([b[key] for b in bins], axis=0)
    for key in ("count", "sum", "accepted")
  )
  some = count > 0
  mean, share = total[some] / count[some], accepted[some] / count[some]
  error = calibration_error(r["calibration"] for r in rows)
  axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", label="calibrated")
  axes.plot(mean, share, marker="o", label=f"drafter 1 (ECE {error:.3f})")
  axes.bar(
    (np.arange(len(count)) + 0.5) / len(count),
    count / max(count.sum(), 1),
    width=0.8 / len(count),
    alpha=0.25,
    label="share of slots",
  )
  axes.set(xlabel="confidence c_k", ylabel="accepted", xlim=(0, 1), ylim=(0, 1))
  axes.set_title("Confidence against acceptance, earlier slots accepted")


def boundary(rows: Sequence[Row], axes: Any) -> None:
  """The mean posterior (Eq. 4) beside how often each boundary was the true."""
  known = [r["calibration"]["boundary"] for r in rows]
  known = [b for b in known if b["observed"]]
  expected, observed = (
    np.sum([b[key] for b in known], axis=0) for key in ("expected", "observed")
  )
  at = np.arange(len(observed))
  axes.bar(at - 0.2, expected / expected.sum(), 0.4, label="posterior r(i)")
  axes.bar(at + 0.2, observed / observed.sum(), 0.4, label="really")
  axes.set_xticks(at, [*map(str, at[:-1]), "all"])
  axes.set(xlabel="tokens of the first draft accepted", ylabel="share")
  axes.set_title("Where the first draft fails")


def lengths(rows: Sequence[Row], axes: Any) -> None:
  """Share of cycles by the tokens they commit, for every policy."""
  longest = max(len(row["accepted_lengths"]) for row in rows)
  shares = {}
  for policy, some in _group(rows, "policy").items():
    counts = np.zeros(longest, int)
    for row in some:
      counts[: len(row["accepted_lengths"])] += row["accepted_lengths"]
    shares[policy] = counts[1:] / max(counts.sum(), 1)
  for policy, left, width in _side_by_side(shares):
    axes.bar(np.arange(1, longest) + left, shares[policy], width, label=policy)
  axes.set_xticks(np.arange(1, longest))
  axes.set(xlabel="tokens a cycle commits", ylabel="share of cycles")
  axes.set_title("Accepted lengths")


def by_task(rows: Sequence[Row], axes: Any) -> None:
  """α without periodic tails, by task and policy, with 95 % intervals."""
  sets = list(dict.fromkeys(row["set"] for row in rows))
  groups = _group([row for row in rows if row["alpha_cut"]], "policy")
  for policy, left, width in _side_by_side(groups):
    at = np.array([sets.index(row["set"]) for row in groups[policy]])
    alpha = np.array([row["alpha_cut"] for row in groups[policy]])
    ends = np.array([row["ci95_cut"] for row in groups[policy]])
    reach = np.abs(ends - alpha[:, None]).T
    axes.bar(at + left, alpha, width, yerr=reach, label=policy)
  axes.set_xticks(np.arange(len(sets)), sets, rotation=20)
  axes.set_ylabel("α, tails cut")
  axes.set_title("Acceptance length by task")


def _side_by_side(
  groups: Mapping[str, Any],
) -> Iterator[tuple[str, float, float]]:
  """Where the bar of each policy stands and how wide it is; `ar` has none."""
  policies = [policy for policy in groups if policy != "ar"]
  width = 0.8 / max(len(policies), 1)
  for i, policy in enumerate(policies):
    yield policy, (i - (len(policies) - 1) / 2) * width, width


# File name, what it draws, and what of a row it needs.
PICTURES: Mapping[str, tuple[Callable[[Sequence[Row], Any], None], str]] = {
  "confidence": (confidence, "calibration"),
  "boundary": (boundary, "calibration"),
  "accepted_lengths": (lengths, "accepted_lengths"),
  "alpha_by_task": (by_task, "ci95_cut"),
}


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
  """Draws what the greedy rows have data for.

  Args:
    results: see `read_results`.
    folder: where the pictures go.

  Returns:
    The files.

  Raises:
    UsageError: matplotlib is missing, or a row lacks what it should have.
  """
  pyplot = _pyplot()
  rows = _main_rows(results["rows"])
  files = []
  for name, (paint, needed) in PICTURES.items():
    some = [row for row in rows if row.get(needed)]
    if not some:
      continue
    figure, axes = pyplot.subplots(figsize=_SIZE, layout="constrained")
    try:
      paint(some, axes)
    except (KeyError, TypeError, ValueError, IndexError) as error:
      raise UsageError(
        f"results: expected {needed} as d2sd_jax.eval.ladder writes it"
        f" ({type(error).__name__}: {error})"
      ) from error
    axes.legend(fontsize="small")
    files.append(folder / f"{name}.png")
    with atomic_write(files[-1]) as temporary:
      figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)
  return files


def _main_rows(rows: Sequence[Row]) -> list[Row]:
  """Those of the lowest temperature, in float32 where there are such."""
  lowest = min((row["temperature"] for row in rows), default=0.0)
  greedy = [row for row in rows if row["temperature"] == lowest]
  by_dtype = _group(greedy, "dtype")
  return by_dtype.get("float32", greedy)


def _group(rows: Sequence[Row], key: str) -> dict[Any, list[Row]]:
  """Rows by one of their fields, in order of first appearance."""
  groups: dict[Any, list[Row]] = {}
  for row in rows:
    groups.setdefault(row[key], []).append(row)
  return groups


def _pyplot() -> Any:
  """matplotlib's pyplot, drawing to files only."""
  try:
    importlib.import_module("matplotlib").use("agg")
    return importlib.import_module("matplotlib.pyplot")
  except ImportError as error:
    raise UsageError(
      f"matplotlib is missing: expected `pip install -e '.[plots]'` ({error})"
    ) from error


def main(arguments: Sequence[str]) -> None:
  """Draws all pictures of one file."""
  parser = cli.FlagParser(
    "-m d2sd_jax.eval.pictures", "Draws the ladder's results.", EXAMPLES
  )
  parser.add_argument("results", help="a file of d2sd_jax.eval.ladder")
  parser.add_argument("--out", metavar="FOLDER", help="default: the file's")
  flags, _ = parser.parse(arguments)
  path = user_path(flags.results)
  results = read_results(path)
  require(bool(results["rows"]), "results", str(path), "at least one row")
  folder = path.parent if flags.out is None else user_path(flags.out)
  for file in draw(results, folder):
    print(file)


if __name__ == "__main__":
  cli.exit_with(cli.run(main))

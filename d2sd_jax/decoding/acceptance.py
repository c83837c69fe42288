"""How much a target accepts of each mode's drafts: `acceptance.json`.

A small file beside drafter 1, written by `d2sd_jax.eval.acceptance`. Counts of
whole blocks also tell what shorter ones would do.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from d2sd_jax.config import from_mapping
from d2sd_jax.errors import UsageError
from d2sd_jax.io.paths import atomic_write

ACCEPTANCE_FILE = "acceptance.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acceptance:
  """One mode, measured at one temperature and one size of its tree.

  Attributes:
    mode: a tree policy.
    temperature: of the target's sampling.
    block_size, num_branches: of the tree.
    counts: cycles that committed 0, 1, 2, .. tokens.
    drafting: share of the cycles in which anything was drafted.
  """

  mode: str
  temperature: float
  block_size: int
  num_branches: int
  counts: tuple[int, ...]
  drafting: float = 1.0

  def alpha(self, block_size: int) -> float:
    """Tokens a cycle commits with blocks of this size or shorter ones.

    A shorter block ends a run of accepted tokens early, and changes nothing
    before: `E[min(committed, block_size)]`.

    Args:
      block_size: at most the measured one.
    """
    cycles = sum(self.counts)
    tokens = sum(min(n, block_size) * c for n, c in enumerate(self.counts))
    return tokens / cycles if cycles else 1.0


def write_acceptance(path: Path, found: Iterable[Acceptance]) -> None:
  """Writes the file, whole or not at all."""
  rows = [dataclasses.asdict(each) for each in found]
  with atomic_write(path) as temporary:
    lines = ",\n ".join(json.dumps(row) for row in rows)
    temporary.write_text(f"[{lines}]\n", encoding="utf-8")


def read_acceptance(folder: Path) -> list[Acceptance]:
  """What was measured of a drafter; empty where no file lies beside it.

  Raises:
    UsageError: the file is damaged.
  """
  path = folder / ACCEPTANCE_FILE
  if not path.is_file():
    return []
  try:
    rows = json.loads(path.read_text(encoding="utf-8"))
    found = [from_mapping(Acceptance, row) for row in rows]
  except (OSError, ValueError, TypeError, AttributeError) as error:
    problem = " ".join(str(error).split())[:200]
    raise UsageError(
      f"{path}: expected counts of drafts ({problem})"
    ) from error
  if not all(min(each.counts, default=-1) >= 0 for each in found):
    raise UsageError(f"{path}: expected counts of 0 or more")
  return found

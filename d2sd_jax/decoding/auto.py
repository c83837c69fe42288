"""`--mode=auto`: the policy, block and branches that should be fastest here.

Tokens per millisecond are the acceptance length that was measured for the
drafters over the cost of a cycle that was measured on this device. Plain
autoregressive decoding is the choice unless another one clearly beats it.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence

from d2sd_jax.config import TreeConfig
from d2sd_jax.decoding.acceptance import (
  ACCEPTANCE_FILE,
  Acceptance,
  read_acceptance,
)
from d2sd_jax.decoding.answers import Request
from d2sd_jax.decoding.costs import CostTable, cost_table
from d2sd_jax.decoding.plan import Plan
from d2sd_jax.decoding.policies import POLICIES
from d2sd_jax.models.drafter import FusedDrafter
from d2sd_jax.models.target import LlamaTarget

# What tables and counts may be wrong by before `ar` would have been faster.
MARGIN = 1.1
# Modes whose cost is known from the table.
MODES = ("prompt_lookup", "dflash", "reuse", "d2sd")
# Of the caches a cost is measured with, whatever is decoded: longer ones cost
# all policies more, and every capacity would be measured anew.
_CAPACITY = 512
BLOCK_SIZES = (2, 3, 4, 5, 6, 8, 12, 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """A policy and what is expected of it.

  Attributes:
    mode: a key of `POLICIES`.
    tree: its static sizes.
    alpha: tokens a cycle commits.
    cycle: cost of a cycle, in steps of `ar`.
  """

  mode: str
  tree: TreeConfig
  alpha: float
  cycle: float

  @property
  def speedup(self) -> float:
    """Over `ar`."""
    return self.alpha / self.cycle

  def __str__(self) -> str:
    """As it is told to the user."""
    sizes = ""
    if "block_size" in POLICIES[self.mode].reads:
      sizes += f", block {self.tree.block_size}"
    if self.tree.num_branches:
      sizes += f", {self.tree.num_branches} branches"
    return f"{self.mode}{sizes}, {self.speedup:.2f}x expected"


_AR = Choice(
  mode="ar",
  tree=TreeConfig(block_size=2, num_branches=0),
  alpha=1.0,
  cycle=1.0,
)


def resolve(
  plan: Plan,
  target: LlamaTarget,
  drafters: Sequence[FusedDrafter],
  requests: Sequence[Request],
) -> Plan:
  """The plan with the choice of mode `auto` in it; says so on standard error.

  Args:
    plan: of mode `auto`.
    target: the target.
    drafters: both.
    requests: what will be decoded.

  Raises:
    UsageError: the counts beside drafter 1 are damaged.
  """
  if plan.mesh is not None:
    # What travels is not part of the costs.
    return _with_choice(plan, plan.trees, "auto: d2sd, unmeasured on a mesh")
  found = read_acceptance(plan.drafters[0])
  if not found:
    reason = f"no {ACCEPTANCE_FILE} beside drafter 1"
    return _with_choice(plan, {"ar": _AR.tree}, f"auto: ar, {reason}")
  config = plan.config
  costs = cost_table(
    plan.models("d2sd", target, drafters),
    min(config.batch_size, len(requests)),
    _CAPACITY,
    lambda name: _tell(f"measuring this device, once: {name}"),
  )
  choice = choose(
    costs,
    found,
    config.temperature,
    config.block_size,
    config.num_branches,
  )
  return _with_choice(plan, {choice.mode: choice.tree}, f"auto: {choice}")


def _with_choice(
  plan: Plan, trees: Mapping[str, TreeConfig], chosen: str
) -> Plan:
  _tell(chosen)
  return dataclasses.replace(plan, trees=trees, chosen=chosen)


def _tell(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def choose(
  costs: CostTable,
  found: Sequence[Acceptance],
  temperature: float,
  block_size: int | None = None,
  num_branches: int | None = None,
) -> Choice:
  """The fastest candidate, or `ar` where none is faster by `MARGIN`.

  Args:
    costs: of this device.
    found: what was measured of the drafters; may be empty.
    temperature: of sampling. Above 0 only what was measured above 0 counts.
    block_size: the only one to be chosen; `None` is any.
    num_branches: the only number beside none; `None` is any.
  """
  sampled = temperature > 0
  fitting = [a for a in found if (a.temperature > 0) == sampled]
  wanted = [
    c
    for c in candidates(costs, fitting, block_size)
    if block_size in (None, c.tree.block_size)
    and (num_branches is None or c.tree.num_branches in (0, num_branches))
  ]
  best = max(wanted, key=lambda c: c.speedup, default=_AR)
  return best if best.speedup > MARGIN else _AR


def candidates(
  costs: CostTable,
  found: Sequence[Acceptance],
  block_size: int | None = None,
) -> Iterator[Choice]:
  """Every measured mode, with its own block size and shorter ones.

  Args:
    costs: of this device.
    found: what was measured of the drafters.
    block_size: one more to try beside `BLOCK_SIZES`.
  """
  for each in found:
    known = each.mode in MODES
    if not known or POLICIES[each.mode].num_drafters > len(costs.drafts):
      continue
    for block in {*BLOCK_SIZES, each.block_size, block_size or 2}:
      if each.num_branches < block <= each.block_size:
        tree = TreeConfig(block_size=block, num_branches=each.num_branches)
        yield Choice(
          mode=each.mode,
          tree=tree,
          alpha=each.alpha(block),
          cycle=_cycle(costs, each, tree) / costs.verification(1),
        )


def _cycle(costs: CostTable, each: Acceptance, tree: TreeConfig) -> float:
  """Milliseconds of a cycle."""
  policy = POLICIES[each.mode]
  verified = costs.verification(policy.num_nodes(tree))
  # A cycle that drafts nothing is a step of `ar`.
  total = each.drafting * verified
  total += (1 - each.drafting) * costs.verification(1)
  if policy.num_drafters:
    total += costs.draft(0, tree.block_size)
  if tree.num_branches:
    second = policy.num_drafters - 1
    total += costs.draft(second, tree.num_branches * tree.branch_size)
  return total

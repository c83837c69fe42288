"""What an ablation compares: arms of one training run, in groups."""

import contextlib
import dataclasses
import graphlib
import re
from collections.abc import Iterator, Mapping, Sequence

from d2sd_jax import cli
from d2sd_jax.config import TreeConfig, from_mapping
from d2sd_jax.errors import UsageError, require, require_at_least
from d2sd_jax.io.drafter_format import read_drafter_config
from d2sd_jax.io.models import read_target_config
from d2sd_jax.io.paths import find_checkpoint
from d2sd_jax.training.run import (
  check_config,
  check_first_drafter,
  check_same_shape,
  drafter_config,
)
from d2sd_jax.training.train_config import TrainConfig

# What stands before an arm's name where its drafter is meant, not a folder.
ARM = "arm:"
# The same tokens in the same order, and one target, for all arms.
SHARED_FIELDS = (
  *("target", "corpus", "heldout", "max_length", "batch_size", "num_steps"),
  *("dtype", "seed", "mesh", "shard_target", "eval_sequences"),
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationConfig:
  """One ablation.

  Attributes:
    base: a config of `train.py`, a file or a shipped name.
    overrides: of the base, for all arms alike.
    arms: by name, what an arm changes of `TrainConfig`. `init_from` and
      `first_drafter` may be `arm:NAME`, the drafter of another arm.
    decodings: by name, another way to decode with the drafters of an `arm`:
      fields of `TreeConfig`.
    groups: by name, the arms that are compared, the baseline first.
    drafter: drafter 1 beside every arm that is a drafter 2: a folder, a
      shipped name or `arm:NAME`.
    num_prompts: the first of `heldout` that are decoded; fewer where there
      are fewer.
    decode_batch_size: rows decoded together.
    out: the results file; the tables are written beside it, and the drafters
      into a folder of its name.
  """

  base: str
  overrides: dict
  arms: dict
  decodings: dict
  groups: dict
  drafter: str
  num_prompts: int = 128
  max_new_tokens: int = 128
  decode_batch_size: int = 64
  num_branches: int = 4
  out: str = "results/ablation.json"

  def __post_init__(self):
    require_at_least(self, 1, "num_prompts", "decode_batch_size")
    require_at_least(self, 2, "max_new_tokens")
    require_at_least(self, 0, "num_branches")
    for field in ("arms", "decodings"):
      for name, changes in getattr(self, field).items():
        fits = isinstance(name, str) and bool(_NAME.fullmatch(name))
        require(fits, field, name, "names of letters, digits, _, - and .")
        fits = isinstance(changes, Mapping)
        require(fits, f"{field}.{name}", changes, "fields by name")
    both = sorted(self.arms.keys() & self.decodings.keys())
    require(not both, "decodings", both, "names that are no arms'")
    names = [*self.arms, *self.decodings]
    for group, members in self.groups.items():
      fits = isinstance(members, Sequence) and not isinstance(members, str)
      fits = fits and 1 < len(members) == len(set(members))
      expected = "a baseline and other arms, each once"
      require(fits, f"groups.{group}", members, expected)
      for place, name in enumerate(members):
        field = f"groups.{group}" + ("" if place else " (its baseline)")
        require(name in names, field, name, f"one of {', '.join(names)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """One arm, made definite.

  Attributes:
    name: of the arm.
    train: the run of its drafter.
    tree: sizes to decode with.
    trained_as: the arm whose drafter it is; its own name unless it only
      decodes.
    drafter: drafter 1, if the arm's own is a drafter 2.
  """

  name: str
  train: TrainConfig
  tree: TreeConfig
  trained_as: str
  drafter: str | None

  @property
  def is_trained(self) -> bool:
    """Whether it has a drafter of its own."""
    return self.trained_as == self.name

  @property
  def mode(self) -> str:
    """How it is decoded with."""
    return "dflash" if self.drafter is None else "d2sd"

  @property
  def needs(self) -> list[str]:
    """Arms whose drafters it cannot do without."""
    named = [self.drafter]
    if self.is_trained:
      named += [self.train.init_from, self.train.first_drafter]
    arms = [name for name in map(_arm_of, named) if name]
    return arms if self.is_trained else [self.trained_as, *arms]


def make_arms(config: AblationConfig, base: TrainConfig) -> dict[str, Arm]:
  """All arms, each behind those whose drafters it needs.

  Args:
    config: the ablation.
    base: what its arms change; see `load_base`.

  Raises:
    UsageError: an arm has an unknown field or a bad value, changes what all
      share, or needs a drafter that cannot be there before its own.
  """
  arms: dict[str, Arm] = {}
  for name, changes in config.arms.items():
    with _naming(f"arms.{name}"):
      for field in SHARED_FIELDS:
        expected = "nothing: `overrides` sets it, for all arms alike"
        require(field not in changes, field, changes.get(field), expected)
      train = from_mapping(TrainConfig, {**vars(base), **changes})
      second = train.role == "vp_drafter"
      branches = config.num_branches if second else 0
      arms[name] = Arm(
        name=name,
        train=train,
        tree=TreeConfig(block_size=train.block_size, num_branches=branches),
        trained_as=name,
        drafter=config.drafter if second else None,
      )
  for name, changes in config.decodings.items():
    with _naming(f"decodings.{name}"):
      changes = dict(changes)
      of = changes.pop("arm", None)
      expected = f"one of {', '.join(config.arms)}"
      require(of in config.arms, "arm", of, expected)
      tree = {**vars(arms[of].tree), **changes}
      arms[name] = dataclasses.replace(
        arms[of], name=name, tree=from_mapping(TreeConfig, tree)
      )
  for arm in arms.values():
    with _naming(f"arms.{arm.name}"):
      _check_needs(arm, arms)
  needs = {name: arm.needs for name, arm in arms.items()}
  try:
    order = [*graphlib.TopologicalSorter(needs).static_order()]
  except graphlib.CycleError as error:
    circle = ", ".join(error.args[1])
    raise UsageError(f"arms: {circle} need each other's drafters") from error
  return {name: arms[name] for name in order}


def load_base(config: AblationConfig) -> TrainConfig:
  """The run that the arms change.

  Raises:
    UsageError: there is no such config, it has an unknown key or a bad value,
      or wants several devices.
  """
  with _naming("base"):
    base = cli.load_config(TrainConfig, config.base, config.overrides)
    one = "None: arms are decoded on one device"
    require(base.mesh is None, "mesh", base.mesh, one)
  return base


def check_arms(arms: Mapping[str, Arm], base: TrainConfig) -> None:
  """What can be known to be wrong before anything is loaded.

  Raises:
    UsageError: a file is missing, or a size or a drafter does not fit.
  """
  target = read_target_config(base.target)
  with _naming("base"):
    check_config(dataclasses.replace(base, init_from=None, first_drafter=None))
  for arm in (arm for arm in arms.values() if arm.is_trained):
    with _naming(f"arms.{arm.name}"):
      # Drafters of other arms are not there yet; their shapes are known.
      start, first = arm.train.init_from, arm.train.first_drafter
      check_config(
        dataclasses.replace(
          arm.train,
          init_from=None if _arm_of(start) else start,
          first_drafter=None if _arm_of(first) else first,
        )
      )
      shape_of = lambda name: drafter_config(arms[name].train, target)
      if name := _arm_of(start):
        check_same_shape(shape_of(name), shape_of(arm.name))
      if name := _arm_of(first):
        check_first_drafter(shape_of(name), shape_of(arm.name))
    if arm.drafter is not None and not arm.drafter.startswith(ARM):
      folder = find_checkpoint(arm.drafter, "drafter")
      read_drafter_config(folder, target, "drafter")


def _arm_of(drafter: str | None) -> str:
  """The arm whose drafter is meant; empty if it is none's."""
  named = (drafter or "").partition(ARM)
  return named[2] if not named[0] else ""


def _check_needs(arm: Arm, arms: Mapping[str, Arm]) -> None:
  """Drafters are those of arms that train one, and drafter 1 is one."""
  trained = [name for name, other in arms.items() if other.is_trained]
  for name in arm.needs:
    expected = f"the drafter of one of {', '.join(trained)}"
    require(name in trained, "needs", f"{ARM}{name}", expected)
  if arm.drafter is not None and arm.drafter.startswith(ARM):
    role = arms[arm.drafter.removeprefix(ARM)].train.role
    require(role == "dflash", f"drafter={arm.drafter!r} role", role, "dflash")


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
  """Says of a mistake whose it is."""
  try:
    yield
  except UsageError as error:
    raise UsageError(f"{what}: {error}") from error

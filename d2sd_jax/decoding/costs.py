"""What passes of the models cost on this device: measured once, then kept.

The table is a handful of compiled programs of the real models: the target
over a few sizes of a chain, and each drafter over a few blocks. A pass of
another size is interpolated in its number of slots.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sd_jax import __version__
from d2sd_jax.boundary import token_confidence
from d2sd_jax.decoding.state import Models
from d2sd_jax.io.paths import atomic_write, cache_dir
from d2sd_jax.kernels.device import compiler_options
from d2sd_jax.models.cache import append
from d2sd_jax.sampling import Sampling
from d2sd_jax.timing import time_step
from d2sd_jax.tree import chain_tree
from d2sd_jax.verify import longest_accepted_path, target_choices

COSTS_FILE = "costs.json"
# Slots of a row that are measured: lines between them are straight enough.
VERIFY_SIZES = (1, 2, 6, 16, 72)
DRAFT_SIZES = (4, 16, 64)
_REPEATS, _SECONDS = 3, 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostTable:
  """Milliseconds of a pass by its slots a row.

  Attributes:
    verify: of the target, its choices included.
    drafts: of each drafter, with the head and its share of a commit.
  """

  verify: Mapping[int, float]
  drafts: tuple[Mapping[int, float], ...]

  def verification(self, nodes: int) -> float:
    """Milliseconds to verify so many nodes."""
    return _interpolate(self.verify, nodes)

  def draft(self, index: int, slots: int) -> float:
    """Milliseconds for a drafter to fill so many slots, in all its blocks."""
    return _interpolate(self.drafts[index], slots)


def _interpolate(table: Mapping[int, float], size: int) -> float:
  """A straight line between neighbours; beyond the last, its last slope."""
  sizes = sorted(table)
  times = [table[s] for s in sizes]
  if size > sizes[-1]:
    slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
    return times[-1] + max(slope, 0) * (size - sizes[-1])
  return float(np.interp(size, sizes, times))


def cost_table(
  models: Models,
  batch: int,
  capacity: int,
  progress: Callable[[str], None] = lambda name: None,
) -> CostTable:
  """The table of these models on the default device; read where it is kept.

  Args:
    models: target and all drafters there are.
    batch: rows decoded together.
    capacity: of the caches.
    progress: told the name of each program before it is compiled and timed.
  """
  path = cache_dir() / COSTS_FILE
  key = _key(models, batch, capacity)
  try:
    kept = json.loads(path.read_text(encoding="utf-8"))
    return _from_json(kept[key])
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    pass  # Not measured yet, or not by this version.
  table = _measure(models, batch, capacity, progress)
  try:
    others = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    others = {}
  kept = others if isinstance(others, dict) else {}
  try:
    with atomic_write(path) as temporary:
      text = json.dumps({**kept, key: dataclasses.asdict(table)}, indent=1)
      temporary.write_text(text + "\n", encoding="utf-8")
  except OSError:
    pass  # A folder that cannot be written to costs time, not the run.
  return table


def _from_json(row: Mapping[str, Any]) -> CostTable:
  numbers = lambda times: {int(n): float(ms) for n, ms in times.items()}
  return CostTable(
    verify=numbers(row["verify"]), drafts=tuple(map(numbers, row["drafts"]))
  )


def _key(models: Models, batch: int, capacity: int) -> str:
  """Device, versions, shapes, what XLA is told, and the code: as times are."""
  device = jax.devices()[0]
  told = compiler_options(one_device=True), os.environ.get("XLA_FLAGS", "")
  sizes = (_shapes(models), batch, capacity, VERIFY_SIZES, DRAFT_SIZES)
  digest = hashlib.sha256(repr((sizes, told)).encode())
  for source in _sources():
    digest.update(source.read_bytes())
  parts = (
    *(device.device_kind, f"{os.cpu_count()} cores"),
    *(f"jax {jax.__version__}", f"d2sd {__version__}", digest.hexdigest()[:16]),
  )
  return ", ".join(parts)


def _sources() -> list[Path]:
  """What was timed, and how: a table is of that code."""
  package = Path(__file__).parents[1]
  folders = (package / name for name in ("kernels", "models"))
  timed = sorted(path for folder in folders for path in folder.rglob("*.py"))
  return [*timed, package / "timing.py", Path(__file__)]


def _shapes(model: Any) -> str:
  return repr([(x.shape, x.dtype.name) for x in jax.tree.leaves(model)])


def _measure(
  models: Models,
  batch: int,
  capacity: int,
  progress: Callable[[str], None],
) -> CostTable:
  def times(
    sizes: Iterable[int], name: str, make: Callable[[int], Sequence[Any]]
  ) -> dict[int, float]:
    found = {}
    for size in sizes:
      progress(f"{name} of {size}")
      timing = time_step(*make(size), repeats=_REPEATS, seconds=_SECONDS)
      found[size] = timing.median
    return found

  lengths = jnp.full((batch,), capacity // 2, jnp.int32)
  verify = lambda size: _verification(models, lengths, capacity, size)
  draft = lambda i: lambda size: _draft(models, i, lengths, capacity, size)
  largest = capacity - capacity // 2
  fitting = [size for size in VERIFY_SIZES if size <= largest]
  verified = times(fitting, "verification", verify)
  # Drafters of the same shape, as a pair has it, cost the same.
  kinds = [(_shapes(d), d.config.block_size) for d in models.drafters]
  drafted = {
    kind: times(DRAFT_SIZES, f"draft {i + 1}", draft(i))
    for kind, i in {kind: kinds.index(kind) for kind in kinds}.items()
  }
  drafts = tuple(drafted[kind] for kind in kinds)
  return CostTable(verify=verified, drafts=drafts)


def _verification(
  models: Models, lengths: Any, capacity: int, size: int
) -> tuple[Any, ...]:
  """A step that verifies a chain and drafts the target's choices next."""
  batch = lengths.shape[0]

  def step(models, tokens, inputs):
    cache, lengths = inputs
    tree = chain_tree(tokens)
    scores = models.target.score_tree(tree, cache, lengths, models.taps)
    positions = lengths[:, None] + tree.depths
    rows = jnp.arange(batch, dtype=jnp.int32)
    choices = target_choices(scores.logits, positions, rows, Sampling.create())
    verdict = longest_accepted_path(tree, choices, size)
    return choices + 0 * verdict.path

  tokens = jnp.ones((batch, size), jnp.int32)
  cache = models.target.init_cache(batch, capacity)
  return step, models, tokens, (cache, lengths)


def _draft(
  models: Models, index: int, lengths: Any, capacity: int, slots: int
) -> tuple[Any, ...]:
  """A step that fills blocks and takes in the features of one path."""
  drafter = models.drafters[index]
  config = drafter.config
  block = min(config.block_size, slots)
  shape = (lengths.shape[0], slots // block, block)
  taps = len(config.target_layer_ids)
  features = jnp.ones((shape[0], block, taps, config.hidden_size))

  def step(models, carry, inputs):
    tokens, cache = carry
    features, lengths = inputs
    drafter = models.drafters[index]
    positions = lengths[:, None, None] + jnp.arange(block)
    hidden = drafter(
      models.target.embed(tokens),
      jnp.broadcast_to(positions, tokens.shape),
      *(cache, lengths),
    )
    logits = models.draft_logits(hidden)
    rows = drafter.context_kv(features.astype(hidden.dtype), positions[:, 0])
    sure = token_confidence(logits) > 2  # Never: keeps it in the program.
    tokens = jnp.argmax(logits, axis=-1) + sure
    return tokens.astype(jnp.int32), append(cache, rows, lengths)

  tokens = jnp.ones(shape, jnp.int32)
  cache = drafter.init_cache(shape[0], capacity)
  return step, models, (tokens, cache), (features, lengths)

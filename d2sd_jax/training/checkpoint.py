"""Checkpoints of a run: the whole state, and the config it belongs to."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from d2sd_jax.distributed import is_main
from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.drafter_format import WEIGHTS_FILE
from d2sd_jax.io.paths import (
  atomic_write,
  check_writable,
  find_checkpoint,
  user_path,
)
from d2sd_jax.training.step import TrainState
from d2sd_jax.training.train_config import TrainConfig

# Files whose contents, not whose names, a continuation must share.
DATA_FIELDS = ("corpus", "heldout")
# Fields that may change between a run and its continuation; of data and of a
# first drafter the name alone.
FREE_FIELDS = (
  *("log_every", "eval_every", "eval_sequences", "checkpoint_every"),
  *("mesh", "shard_target", "first_drafter"),
  *DATA_FIELDS,
)


class Checkpointer:
  """Saves and restores the state of one run in its work directory.

  Every process writes its own part of a state that is split over devices, all
  into one directory that they share. It is restored onto any mesh.
  """

  def __init__(self, workdir: str | Path, config: TrainConfig):
    """Opens `workdir`, or refuses one that holds another run.

    Raises:
      UsageError: the directory belongs to a run with another config, or on
        other data.
    """
    self.workdir = user_path(workdir).resolve()
    check_workdir(self.workdir, config)
    if is_main():
      with atomic_write(self.workdir / "config.json") as temporary:
        text = json.dumps(plain_config(config), indent=2, sort_keys=True)
        temporary.write_text(text + "\n", encoding="utf-8")
    self.manager = ocp.CheckpointManager(
      self.workdir / "checkpoints",
      options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True),
    )

  def save(self, state: TrainState) -> None:
    """Writes the state; it counts once it is whole, in the background."""
    step = int(state.step)
    if self.manager.latest_step() != step:
      self.manager.save(step, args=ocp.args.StandardSave(_as_dict(state)))

  def restore(self, state: TrainState) -> TrainState:
    """The newest whole checkpoint, placed as `state` is, or else `state`.

    Raises:
      UsageError: the newest checkpoint is damaged.
    """
    step = self.manager.latest_step()
    if step is None:
      return state
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(state))
    args = ocp.args.StandardRestore(like)
    try:
      return TrainState(**self.manager.restore(step, args=args))
    except Exception as error:  # Orbax raises whatever it meets
      self.close()
      raise UsageError(
        f"{self.workdir / 'checkpoints' / str(step)}: expected a whole"
        " checkpoint; delete it to go on from the one before, if any"
        f" ({type(error).__name__}: {error})"
      ) from error

  def close(self) -> None:
    """Waits for writes under way."""
    self.manager.wait_until_finished()
    self.manager.close()


def check_workdir(workdir: Path, config: TrainConfig) -> None:
  """Raises `UsageError` if `workdir` holds another run, or cannot hold one."""
  for folder in (workdir, workdir / "checkpoints"):
    usable = folder.is_dir() or not folder.exists()
    require(usable, "workdir", str(folder), "a folder, or a new name")
  check_writable("workdir", workdir, workdir)
  path = workdir / "config.json"
  if not path.is_file():
    return
  try:
    theirs = dict(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, TypeError) as error:
    raise UsageError(f"{path}: expected the config of a run") from error
  mine = plain_config(config)
  # A run from before a field was there has its default.
  theirs = {f.name: f.default for f in dataclasses.fields(config)} | theirs
  for key in sorted(mine.keys() | theirs.keys()):
    if key not in FREE_FIELDS and mine.get(key) != theirs.get(key):
      raise UsageError(
        f"workdir={str(workdir)!r}: holds a run with {key}="
        f"{theirs.get(key)!r}, expected {mine.get(key)!r} as configured"
      )


def plain_config(config: TrainConfig) -> dict:
  """The config as JSON gives it back, and the sha256 of what a run reads."""
  digests = {f"{k}_sha256": _sha256(getattr(config, k)) for k in DATA_FIELDS}
  if (first := config.first_drafter) is not None:
    weights = find_checkpoint(first, "first_drafter") / WEIGHTS_FILE
    digests["first_drafter_sha256"] = _sha256(str(weights))
  return json.loads(json.dumps(dataclasses.asdict(config))) | digests


def _sha256(name: str) -> str | None:
  """Checksum of a file; `None` where there is none."""
  path = user_path(name)
  if not path.is_file():
    return None
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _as_dict(state: TrainState) -> dict:
  """The state as Orbax takes it: a plain dictionary of pytrees."""
  fields = dataclasses.fields(state)
  return {field.name: getattr(state, field.name) for field in fields}

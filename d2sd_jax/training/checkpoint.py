"""Checkpoints of a run: the whole state, and the config it belongs to."""

import dataclasses
import json
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from d2sd_jax.config import TrainConfig
from d2sd_jax.errors import UsageError
from d2sd_jax.io.paths import atomic_write
from d2sd_jax.training.step import TrainState

# Fields that may change between a run and its continuation.
FREE_FIELDS = ("log_every", "eval_every", "eval_sequences", "checkpoint_every")


class Checkpointer:
  """Saves and restores the state of one run in its work directory."""

  def __init__(self, workdir: str | Path, config: TrainConfig):
    """Opens `workdir`, or refuses one that holds another run.

    Raises:
      UsageError: the directory belongs to a run with another config.
    """
    self.workdir = Path(workdir).expanduser().resolve()
    self._check_config(config)
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
    """The newest whole checkpoint, or `state` where there is none."""
    step = self.manager.latest_step()
    if step is None:
      return state
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(state))
    args = ocp.args.StandardRestore(like)
    return TrainState(**self.manager.restore(step, args=args))

  def close(self) -> None:
    """Waits for writes under way."""
    self.manager.wait_until_finished()
    self.manager.close()

  def _check_config(self, config: TrainConfig) -> None:
    path = self.workdir / "config.json"
    mine = json.loads(json.dumps(dataclasses.asdict(config)))
    if path.is_file():
      theirs = json.loads(path.read_text(encoding="utf-8"))
      for key in sorted(mine.keys() | theirs.keys()):
        if key not in FREE_FIELDS and mine.get(key) != theirs.get(key):
          raise UsageError(
            f"workdir={str(self.workdir)!r}: holds a run with {key}="
            f"{theirs.get(key)!r}, expected {mine.get(key)!r} as configured"
          )
      return
    with atomic_write(path) as temporary:
      text = json.dumps(mine, indent=2, sort_keys=True)
      temporary.write_text(text + "\n", encoding="utf-8")


def _as_dict(state: TrainState) -> dict:
  """The state as Orbax takes it: a plain dictionary of pytrees."""
  fields = dataclasses.fields(state)
  return {field.name: getattr(state, field.name) for field in fields}

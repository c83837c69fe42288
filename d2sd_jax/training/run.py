"""What every run shares: its checks, its drafter, its data, its evaluation."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from d2sd_jax.config import (
  DrafterConfig,
  TargetConfig,
  default_target_layer_ids,
)
from d2sd_jax.errors import require
from d2sd_jax.io.drafter_format import read_drafter_config
from d2sd_jax.io.models import load_drafter, read_target_config
from d2sd_jax.io.paths import find_checkpoint, user_path
from d2sd_jax.io.tokenizer import ChatTokenizer
from d2sd_jax.models.drafter import Drafter, FusedDrafter
from d2sd_jax.models.target import Target
from d2sd_jax.sharding import batch_shards, gather, replicate, shard_batch
from d2sd_jax.training.data import Records, eval_batches, read_conversations
from d2sd_jax.training.step import eval_step
from d2sd_jax.training.train_config import TrainConfig

# Least rows evaluated by one call; each row is all anchors of one sequence.
EVAL_BATCH = 16


def drafter_config(config: TrainConfig, target: TargetConfig) -> DrafterConfig:
  """A drafter shaped like the target's layers, only fewer of them."""
  ids = config.target_layer_ids or default_target_layer_ids(
    target.num_layers, config.num_layers, "num_layers"
  )
  return DrafterConfig(
    vocab_size=target.vocab_size,
    hidden_size=target.hidden_size,
    intermediate_size=target.intermediate_size,
    num_layers=config.num_layers,
    num_heads=target.num_heads,
    num_kv_heads=target.num_kv_heads,
    head_dim=target.head_dim,
    rope_theta=target.rope_theta,
    rms_norm_eps=1e-6,
    max_length=target.max_length,
    block_size=config.block_size,
    mask_token_id=config.mask_token_id,
    target_layer_ids=ids,
    num_target_layers=target.num_layers,
    training_mode=config.role,
    prefix_weight_base=config.prefix_decay,
  )


def check_config(config: TrainConfig) -> None:
  """What can be known to be wrong before anything is fetched or loaded.

  Raises:
    UsageError: sizes do not fit the target, or files are not there.
  """
  target = read_target_config(config.target)
  wanted = drafter_config(config, target)
  fits = config.max_length <= target.max_length
  expected = f"at most the target's {target.max_length}"
  require(fits, "max_length", config.max_length, expected)
  for field in ("corpus", "heldout"):
    path = getattr(config, field)
    is_file = user_path(path).is_file()
    require(is_file, field, path, "a file of JSON lines")
  if config.init_from is not None:
    folder = find_checkpoint(config.init_from, "init_from")
    check_same_shape(read_drafter_config(folder, target, "init_from"), wanted)
  if config.first_drafter is not None:
    folder = find_checkpoint(config.first_drafter, "first_drafter")
    first = read_drafter_config(folder, target, "first_drafter")
    check_first_drafter(first, wanted)
  fits = config.num_anchors <= config.max_length
  require(fits, "num_anchors", config.num_anchors, "at most max_length")


def check_same_shape(theirs: DrafterConfig, mine: DrafterConfig) -> None:
  """A drafter to start from may differ in role, block and prior only."""
  for field in dataclasses.fields(DrafterConfig):
    if field.name not in ("block_size", "training_mode", "prefix_weight_base"):
      found, wanted = getattr(theirs, field.name), getattr(mine, field.name)
      require(found == wanted, f"init_from {field.name}", found, f"{wanted}")


def check_first_drafter(theirs: DrafterConfig, mine: DrafterConfig) -> None:
  """A first drafter reads what the second does, and drafts as far.

  Raises:
    UsageError: it is none, or does not.
  """
  role = theirs.training_mode
  require(role == "dflash", "first_drafter role", role, "dflash")
  for field in ("target_layer_ids", "mask_token_id", "block_size"):
    found, wanted = getattr(theirs, field), getattr(mine, field)
    require(found == wanted, f"first_drafter {field}", found, f"{wanted}")


def read_data(
  config: TrainConfig, tokenizer: ChatTokenizer
) -> tuple[Records, Records]:
  """The conversations to train on, and those held out.

  Raises:
    UsageError: see `read_conversations`.
  """
  read = lambda field: read_conversations(
    getattr(config, field),
    config.max_length,
    tokenizer,
    tokenizer.vocab_size,
    field,
  )
  return read("corpus"), read("heldout")


def init_drafter(config: TrainConfig, target: TargetConfig) -> Drafter:
  """Random weights, or those of `init_from` under this run's config."""
  wanted = drafter_config(config, target)
  if config.init_from is None:
    return Drafter(wanted, rngs=nnx.Rngs(config.seed))
  drafter = load_drafter(config.init_from, target)
  drafter.config = wanted
  return drafter


def load_first_drafter(
  config: TrainConfig, target: TargetConfig, mesh: Mesh
) -> FusedDrafter | None:
  """`first_drafter` of a run, if any: frozen, whole on every device."""
  if config.first_drafter is None:
    return None
  drafter = load_drafter(config.first_drafter, target, config.dtype)
  return replicate(mesh, drafter.fuse())


def trained_drafter(graphdef: nnx.GraphDef, params: Any, mesh: Mesh) -> Drafter:
  """The drafter of a state's weights, whole on every device."""
  return nnx.merge(graphdef, _whole(mesh, params))


@functools.partial(jax.jit, static_argnums=0)
def _whole(mesh: Mesh, params: Any) -> Any:
  return gather(mesh, params)


def evaluate(
  graphdef: nnx.GraphDef,
  params: Any,
  target: Target,
  records: Records,
  config: TrainConfig,
  mesh: Mesh,
) -> dict[str, Any]:
  """α simulated over all anchors, and accuracy by slot, on held-out data."""
  sums, shards = None, batch_shards(mesh.shape)
  for batch in eval_batches(records, math.ceil(EVAL_BATCH / shards) * shards):
    batch = shard_batch(mesh, batch)
    part = eval_step(graphdef, params, target, batch, config=config, mesh=mesh)
    sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
  sums = jax.device_get(sums)
  by_slot = sums["correct"] / sums["supervised"].clip(1)
  return {
    "heldout_alpha": 1 + float(sums["accepted"] / max(sums["anchors"], 1)),
    "heldout_accuracy": [round(float(x), 4) for x in by_slot],
  }

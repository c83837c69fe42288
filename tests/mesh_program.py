"""Prints, as JSON, which messages training's compiled programs exchange."""

import json
import re
import sys

import jax
import numpy as np
import tiny
from flax import nnx

from d2sd_jax import Drafter
from d2sd_jax.sharding import make_mesh, shard_batch, shard_weights
from d2sd_jax.training import losses
from d2sd_jax.training.blocks import Conversations
from d2sd_jax.training.step import eval_step, init_train_state, train_step
from d2sd_jax.training.train_config import TrainConfig

_CALL = re.compile(
  r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|"
  r"reduce-scatter)(?:-start)?\("
)
_SHAPE = re.compile(r"\b[a-z]+\d*\[([\d,]*)\]")


def collectives(program):
  """Kind and shape of every array that is exchanged."""
  return [
    (kind, [int(n) for n in shape.split(",") if n])
    for result, kind in _CALL.findall(program.as_text())
    for shape in _SHAPE.findall(result)
  ]


def main():
  losses.MAX_ROWS = 8  # several turns of its loop
  config = TrainConfig(
    corpus="corpus.jsonl",
    heldout="heldout.jsonl",
    role="vp_drafter",
    num_layers=tiny.VP.num_layers,
    block_size=tiny.VP.block_size,
    num_anchors=6,
    max_length=18,
    batch_size=8,
    dtype="float32",
    mesh="fsdp:8",
  )
  mesh = make_mesh(config.mesh)
  drafter = Drafter(tiny.VP, rngs=nnx.Rngs(0))
  graphdef, state = init_train_state(drafter, config)
  state = shard_weights(mesh, state)
  target = shard_weights(mesh, tiny.target())
  rows = Conversations(
    tokens=np.ones((8, 18), np.int32),
    prompt_lengths=np.full(8, 4, np.int32),
    lengths=np.arange(10, 18, dtype=np.int32),
  )
  batch = shard_batch(mesh, rows)
  leaves = jax.tree.leaves((state.params, target))
  split = [x.shape for x in leaves if not x.sharding.is_fully_replicated]
  weights = [x.shape for x in jax.tree.leaves(state.params)]
  # Gradients are summed as the fused matrices' own, before they are cut apart;
  # those of the norms head by head.
  fused = [x.shape for x in jax.tree.leaves(drafter.fuse())]
  heads = tiny.VP.num_heads + tiny.VP.num_kv_heads
  fused.append((heads, tiny.VP.head_dim))
  train = train_step.lower(
    graphdef, state, target, batch, config=config, mesh=mesh
  )
  evaluate = eval_step.lower(
    graphdef, state.params, target, batch, config=config, mesh=mesh
  )
  programs = {
    name: {
      "collectives": collectives(lowered.compile()),
      "split": split,
      "weights": weights,
      "fused": fused,
    }
    for name, lowered in (("train", train), ("eval", evaluate))
  }
  print(json.dumps(programs), file=sys.stderr)


if __name__ == "__main__":
  main()

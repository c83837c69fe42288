"""Runs of `train.py` in a process of its own, for `test_mesh.py`.

    python mesh_worker.py '[["--config=...", "--workdir=..."], ...]'

Of each checkpoint the weights are also written at full precision, to
`weights.npz` in the work directory. `WORKER_FLOAT64=1` makes every float32 of
the program a float64; `WORKER_DIES_AT=n` kills the process after n updates,
when the folder `WORKER_DIES_AFTER` is there.
"""

import json
import os
import signal
import sys
import time

import jax

if os.environ.get("WORKER_FLOAT64"):
  import jax.numpy as jnp

  jax.config.update("jax_enable_x64", True)
  # Read as an attribute wherever a dtype is chosen; so said before others look.
  jnp.float32 = jnp.float64
  from d2sd_jax import config

  config.DTYPES = (*config.DTYPES, "float64")

import numpy as np

import train
from d2sd_jax import cli
from d2sd_jax.training.data import Batches


def save_drafter(drafter, folder, inner=train.save_drafter):
  inner(drafter, folder)
  weights = {
    "/".join(map(str, path)): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(drafter)
  }
  np.savez(folder.parent / "weights.npz", **weights)


def read_batch(batches, step, inner=Batches.__getitem__):
  if step == int(os.environ.get("WORKER_DIES_AT", -1)):
    # Checkpoints are written in the background.
    while not os.path.isdir(os.environ["WORKER_DIES_AFTER"]):
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
  return inner(batches, step)


def main():
  train.save_drafter = save_drafter
  Batches.__getitem__ = read_batch
  cli.setup_jax_cache = lambda: None
  for flags in json.loads(sys.argv[1]):
    status = cli.run(train.main, flags)
    if status:
      cli.exit_with(status)
  cli.exit_with(0)


if __name__ == "__main__":
  main()

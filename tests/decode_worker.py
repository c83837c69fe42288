"""Decodes tiny targets on meshes for `test_decode_mesh.py`, in its own process.

    python decode_worker.py '[{"target": "3 of 24", "mesh": "tensor:8", ...}]'

prints, as JSON, what each case gave: answers, tokens by cycle, and how many
arrays do not lie where `placement` says, or hold other parts if `turned`.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from d2sd_jax import Models, Sampling, TreeConfig, UsageError
from d2sd_jax.decoding.answers import Request
from d2sd_jax.decoding.placement import (
  WHOLE,
  model_specs,
  put,
  put_drafter,
  shardings,
)
from d2sd_jax.decoding.policies import POLICIES
from d2sd_jax.decoding.session import Session
from d2sd_jax.io import hf_tensors
from d2sd_jax.io.hf_tensors import target_from_tensors
from d2sd_jax.kernels import transposed
from d2sd_jax.sharding import DECODING_AXES, make_mesh

# Key heads and query heads of each target.
TARGETS = {
  f"{kv} of {heads}": dataclasses.replace(
    tiny.TARGET, num_heads=heads, num_kv_heads=kv
  )
  for kv, heads in ((2, 8), (3, 24), (8, 24))
} | {"gpt_oss": tiny.GPT_OSS}
# Ragged, and one more row than most batches take.
PROMPTS = ([5, 9, 3], [1, 2, 3, 4, 5, 6, 7], [8], [4, 4, 4, 1, 9], [60, 2])
TREE = TreeConfig(block_size=5, num_branches=2)
NEW = 17


def drafters(mesh, split):
  """Both drafters, on the mesh."""
  made = (tiny.drafter(tiny.DFLASH, 3), tiny.drafter(tiny.VP, 4))
  fused = [drafter.fuse() for drafter in made]
  if mesh is None:
    return fused
  return [put_drafter(drafter, mesh, split=split) for drafter in fused]


def planted(target, answers, mesh):
  """Drafters that are right two times of three; every device has all rows."""
  size = max(len(p) for p in PROMPTS) + NEW + 2 * TREE.block_size
  plan = np.zeros((len(PROMPTS), size), np.int32)
  for row, prompt, answer in zip(plan, PROMPTS, answers, strict=True):
    row[: len(prompt) + len(answer)] = [*prompt, *answer]
  rng = np.random.default_rng(0)
  whole = lambda x: put(mesh, x, jax.tree.map(lambda _: WHOLE, x))
  return [
    whole(
      tiny.PlantedDrafter(
        inner=drafter,
        tokens=plan,
        wrong=(rng.random(plan.shape) < rate).astype(np.int32),
        sharpness=np.full(plan.shape, 0.3, np.float32),
        directions=target.lm_head[: target.config.vocab_size],
      )
    )
    for drafter, rate in zip(drafters(None, False), (0.4, 0.2), strict=True)
  ]


def store(turned):
  """Models that are made from now on hold their matrices that way."""
  for module in (hf_tensors, transposed):
    module.stores_transposed = lambda: turned


def moved(turned, plain):
  """How many arrays' parts are not the same numbers on the same devices."""
  is_turned = lambda x: isinstance(x, transposed.Transposed)
  parts = lambda x: {s.device.id: s.data for s in x.addressable_shards}

  def differs(one, other):
    own = parts(one.stored if is_turned(one) else one)
    if is_turned(one):
      own = {i: x.T for i, x in own.items()}
    return not jax.tree.all(jax.tree.map(np.array_equal, own, parts(other)))

  differ = jax.tree.map(differs, turned, plain, is_leaf=is_turned)
  return sum(jax.tree.leaves(differ))


def decode(
  target,
  mesh=None,
  mode="d2sd",
  split=False,
  int8=False,
  plant=None,
  turned=False,
  **sampling,
):
  """Answers, tokens of each cycle, and how many arrays lie elsewhere."""
  config = TARGETS[target]
  mesh = mesh and make_mesh(mesh, DECODING_AXES)
  tensors = tiny.target_tensors(config, 0)
  load = lambda: target_from_tensors(config, tensors, jnp.float32, mesh=mesh)
  astray, weights = 0, load()
  if plant:
    whole = target_from_tensors(config, tensors, jnp.float32)
    given = planted(whole, plant, mesh)
  else:
    given = drafters(mesh, split)
  if turned:
    plain = weights, given
    store(True)
    weights, given = load(), drafters(mesh, split)
    store(False)
    astray = moved((weights, given), plain)
  used = tuple(given[: POLICIES[mode].num_drafters])
  models = Models(target=weights, drafters=used, mesh=mesh)
  if int8:
    models = models.with_int8_drafting()
  if mesh is not None:
    places = shardings(mesh, model_specs(models))
    pairs = zip(jax.tree.leaves(models), jax.tree.leaves(places), strict=True)
    astray += sum(not x.sharding.is_equivalent_to(p, x.ndim) for x, p in pairs)
  requests = [
    Request(sequence_id=2 * i, tokens=tuple(p)) for i, p in enumerate(PROMPTS)
  ]
  session = Session(
    models,
    requests,
    Sampling.create(**sampling),
    mode=mode,
    tree=TREE,
    max_new_tokens=NEW,
    stop_ids=(7, 11, 23, 40, 55),
    batch_size=len(PROMPTS) if plant else 4,
  )
  answers = [a for b in session.batches() for a in session.decode(b)]
  return {
    "tokens": [a.tokens for a in answers],
    "cycles": [a.accepted_per_cycle for a in answers],
    "astray": astray,
  }


def main():
  for case in json.loads(sys.argv[1]):
    try:
      found = decode(**case)
    except UsageError as error:
      found = {"error": str(error)}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
  main()

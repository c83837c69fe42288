"""A decode loop writes its caches in place, whatever drafts."""

import re

import jax
import jax.numpy as jnp
import pytest
import tiny

from d2sd_jax import POLICIES, Models, Sampling, TreeConfig, generate


@pytest.mark.parametrize(
  "mode",
  [
    pytest.param("ar", marks=pytest.mark.slow),
    pytest.param("prompt_lookup", marks=pytest.mark.slow),
    "dflash",
  ],
)
def test_no_mode_copies_a_cache(mode):
  """`tests/test_aot.py` looks at other devices, and at one mode."""
  drafters = (tiny.drafter(tiny.DFLASH, 1), tiny.drafter(tiny.VP, 2))
  drafters = drafters[: POLICIES[mode].num_drafters]
  models = Models(target=tiny.target(0), drafters=drafters)
  start = lambda models: tiny.start(
    models, [[3, 9, 4]], max_new=[9], capacity=37
  )
  state = jax.eval_shape(start, models)
  config = TreeConfig(block_size=4, num_branches=2)
  hlo = generate.lower(
    models, state, Sampling.create(), jnp.int32(9), mode=mode, config=config
  ).compile()
  for cache in jax.tree.leaves((state.target_cache, state.drafter_caches)):
    sizes = ",".join(map(str, cache.shape))
    assert f"f32[{sizes}]" in hlo.as_text()
    copies = re.findall(rf"= f32\[{sizes}\]\S* copy\(", hlo.as_text())
    assert copies == []

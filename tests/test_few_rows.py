"""A few rows' products on Hopper: interpreted, lowered and on a GPU."""

import dataclasses

import jax
import pytest
from products import EPS, check, operands

from d2sd_jax.kernels import hopper
from d2sd_jax.kernels.linear import few_rows, linear
from d2sd_jax.kernels.transposed import Transposed

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Pallas's GPU interpreter came with jax 0.11, and that wants Python 3.12.
needs_kernels = pytest.mark.skipif(
  not hopper.has_kernels(), reason="needs jax 0.11 or newer"
)


@needs_kernels
@pytest.mark.parametrize(
  ("count", "width", "size", "plan", "around"),
  [
    # Blocks of all rows and of some, of which the last has fewer.
    (16, 128, 32, {}, {}),
    pytest.param(
      *(24, 192, 64, {"rows": 16}, {"normed": True, "gated": True}),
      marks=pytest.mark.slow,
    ),
    # Fewer stages than steps, and strips of two tiles.
    (40, 256, 64, {"stages": 2, "rows": 24}, {"normed": True, "added": True}),
    (8, 192, 64, {"stages": 2, "strip": 32}, {"added": True}),
    (16, 128, 128, {"strip": 32}, {"gated": True}),
    # Warpgroups, of which the last has a step fewer. (Three that wait would
    # hold all threads of a CPU of two cores, and the interpreter would stop.)
    (16, 320, 64, {"warpgroups": 2, "stages": 1}, {"added": True}),
    pytest.param(
      *(8, 320, 64, {"warpgroups": 2, "stages": 2}, {"normed": True}),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      *(24, 192, 64, {"warpgroups": 2}, {"normed": True, "gated": True}),
      marks=pytest.mark.slow,
    ),
    # Rows that are no whole chunk.
    (5, 128, 96, {}, {"normed": True, "gated": True, "added": True}),
  ],
)
def test_the_kernel(capsys, count, width, size, plan, around):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  around = {"normed": False, "gated": False, "added": False} | around
  given = operands(count, width, size, **around)
  x, stored, norm, residual = given
  gated = around["gated"]
  chosen = few_rows.choose_plan(
    count, size // (2 if gated else 1), width, 2 if gated else 1
  )
  got = few_rows.linear(
    *(x, stored, norm, EPS, gated, residual),
    plan=dataclasses.replace(chosen, **plan),
    interpret=plgpu.InterpretGPUParams(detect_races=True),
  )
  check(got, *given, gated)
  # Races are told, no more; and a wgmma is done at once here, so whether one
  # is waited for is up to `test_on_a_gpu`.
  assert "RACE" not in capsys.readouterr().out


@needs_kernels
@pytest.mark.parametrize("count", [1, 8, 13, 16, 64, 72, 128])
@pytest.mark.parametrize(
  ("width", "size", "parts"),
  [
    *[(576, 960, 1), (576, 576, 1), (576, 1536, 2), (1536, 576, 1)],
    *[(1024, 32, 1), (4096, 6144, 1), (4096, 12_288, 2), (12_288, 4096, 1)],
    # More blocks than multiprocessors, and no strips of 32; the widest rows.
    *[(768, 2128, 2), (few_rows.MOST_COLUMNS, 32, 1)],
  ],
)
def test_plans_cover_all_rows_and_fit(count, width, size, parts):
  from d2sd_jax.kernels.linear import few_rows_kernel

  plan = few_rows.choose_plan(count, size, width, parts)
  assert size % plan.strip == 0
  assert plan.rows % few_rows.CHUNK == 0
  assert 0 < plan.rows <= few_rows_kernel.ROWS
  slots, steps = plan.warpgroups * plan.stages, width // few_rows.COLUMNS
  assert 1 <= plan.warpgroups <= min(4, steps)
  assert 1 <= plan.stages <= -(-steps // plan.warpgroups)
  rows, strips = few_rows_kernel.ROWS, parts * plan.strip
  held = 2 * few_rows.COLUMNS * slots * (rows + strips) + 2 * width
  held += 4 * rows * (plan.warpgroups - 1) * (strips + 1)
  assert held + 2 * rows * plan.strip < 227 * 1024 - 1024


@needs_kernels
@pytest.mark.parametrize(
  "around",
  [
    {"normed": True, "gated": True, "added": False},
    {"normed": True, "gated": False, "added": False},
    {"normed": False, "gated": False, "added": True},
  ],
)
def test_it_lowers_for_cuda(around):
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    operands(72, 1536, 96, **around),
  )
  run = jax.jit(
    lambda x, w, n, r: few_rows.linear(x, w, n, EPS, around["gated"], r)
  )
  lowered = run.trace(*shapes).lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu_v2" in lowered.as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 8, 13, 16, 64, 72, 128])
@pytest.mark.parametrize(
  ("width", "size", "around"),
  [
    # SmolLM2's four products, and Qwen3-8B's.
    (576, 960, {"normed": True}),
    (576, 576, {"added": True}),
    (576, 3072, {"normed": True, "gated": True}),
    (1536, 576, {"added": True}),
    (4096, 6144, {"normed": True}),
    (4096, 24_576, {"normed": True, "gated": True}),
    (12_288, 4096, {"added": True}),
  ],
)
def test_on_a_gpu(count, width, size, around):
  around = {"normed": False, "gated": False, "added": False} | around
  given = operands(count, width, size, **around)
  x, stored, norm, residual = given
  got = linear(
    *(x, Transposed(stored=stored)),
    **{"norm": norm, "eps": EPS, "residual": residual},
    gated=around["gated"],
    implementation="few_rows",
  )
  check(got, *given, around["gated"])

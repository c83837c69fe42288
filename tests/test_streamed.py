"""A few rows times a large matrix on Hopper: interpreted, lowered, on a GPU."""

import jax
import jax.numpy as jnp
import pytest
from products import EPS, check, operands

from d2sd_jax.kernels import hopper, triton
from d2sd_jax.kernels.linear import linear, streamed
from d2sd_jax.kernels.transposed import Transposed

# Pallas's GPU interpreter came with jax 0.11, and that wants Python 3.12.
needs_kernels = pytest.mark.skipif(
  not hopper.has_kernels(), reason="needs jax 0.11 or newer"
)
AROUND = {"normed": False, "gated": False, "added": False}


@needs_kernels
@pytest.mark.parametrize(
  ("count", "width", "size", "columns", "stages", "around"),
  [
    (16, 128, 64, 64, 1, {}),
    # Fewer stages than steps, and rows that are no whole chunk.
    (21, 384, 128, 64, 2, {"normed": True, "gated": True}),
    (8, 384, 128, 128, 2, {"added": True}),
    # Stages enough for products that last into the next step.
    (16, 384, 64, 64, 3, {"gated": False, "added": True}),
  ],
)
def test_one_block(capsys, count, width, size, columns, stages, around):
  """Clusters of several are beyond the interpreter; see `test_on_a_gpu`."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  around = AROUND | around
  given = operands(count, width, size, **around)
  x, stored, norm, residual = given
  # The norm before it, too.
  with triton.interpreter():
    got = streamed.linear(
      *(x, stored, norm, EPS, around["gated"], residual),
      plan=streamed.Plan(halves=1, columns=columns, stages=stages),
      interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
  check(got, *given, around["gated"])
  # Races are told, no more; waits for wgmmas are up to `test_on_a_gpu`.
  assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize("count", [8, 16, 24, 64, 72, 80, 96, 120, 128])
@pytest.mark.parametrize(
  ("size", "width", "parts"),
  [
    *[(6144, 4096, 1), (4096, 4096, 1), (12_288, 4096, 2), (4096, 12_288, 1)],
    *[(4096, 20_480, 1), (10_240, 5120, 1), (25_600, 5120, 2), (64, 576, 1)],
    (10_240, 4096, 1),
  ],
)
def test_plans_cover_all_and_fit(count, size, width, parts):
  plan = streamed.choose_plan(count, size, width, parts)
  assert width % (plan.halves * plan.columns) == 0
  assert 1 <= plan.stages <= width // (plan.halves * plan.columns)
  # A thread has 255 registers.
  assert parts * count // 2 <= 160
  sizes = streamed.half_sizes(count, plan.halves)
  assert len(sizes) == plan.halves
  assert sum(sizes) == count
  assert all(0 < n <= sizes[0] and n % streamed.CHUNK == 0 for n in sizes)
  held = 2 * plan.columns * plan.stages * (parts * streamed.TILE + count)
  held += 4 * (plan.halves - 1) * parts * streamed.TILE * sizes[0]
  # Two blocks fit one multiprocessor where that many have to.
  each = 2 if 132 < size // streamed.TILE <= 264 else 1
  assert held + 2 * sizes[0] * streamed.TILE < 228 * 1024 // each - 2048


@pytest.mark.parametrize(
  ("count", "width", "size", "wins", "gated_wins"),
  [
    # Qwen3-8B's four products (gate and up is twice as long) and head.
    *[(72, 4096, n, True, True) for n in (6144, 4096, 12_288)],
    (72, 12_288, 4096, True, True),
    (72, 4096, 151_936, False, False),
    # With as many rows two blocks of gate and up do not fit side by side.
    *[(120, 4096, 6144, True, True), (120, 4096, 12_288, False, False)],
    # A draft's rows, too few, too many, q/k/v's fourth.
    *[(16, 4096, 6144, True, True), (9, 4096, 6144, True, True)],
    *[(8, 4096, 6144, False, False), (129, 4096, 6144, False, False)],
    (72, 4096, 1536, False, False),
    # A matrix of `few_rows`, and two of them.
    (72, 1024, 4096, False, True),
  ],
)
def test_where_it_is_the_default(
  monkeypatch, count, width, size, wins, gated_wins
):
  monkeypatch.setattr(hopper, "runs_here", lambda: True)
  bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  matrix = Transposed(stored=bf16(size, width))
  both = Transposed(stored=bf16(2 * size, width))
  x = bf16(1, count, width)
  assert streamed.wins(x, matrix) == wins
  assert streamed.wins(x, both, gated=True) == gated_wins
  reason = streamed.why_not(x, matrix)
  assert (reason is None) == (count <= 128)


def test_a_gated_product_goes_to_it(monkeypatch):
  """Of 132 tiles of each half, one for each multiprocessor."""
  monkeypatch.setattr(hopper, "runs_here", lambda: True)
  monkeypatch.setattr(streamed, "linear", lambda *_: "streamed")
  x = jnp.zeros((120, 256), jnp.bfloat16)
  both = Transposed(stored=jnp.zeros((2 * 132 * 64, 256), jnp.bfloat16))
  assert linear(x, both, gated=True) == "streamed"
  assert linear(x, both).shape == (120, 2 * 132 * 64)


@needs_kernels
@pytest.mark.parametrize(
  ("count", "size", "around"),
  [
    (80, 24_576, {"normed": True, "gated": True}),
    # Halves of as many rows, and of 40 and 32, 16 and 8, 64 and 56.
    *[(count, 4096, {"added": True}) for count in (80, 72, 24, 120)],
  ],
)
def test_it_lowers_for_cuda(count, size, around):
  around = AROUND | around
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    jax.eval_shape(lambda: operands(count, 4096, size, **around)),
  )
  run = jax.jit(
    lambda x, w, n, r: streamed.linear(x, w, n, EPS, around["gated"], r)
  )
  lowered = run.trace(*shapes).lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu_v2" in lowered.as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 13, 24, 64, 72, 80, 128])
@pytest.mark.parametrize(
  ("width", "size", "around"),
  [
    # Qwen3-8B's four products.
    (4096, 6144, {"normed": True}),
    (4096, 4096, {"added": True}),
    (4096, 24_576, {"normed": True, "gated": True}),
    (12_288, 4096, {"added": True}),
  ],
)
@pytest.mark.parametrize("halves", [None, 1, 2])
def test_on_a_gpu(count, width, size, around, halves):
  around = AROUND | around
  given = operands(count, width, size, **around)
  x, stored, norm, residual = given
  if halves is None or (halves == 2 and count <= streamed.CHUNK):
    got = linear(
      *(x, Transposed(stored=stored)),
      **{"norm": norm, "eps": EPS, "residual": residual},
      gated=around["gated"],
      implementation="streamed",
    )
  else:
    got = streamed.linear(
      *(x, stored, norm, EPS, around["gated"], residual),
      plan=streamed.Plan(halves=halves, columns=64, stages=3),
    )
  check(got, *given, around["gated"])

"""The Hopper kernel, in Pallas's interpreter and as far as it lowers here."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from d2sd_jax import UsageError, cascade_attention
from d2sd_jax.kernels import hopper
from d2sd_jax.kernels.cascade_attention import (
  CAUSAL,
  IMPLEMENTATIONS,
  Heads,
  mosaic_gpu,
)
from d2sd_jax.kernels.cascade_attention.api import default_implementation

# Pallas's GPU interpreter came with jax 0.11, and that wants Python 3.12.
needs_kernels = pytest.mark.skipif(
  not hopper.has_kernels(), reason="needs jax 0.11 or newer"
)


def _inputs(
  *, batch=3, groups=1, nodes=5, share=3, kv_heads=1, size=136, dim=64
):
  """Random bfloat16 operands, a random local mask, rows of many lengths."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: np.array(
    jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
  )
  arrays = [
    draw(batch, groups, nodes, kv_heads * share, dim),
    draw(batch, kv_heads, size, dim),
    draw(batch, kv_heads, size, dim),
    draw(batch, groups, nodes, kv_heads, dim),
    draw(batch, groups, nodes, kv_heads, dim),
  ]
  mask = rng.random((batch, groups, nodes, nodes)) < 0.5
  mask |= np.eye(nodes, dtype=bool)
  ends = np.array([size, min(size, 1), 0][:batch], np.int32)
  return arrays, {"prefix_end": ends, "local_mask": mask}


def _plan(warpgroups=1, blocks=1, block_keys=64, stages=2, splits=1):
  from d2sd_jax.kernels.cascade_attention import mosaic_gpu_kernel

  return mosaic_gpu_kernel.Plan(warpgroups, blocks, block_keys, stages, splits)


@pytest.fixture
def interpreted(monkeypatch):
  """`run(arrays, options, plan)`, watching every access to memory for races.

  On two cores the interpreter hangs with three warpgroups that compute.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def run(arrays, options, plan=None):
    attend = functools.partial(
      mosaic_gpu.cascade_attention,
      plan=plan,
      interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    monkeypatch.setitem(IMPLEMENTATIONS, "mosaic_gpu", attend)
    as_jax = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x
    return cascade_attention(
      *map(as_jax, arrays),
      **{name: as_jax(x) for name, x in options.items()},
      implementation="mosaic_gpu",
    )

  return run


def _check(got, arrays, options):
  """Against float64; bfloat16 rounds weights, values' sum and output."""
  assert got.dtype == arrays[0].dtype
  expected = oracles.cascade_attention(
    *(x.astype(np.float64) for x in arrays), **options
  )
  np.testing.assert_allclose(
    np.asarray(got, np.float64), expected, rtol=0.01, atol=0.01
  )


@needs_kernels
@pytest.mark.parametrize(
  ("sizes", "plan"),
  [
    # Full, one key, empty; no split, then more splits than some have tiles.
    ({}, {}),
    pytest.param(
      {"size": 200, "share": 1, "kv_heads": 2},
      {"splits": 3, "stages": 3},
      marks=pytest.mark.slow,
    ),
    # Local keys in more than one step; query tiles that no row fills.
    ({"nodes": 70, "batch": 1}, {"warpgroups": 2, "blocks": 2}),
    pytest.param(
      {"nodes": 9, "share": 8, "dim": 128},
      {"warpgroups": 2, "splits": 2},
      marks=pytest.mark.slow,
    ),
    ({"nodes": 1, "share": 4, "batch": 2}, {"block_keys": 128}),
    ({"size": 0, "batch": 1}, {}),
  ],
)
def test_sizes_and_plans(interpreted, sizes, plan):
  arrays, options = _inputs(**sizes)
  _check(interpreted(arrays, options, _plan(**plan)), arrays, options)


def _side_by_side(arrays, apart=True):
  """Queries and keys in one array; values behind others in another, or too."""
  query, *prefix, keys, values = arrays
  rotated = jnp.concatenate([query, keys], axis=3)
  raw = jnp.concatenate([rotated * jnp.nan, values], axis=3)
  if not apart:
    rotated = raw = jnp.concatenate([rotated, values], axis=3)
  heads, kv_heads = query.shape[3], keys.shape[3]
  return [
    Heads(array=rotated, first=0, count=heads),
    *prefix,
    Heads(array=rotated, first=heads, count=kv_heads),
    Heads(array=raw, first=heads + kv_heads, count=kv_heads),
  ]


@needs_kernels
@pytest.mark.parametrize(
  ("splits", "sizes"),
  [
    (1, {"nodes": 1}),
    pytest.param(1, {"nodes": 11, "kv_heads": 2}, marks=pytest.mark.slow),
    pytest.param(2, {"nodes": 1}, marks=pytest.mark.slow),
    pytest.param(2, {"nodes": 11, "kv_heads": 2}, marks=pytest.mark.slow),
  ],
)
def test_heads_are_read_where_they_lie(interpreted, sizes, splits):
  arrays, options = _inputs(batch=2, **sizes)
  together = _side_by_side(arrays, apart=splits == 1)
  got = interpreted(together, options, _plan(splits=splits, blocks=2))
  _check(got, arrays, options)


def test_heads_are_taken_out_for_whoever_cannot():
  arrays, options = _inputs(batch=2, kv_heads=2)
  got = cascade_attention(
    *_side_by_side(arrays),
    prefix_end=jnp.asarray(options["prefix_end"]),
    local_mask=jnp.asarray(options["local_mask"]),
  )
  _check(got, arrays, options)


@needs_kernels
@pytest.mark.parametrize(
  ("plan", "sinks"),
  [
    pytest.param({}, None, marks=pytest.mark.slow),
    ({"warpgroups": 2}, np.array([-2, 0.5, 3], np.float32)),
    ({"splits": 2}, np.array([60, 0.5, 3], np.float32)),
  ],
)
def test_groups_windows_and_sinks(interpreted, plan, sinks):
  arrays, options = _inputs(groups=3, batch=2, size=200)
  ends = np.array([[200, 33, 150], [0, 64, 1]], np.int32)
  # Node i stands at end + i; node 4 sees nothing of the prefix.
  starts = ends[:, :, None] + np.array([-300, -90, -64, -5, 0])
  options |= {"prefix_end": ends, "prefix_start": starts.astype(np.int32)}
  options["sinks"] = sinks
  _check(interpreted(arrays, options, _plan(**plan)), arrays, options)


@needs_kernels
@pytest.mark.parametrize(
  "plan",
  [
    {"blocks": 2},
    pytest.param({"warpgroups": 2, "splits": 2}, marks=pytest.mark.slow),
  ],
)
def test_what_lies_past_the_length_may_be_anything(interpreted, plan):
  arrays, options = _inputs(size=200, batch=2, nodes=20)
  options["prefix_end"] = np.array([70, 0], np.int32)
  clean = np.asarray(interpreted(arrays, options, _plan(**plan)))
  for b, end in enumerate(options["prefix_end"]):
    arrays[1][b, :, end:] = arrays[2][b, :, end:] = np.nan
  got = np.asarray(interpreted(arrays, options, _plan(**plan)))
  np.testing.assert_array_equal(got, clean)


@needs_kernels
def test_nodes_that_see_nothing_are_zero_and_masks_may_be_named(interpreted):
  arrays, options = _inputs(batch=2)
  options["prefix_end"] = np.array([0, 136], np.int32)
  options["local_mask"] = np.tri(5, dtype=bool)[None, None]
  _check(interpreted(arrays, options | {"local_mask": CAUSAL}), arrays, options)
  options["local_mask"] = options["local_mask"] & (np.arange(5) != 0)
  got = np.asarray(interpreted(arrays, options))
  assert not got[0, :, 0].any()
  assert got[1, :, 0].any()


@needs_kernels
def test_the_gradient_is_that_of_xla(interpreted):
  arrays, options = _inputs(batch=1, size=40)
  options["sinks"] = np.array([-2, 0.5, 3], np.float32)

  def loss(attend, arrays):
    return (attend(arrays, options) ** 2).sum().astype(jnp.float32)

  as_jax = {name: jnp.asarray(x) for name, x in options.items()}
  plain = lambda arrays, _: cascade_attention(
    *arrays, **as_jax, implementation="xla"
  )
  arrays = [jnp.asarray(x) for x in arrays]
  got = jax.grad(functools.partial(loss, interpreted))(arrays)
  expected = jax.jit(jax.grad(functools.partial(loss, plain)))(arrays)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(
      np.asarray(a, float), np.asarray(b, float), rtol=0.05, atol=0.05
    )


@needs_kernels
@pytest.mark.parametrize("splits", [1, 3, 7])
def test_the_splits_share_the_tiles_that_hold_the_prefix(splits):
  from d2sd_jax.kernels.cascade_attention import mosaic_gpu_kernel

  low, more, high, less = (
    np.random.default_rng(splits).integers(0, [[700, 300, 700, 300]] * 200).T
  )
  bounds = np.stack([low, low + more, np.maximum(high - less, 0), high], 1)
  operands = types.SimpleNamespace(
    bounds=jnp.asarray(bounds), local_keys=np.zeros((200, 70, 1, 64))
  )

  @jax.jit
  @functools.partial(jax.vmap, axis_name="split", axis_size=splits)
  @functools.partial(jax.vmap, axis_name="batch", axis_size=200)
  def steps():
    plan = _plan(splits=splits)
    return mosaic_gpu_kernel._steps(operands, plan, windowed=True)

  local, first, whole, partial, last = map(np.asarray, steps())
  assert (local == np.array([0] * (splits - 1) + [2])[:, None]).all()
  for i, (low, most_low, least_high, high) in enumerate(bounds):
    tiles = []
    # Two tiles of local keys are the last split's.
    most = -(-(max(-(-high // 64) - low // 64, 0) + 2) // splits)
    for split in range(splits):
      held = [x[split, i] for x in (first, whole, partial, last)]
      assert held == sorted(held)
      assert held[3] - held[0] + local[split, i] <= max(most, 2)
      tiles += range(held[0], held[3])
      for tile in range(held[1], held[2]):
        assert most_low <= tile * 64
        assert (tile + 1) * 64 <= least_high
    assert tiles == list(range(low // 64, -(-high // 64)))


@needs_kernels
@pytest.mark.parametrize(
  ("sizes", "options"),
  [
    ({"nodes": 16, "share": 4, "kv_heads": 8, "size": 8192, "dim": 128}, {}),
    ({"nodes": 80, "share": 4, "kv_heads": 8, "size": 8192, "dim": 128}, {}),
    ({"nodes": 1, "kv_heads": 3, "batch": 300, "size": 512}, {}),
    ({"nodes": 9, "groups": 2, "share": 8, "size": 40}, {"windowed": True}),
  ],
)
def test_it_lowers_for_cuda(monkeypatch, sizes, options):
  monkeypatch.setattr(hopper, "runs_here", lambda: True)
  shape = lambda sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
  sizes = {"batch": 1, "groups": 1, "share": 3, "kv_heads": 1} | sizes
  b, g, r, j = (sizes[k] for k in ("batch", "groups", "nodes", "kv_heads"))
  h = sizes.get("dim", 64)
  arrays = [shape((b, g, r, j * sizes["share"], h))]
  arrays += [shape((b, j, sizes["size"], h))] * 2
  arrays += [shape((b, g, r, j, h))] * 2
  options = {
    "prefix_end": shape((b, g), jnp.int32),
    "prefix_start": shape((b, g, r), jnp.int32) if options else None,
  }
  attend = jax.jit(
    functools.partial(cascade_attention, implementation="mosaic_gpu")
  )
  lowered = attend.trace(*arrays, **options).lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu_v2" in lowered.as_text()


@needs_kernels
@pytest.mark.parametrize("rows", [3, 64, 65, 320, 512, 2048])
@pytest.mark.parametrize(("pairs", "size"), [(8, 8192), (6144, 512), (64, 64)])
@pytest.mark.parametrize("dim", [64, 128])
def test_plans_cover_the_rows_and_fit_the_chip(rows, pairs, size, dim):
  plan = mosaic_gpu.choose_plan(rows, pairs, size, dim, local=rows // 4 + 1)
  assert rows <= plan.rows < rows + 3 * 64
  assert plan.block_keys == 64 or plan.warpgroups < 3
  # Splits for one wave of blocks at most, where there are any.
  blocks = pairs * plan.blocks
  assert plan.splits == 1 or plan.splits * blocks <= hopper.MULTIPROCESSORS
  assert plan.stages >= 2
  shared = plan.stages * 4 * plan.block_keys + plan.warpgroups * 2 * 64
  assert shared * dim < hopper.SHARED_MEMORY - 2048


@needs_kernels
@pytest.mark.parametrize(
  ("nodes", "pairs", "size", "cut"),
  [
    # Eight key heads, four query heads each: a tile of rows to a block where
    # multiprocessors would idle, two where each has many steps.
    *[(1, 8, 1024, (1, 1, 64, 9)), (16, 8, 1024, (1, 1, 64, 9))],
    *[(64, 8, 1024, (1, 4, 64, 4)), (80, 8, 1024, (1, 5, 128, 3))],
    (80, 8, 32_768, (2, 3, 128, 5)),
    # Of fewer key heads, as a device of a mesh has, more splits: there is room.
    (80, 2, 1024, (1, 5, 128, 9)),
    # Many rows: no split, so nothing is merged.
    *[(80, 64, 4096, (3, 2, 64, 1)), (80, 128, 1024, (3, 2, 64, 1))],
    (1, 2048 * 3, 512, (1, 1, 64, 1)),
  ],
)
def test_plans_of_the_shapes_that_matter(nodes, pairs, size, cut):
  rows = -(-nodes // 8) * 8 * 4
  plan = mosaic_gpu.choose_plan(rows, pairs, size, 128, local=nodes)
  assert cut == (plan.warpgroups, plan.blocks, plan.block_keys, plan.splits)


@needs_kernels
def test_the_plan_of_a_small_target():
  # SmolLM2: three query heads to each of three key heads, of 64.
  plan = mosaic_gpu.choose_plan(72 * 3, 3, 512, 64, local=72)
  assert (plan.warpgroups, plan.blocks, plan.block_keys) == (1, 4, 64)
  assert plan.splits == 4


@needs_kernels
def test_a_plan_counts_what_its_longest_split_does():
  # Eight tiles of 128 keys and one of local keys, in threes: two of the prefix
  # and the local one come last, two of them masked.
  work = mosaic_gpu._Work(tiles=5, pairs=8, size=1024, head_dim=128, local=80)
  assert work.steps(128) == 9
  assert work._longest(1.0, 128, 3) == 3 + 2 * mosaic_gpu._MASKED
  # By fours the last split has local keys alone, and no other more than three.
  assert work._longest(1.0, 128, 4) == 3 + mosaic_gpu._MASKED
  assert work._longest(1.0, 128, 1) == 9 + 2 * mosaic_gpu._MASKED


@pytest.mark.parametrize(
  ("dtype", "dim", "size", "message"),
  [
    (jnp.float32, 64, 8, "dtype='float32': expected bfloat16 or float16"),
    (jnp.bfloat16, 8, 8, "head size='8': expected 64 or 128"),
    (jnp.bfloat16, 64, 11, "cache rows='11': expected a multiple of 8"),
    (jnp.bfloat16, 64, 8, "compute capability 9.x|jax.*0.11 or newer"),
  ],
)
def test_it_says_why_it_cannot_run(monkeypatch, dtype, dim, size, message):
  cpu = types.SimpleNamespace(platform="cpu")
  monkeypatch.setattr(jax, "devices", lambda *_: [cpu])
  arrays, options = _inputs(dim=dim, size=size)
  arrays = [jnp.asarray(x, dtype) for x in arrays]
  with pytest.raises(UsageError, match=message):
    cascade_attention(
      *arrays,
      prefix_end=jnp.asarray(options["prefix_end"]),
      implementation="mosaic_gpu",
    )


def test_an_older_jax_is_named(monkeypatch):
  monkeypatch.setattr(hopper, "has_kernels", lambda: False)
  arrays, options = _inputs()
  options = {name: jnp.asarray(x) for name, x in options.items()}
  with pytest.raises(UsageError, match=r"jax='.*': expected 0.11 or newer"):
    cascade_attention(
      *map(jnp.asarray, arrays), **options, implementation="mosaic_gpu"
    )


@pytest.mark.parametrize(
  ("has_kernels", "capability", "dtype", "nodes", "size", "name"),
  [
    (True, "9.0", jnp.bfloat16, 80, 64, "mosaic_gpu"),
    (True, "9.0", jnp.float16, 2, 64, "mosaic_gpu"),
    (True, "9.0", jnp.float16, 1, 64, "lone_node"),
    (True, "8.0", jnp.float16, 1, 64, "lone_node"),
    (True, "9.0", jnp.float16, 1, 4096, "mosaic_gpu"),
    (False, "9.0", jnp.bfloat16, 80, 64, "xla"),
    (True, "8.0", jnp.bfloat16, 80, 64, "xla"),
    (True, "10.0", jnp.bfloat16, 80, 64, "xla"),
    (True, "9.0", jnp.float32, 80, 64, "xla"),
    (True, "9.0", jnp.bfloat16, 80, 0, "xla"),
    (True, "9.0", jnp.bfloat16, 80, 12, "xla"),
    (True, "9.0", jnp.bfloat16, 300, 64, "cudnn"),
  ],
)
def test_the_default_on_hopper(
  monkeypatch, has_kernels, capability, dtype, nodes, size, name
):
  device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
  monkeypatch.setattr(jax, "devices", lambda *_: [device])
  monkeypatch.setattr(hopper, "has_kernels", lambda: has_kernels)
  query = jax.ShapeDtypeStruct((1, 1, nodes, 3, 64), dtype)
  keys = jax.ShapeDtypeStruct((1, 1, size, 64), dtype)
  assert default_implementation(query, keys) == name


@needs_kernels
@pytest.mark.parametrize(
  ("nodes", "share"), [(1, 3), (1, 12), (8, 9), (72, 3), (80, 4), (16, 1)]
)
def test_tiles_write_each_chunk_once_and_none_that_is_not_there(nodes, share):
  from d2sd_jax.kernels.cascade_attention import mosaic_gpu_kernel as kernel
  from d2sd_jax.kernels.cascade_attention.mosaic_gpu_tile import Tile

  first = kernel.First(query=0, keys=0, values=0, share=share)
  operands = types.SimpleNamespace(query=np.zeros((1, nodes, 2 * share, 64)))
  written = []
  for tile in range(-(-first.chunks(nodes) // kernel.CHUNKS) + 1):
    block = types.SimpleNamespace(
      **{"first": first, "operands": operands, "tile": tile},
      **{"batch": 0, "head": 1},
    )
    for (_, rows, head), is_there in Tile._chunks(block, 0):
      if is_there:
        written.append((int(rows.start), int(head)))
  wanted = [
    (row, head)
    for row in range(0, nodes, 8)
    for head in range(share, 2 * share)
  ]
  assert sorted(written) == wanted


@pytest.mark.gpu
@pytest.mark.parametrize(
  ("batch", "nodes", "share"),
  [(700, 1, 3), (5, 1, 12), (9, 9, 3), (2, 72, 3), (2, 80, 4), (3, 256, 1)],
)
def test_on_a_gpu_as_xla(batch, nodes, share):
  """Prefixes whole and split, and more blocks than the device holds at once."""
  arrays, options = _inputs(
    batch=batch, nodes=nodes, share=share, kv_heads=3, size=456
  )
  options["prefix_end"] = np.arange(batch, dtype=np.int32) * 17 % 457
  options = {name: jnp.asarray(x) for name, x in options.items()}
  together = _side_by_side(arrays)
  run = lambda name: jax.jit(
    functools.partial(cascade_attention, implementation=name)
  )(*together, **options)
  np.testing.assert_allclose(
    np.asarray(run("mosaic_gpu"), float),
    np.asarray(run("xla"), float),
    rtol=0.02,
    atol=0.02,
  )

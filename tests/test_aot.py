"""Programs compiled for chips that are not there: `pytest -m aot`.

Qwen3-8B's shapes, and never a weight in memory. What is asserted is read off
the compiled programs: that no layer's cache is ever copied, that the kernels
are in them, and how much memory they take.
"""

import dataclasses
import re
from collections import Counter

import chips
import jax
import jax.numpy as jnp
import pytest

from d2sd_jax import (
  cascade_attention,
  generate,
)

pytestmark = pytest.mark.aot
# Bytes beside weights, caches and the decode state. Measured: 0.057e9, 0.105e9
# and 0.44e9, the H200's for sums of parts of its products.
_TEMPORARY = {"v5e": 0.1e9, "v6e": 0.15e9, "h200": 0.5e9}
_PALLAS = r'custom-call\(.*op_name="[^"]*/(\w+)/(?:pallas_call|mpmd_map)"'


@pytest.fixture(scope="module", params=["v5e", "v6e", "h200"])
def chip(request):
  """A chip's name; programs traced in the test are for it."""
  with jax.default_device(chips.device_of(request.param)):
    yield request.param


@pytest.fixture(scope="module", params=["v5e", "v6e"])
def tpu(request):
  with jax.default_device(chips.device_of(request.param)):
    yield request.param


def _check_int8(hlo, models):
  """No matrix that drafts is ever widened, but within a kernel that reads it.

  What is only moved is the target's.
  """
  fused = "|".join(map(re.escape, re.findall(r"calls=(%?[\w.-]+)", hlo)))
  top = re.sub(rf"^(?:{fused}) [^\n]*{{\n(?:.*\n)*?^}}", "", hlo, flags=re.M)
  held = [
    leaf
    for leaf in jax.tree.leaves((models.drafters, models.draft_head))
    if leaf.dtype == jnp.int8
  ]
  assert len(held) == 2 * (2 + 4 * chips.DRAFTER_LAYERS) + 1
  for shape in sorted({leaf.shape for leaf in held}):
    rows, columns = shape
    assert f"s8[{rows},{columns}]" in top
    for name in ("bf16", "f32"):
      for order in (shape, shape[::-1]):
        wide = f"{name}[{order[0]},{order[1]}]"
        made = [kind for kind, _ in chips.of_shape(top, wide)]
        assert not {"convert", "fusion", "multiply"} & set(made), wide


def _check_cycle(chip, compiled, args):
  """No copy of a cache, our kernels on TPU, and memory within the budget."""
  hlo, memory = compiled.as_text(), compiled.memory_analysis()
  caches = jax.tree.leaves((args[1].target_cache, args[1].drafter_caches))
  batch, heads, size, width = caches[0].shape
  for held in ((size, width), (width, size)):
    shape = f"bf16[{batch},{heads},{held[0]},{held[1]}]"
    assert list(chips.copies(hlo, shape)) == []
  layers = len(caches) // 2
  if chip == "h200":
    # Attention, and all products of the target: drafters are in int8.
    kernels = layers + 4 * chips.LAYERS
    # Two norms a layer, of drafters too, and one of each drafter's context.
    norms = Counter(re.findall(_PALLAS, hlo))["rms_norm"]
    assert norms == 2 * layers + len(args[0].drafters)
    assert hlo.count('custom_call_target="mosaic_gpu') == kernels
  else:
    assert chips.calls(hlo, "cascade_attention") == layers
    assert chips.calls(hlo, "write_rows") == layers
  cache_bytes = sum(2 * c.size for c in caches)
  assert memory.alias_size_in_bytes >= cache_bytes
  print(chip, len(caches) // 2, "layers:", memory)
  assert memory.temp_size_in_bytes < _TEMPORARY[chip]
  total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  assert total + memory.generated_code_size_in_bytes < chips.HBM[chip]


def test_whole_cycle(chip):
  args = chips.arguments(chips.LAYERS, 1, chips.QWEN3_8B, int8=True)
  program = generate
  if chip == "v5e":
    # In bfloat16 the weights alone (20.6 GB) pass one v5e's memory. So there
    # all layers share one layer's weights; every cache is its own.
    def shared(models, *rest, **options):
      layers = models.target.layers * chips.LAYERS
      target = dataclasses.replace(models.target, layers=layers)
      models = dataclasses.replace(models, target=target)
      return generate.__wrapped__(models, *rest, **options)

    program = jax.jit(
      shared, static_argnames=("mode", "config"), donate_argnums=1
    )
    models = args[0]
    target = dataclasses.replace(models.target, layers=models.target.layers[:1])
    args = (dataclasses.replace(models, target=target), *args[1:])
  compiled = chips.compile_program(
    program, *args, mode="d2sd", config=chips.TREE
  )
  _check_cycle(chip, compiled, args)
  _check_int8(compiled.as_text(), args[0])
  assert list(chips.moved_weights(compiled.as_text())) == []


# Not on the H200: XLA's own attention lays keys out anew there at several rows.
@pytest.mark.parametrize("sizes", [chips.HEADS_OF_128, chips.SMOLLM2_135M])
def test_cycle_of_several_rows(tpu, sizes):
  args = chips.arguments(3, 4, sizes)
  compiled = chips.compile_program(
    generate, *args, mode="d2sd", config=chips.TREE
  )
  _check_cycle(tpu, compiled, args)


@pytest.mark.parametrize("mode", ["ar", "prompt_lookup"])
def test_plain_steps(chip, mode):
  """A lone anchor's keys and values wait for the pass before they are kept."""
  del chip
  models, _, *rest = chips.arguments(3, 1, chips.QWEN3_8B)
  models = dataclasses.replace(models, drafters=())
  state = chips.make_state(models, 1)
  hlo = chips.compile_program(
    generate, models, state, *rest, mode=mode, config=chips.TREE
  ).as_text()
  shape = state.target_cache.keys[0].shape
  for held in (shape, (*shape[:2], shape[3], shape[2])):
    assert list(chips.copies(hlo, f"bf16[{','.join(map(str, held))}]")) == []


@pytest.mark.parametrize(
  ("sizes", "small"), [(chips.SMOLLM2_135M, True), (chips.QWEN3_8B, False)]
)
def test_one_row_takes_few_launches(sizes, small):
  with jax.default_device(chips.device_of("h200")):
    models, _, *rest = chips.arguments(3, 1, sizes)
    models = dataclasses.replace(models, drafters=())
    state = chips.make_state(models, 1)
    hlo = chips.compile_program(
      generate, models, state, *rest, mode="ar", config=chips.TREE
    ).as_text()
  layers = len(models.target.layers)
  calls = Counter(re.findall(_PALLAS, hlo))
  assert calls["lone_row"] == (4 * layers if small else 0)
  assert calls["rms_norm"] == 0
  assert calls["norm_and_rotate"] == calls["merge"] == layers
  assert calls["write_all"] == 1
  # Where it has a kernel, nothing else knows a layer's matrices.
  layer = models.target.layers[0]
  for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
    outputs, inputs = getattr(layer, name).stored.shape
    others = re.search(rf"\w+\[{outputs},{inputs}\]\S* fusion", hlo)
    assert not (small and others), name
  # A cache is moved by nobody.
  shape = state.target_cache.keys[0].shape
  assert list(chips.copies(hlo, f"bf16[{','.join(map(str, shape))}]")) == []


def test_a_cycle_of_a_small_target_takes_few_launches():
  with jax.default_device(chips.device_of("h200")):
    args = chips.arguments(3, 1, chips.SMOLLM2_135M)
    hlo = chips.compile_program(
      generate, *args, mode="d2sd", config=chips.TREE
    ).as_text()
  # The target's layers and those of two drafters.
  layers = 3 + 2 * chips.DRAFTER_LAYERS
  calls = Counter(re.findall(_PALLAS, hlo))
  assert calls["norm_and_rotate"] == calls["merge"] == layers
  assert calls["write_all"] == 3
  assert calls["cascade_attention"] == layers
  assert calls["few_rows"] >= 4 * layers


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
  ("batch", "groups", "nodes", "heads", "kv_heads", "size", "head_dim"),
  [
    (1, 1, 70, 32, 8, 1024, 128),
    (8, 4, 16, 32, 8, 4096, 128),
    (1, 1, 80, 32, 8, 32_768, 128),
    (2, 1, 256, 32, 8, 8192, 128),
    (1, 1, 1, 32, 8, 1000, 128),  # One node; the last block is cut off.
    (3, 2, 7, 9, 3, 1300, 64),
    (1, 1, 5, 6, 2, 0, 80),
    (2, 64, 16, 9, 3, 512, 64),  # Groups in several tiles.
    (1, 1, 512, 32, 8, 512, 128),  # One group in several tiles.
    (1, 1, 256, 32, 8, 2048, 256),  # The largest heads.
  ],
)
def test_kernel(
  tpu, dtype, batch, groups, nodes, heads, kv_heads, size, head_dim
):
  del tpu
  shape = jax.ShapeDtypeStruct
  query = shape((batch, groups, nodes, heads, head_dim), dtype)
  cache = shape((batch, kv_heads, size, head_dim), dtype)
  local = shape((batch, groups, nodes, kv_heads, head_dim), dtype)
  ends = shape((batch, groups), jnp.int32)
  starts = shape((batch, groups, nodes), jnp.int32)
  mask = shape((batch, groups, nodes, nodes), jnp.bool)
  sinks = shape((heads,), jnp.float32)

  @jax.jit
  def attend(query, cache, local, ends, starts, mask, sinks):
    return cascade_attention(
      *(query, *cache, *local),
      prefix_end=ends,
      prefix_start=starts,
      local_mask=mask,
      sinks=sinks,
      implementation="mosaic_tpu",
    )

  args = (query, (cache, cache), (local, local), ends, starts, mask, sinks)
  hlo = chips.compile_program(attend, *args).as_text()
  assert chips.calls(hlo, "cascade_attention") == 1
  if not size:
    return
  name = {jnp.bfloat16: "bf16", jnp.float32: "f32"}[dtype]
  for held in ((size, head_dim), (head_dim, size)):
    shape = f"{name}[{batch},{kv_heads},{held[0]},{held[1]}]"
    assert list(chips.copies(hlo, shape)) == []


def test_copies_are_found():
  shape = "bf16[1,8,64,128]"
  hlo = """
%update (a: bf16[1,8,64,128], b: s32[]) -> bf16[1,8,64,128] {
  %a = bf16[1,8,64,128]{3,2,1,0} parameter(0)
  ROOT %d = bf16[1,8,64,128]{3,2,1,0} dynamic-update-slice(%a, %u, %b)
}

%flip (a: bf16[1,8,64,128]) -> bf16[1,8,64,128] {
  ROOT %n = bf16[1,8,64,128]{3,2,1,0} negate(%a)
}

ENTRY %main {
  %p = (bf16[1,8,64,128]{3,2,1,0}, s32[]) parameter(0)
  %c.1 = bf16[1,8,64,128]{3,2,1,0} get-tuple-element(%p), index=0
  %f.1 = bf16[1,8,64,128]{3,2,1,0} fusion(%c.1), kind=kLoop, calls=%update
  %w.1 = (bf16[1,8,64,128], u32[]) custom-call(), output_to_operand_aliasing=
  %w.2 = bf16[1,8,64,128]{3,2,1,0} custom-call(%f.1)
  %s.1 = (bf16[1,8,64,128]{3,2:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%c.1)
  %f.2 = bf16[1,8,64,128]{3,2,1,0} fusion(%c.1), kind=kLoop, calls=%flip
  %o.1 = bf16[1,8,16,128]{3,2,1,0} copy(%c.1)
}
"""
  named = [line.split()[0] for line in chips.copies(hlo, shape)]
  assert named == ["ROOT", "%w.2", "%s.1", "%f.2"]

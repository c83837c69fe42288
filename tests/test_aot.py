"""Programs compiled for chips that are not there: `pytest -m aot`.

Qwen3-8B's shapes, and never a weight in memory. What is asserted is read off
the compiled programs: that no layer's cache is ever copied, that the kernels
are in them, and how much memory they take.
"""

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from d2sd_jax import (
  Drafter,
  DrafterConfig,
  Models,
  Sampling,
  TargetConfig,
  TreeConfig,
  cascade_attention,
  generate,
  prefill,
)
from d2sd_jax.config import default_target_layer_ids
from d2sd_jax.models.layers import LayerWeights
from d2sd_jax.models.target import LlamaTarget

pytestmark = pytest.mark.aot
_LAYERS, _CAPACITY = 36, 1024
_DRAFTER_LAYERS, _TREE = 5, TreeConfig(block_size=16, num_branches=4)
_QWEN3_8B = {
  "vocab_size": 151_936,
  "hidden_size": 4096,
  "intermediate_size": 12_288,
  "num_heads": 32,
  "num_kv_heads": 8,
  "head_dim": 128,
  "rope_theta": 1e6,
  "rms_norm_eps": 1e-6,
  "max_length": 40_960,
}
# Heads of 64, which a TPU holds the other way round.
_SMOLLM2_135M = _QWEN3_8B | {
  "vocab_size": 49_152,
  "hidden_size": 576,
  "intermediate_size": 1536,
  "num_heads": 9,
  "num_kv_heads": 3,
  "head_dim": 64,
}
_HEADS_OF_128 = _SMOLLM2_135M | {
  "hidden_size": 768,
  "num_heads": 6,
  "num_kv_heads": 2,
  "head_dim": 128,
}
_HBM = {"v5e": 15.75 * 2**30, "v6e": 31.25 * 2**30, "h200": 141e9}
# Bytes beside weights, caches and the decode state, above what was measured:
# 2.09e9 on v6e (q and k weights of every layer laid out anew, once a call) and
# 0.42e9 on the H200.
_TEMPORARY = {"v5e": 0.9e9, "v6e": 2.3e9, "h200": 0.6e9}
_H200 = """
  gpu_device_info {
    name: "NVIDIA H200"
    cuda_compute_capability {
      major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES
    }
    core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
    threads_per_warp: 32 threads_per_block_limit: 1024
    threads_per_core_limit: 2048
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
    block_dim_limit_z: 65535
    registers_per_core_limit: 65536 registers_per_block_limit: 65536
    shared_memory_per_block: 49152 shared_memory_per_core: 233472
    shared_memory_per_block_optin: 232448
    l2_cache_size: 52428800 memory_bandwidth: 4814000000000
    device_memory_size: 150000000000
    driver_version: "13.0.0" runtime_version: "13.0.0"
    kernel_mode_driver_version: "580.82.7"
    compile_time_toolkit_version: "13.0.0" dnn_version: "9.20.0"
  }
  platform_name: "CUDA"
  dnn_version_info { major: 9 minor: 20 }
  runtime_version { major: 13 }
  device_description_str: "NVIDIA H200"
"""
# libtpu asks a cloud machine about itself unless told, and wants it for itself.
_TPU_ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@pytest.fixture(scope="module", params=["v5e", "v6e", "h200"])
def chip(request):
  """A chip's name; programs traced in the test are for it."""
  with jax.default_device(_device(request.param)):
    yield request.param


@pytest.fixture(scope="module", params=["v5e", "v6e"])
def tpu(request):
  with jax.default_device(_device(request.param)):
    yield request.param


def _device(chip):
  if chip == "h200":
    if jax.__version_info__ < (0, 11):
      pytest.skip("compiling for a GPU that is not there needs jax 0.11")
    return topologies.get_topology_desc(
      platform="cuda", target_config=_H200, topology="1x1x1"
    ).devices[0]
  os.environ.update(_TPU_ENVIRONMENT)
  topology = f"{chip}:2x2"
  return topologies.get_topology_desc(topology, platform="tpu").devices[0]


def _compile(function, *args, **kwargs):
  """Compiles a jitted function of shapes for the default device."""
  device = jax.config.jax_default_device
  place = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=SingleDeviceSharding(device)
  )
  traced = function.trace(*jax.tree.map(place, args), **kwargs)
  gpu = device.platform != "tpu"
  lowered = traced.lower(lowering_platforms=("cuda" if gpu else "tpu",))
  # Without a GPU there is nothing to time its GEMMs on.
  options = {"xla_gpu_autotune_level": 0} if gpu else {}
  return lowered.compile(compiler_options=options)


def _layer(sizes):
  width, mlp = sizes["hidden_size"], sizes["intermediate_size"]
  head = sizes["head_dim"]
  key = sizes["num_kv_heads"] * head
  zeros = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
  return LayerWeights(
    input_norm=zeros(width),
    qkv_proj=zeros(width, width + 2 * key),
    o_proj=zeros(width, width),
    q_norm=zeros(head),
    k_norm=zeros(head),
    post_norm=zeros(width),
    gate_up_proj=zeros(width, 2 * mlp),
    down_proj=zeros(mlp, width),
  )


def _models(num_layers, sizes):
  """A target of as many layers, and two drafters of five."""
  target = TargetConfig(
    num_layers=num_layers, tied_head=False, qk_norm=True, **sizes
  )
  drafter = DrafterConfig(
    num_layers=_DRAFTER_LAYERS,
    block_size=_TREE.block_size,
    mask_token_id=sizes["vocab_size"] - 267,
    target_layer_ids=default_target_layer_ids(
      num_layers, 5 if num_layers == _LAYERS else 1
    ),
    num_target_layers=num_layers,
    **sizes,
  )
  table = jnp.zeros((target.vocab_size, target.hidden_size), jnp.bfloat16)
  make = lambda: Drafter(drafter, rngs=nnx.Rngs(0), dtype=jnp.bfloat16).fuse()
  return Models(
    target=LlamaTarget(
      embedding=table,
      layers=tuple(_layer(sizes) for _ in range(num_layers)),
      norm=jnp.zeros((target.hidden_size,), jnp.bfloat16),
      lm_head=table,
      config=target,
    ),
    drafters=(make(), make()),
  )


def _arguments(num_layers, batch, sizes, int8=False):
  """Shapes of all that `generate` takes; drafters in int8, if so wanted."""
  make = lambda: _models(num_layers, sizes)
  models = jax.eval_shape(
    lambda: make().with_int8_drafting() if int8 else make()
  )
  steps = jax.ShapeDtypeStruct((), jnp.int32)
  return models, _state(models, batch), jax.eval_shape(Sampling.create), steps


def _state(models, batch):
  """Shapes of a state of so many rows."""
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  rows = [ints(batch)] * 3
  return jax.eval_shape(
    lambda *args: prefill(*args, capacity=_CAPACITY),
    *(models, ints(batch, 64), *rows, ints(2)),
    jax.eval_shape(Sampling.create),
  )


def _of_shape(hlo, shape):
  """Operation and line of every instruction that yields such an array."""
  instruction = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (.*)$", re.MULTILINE)
  for match in instruction.finditer(hlo):
    # A type, or types in brackets; then the operation and its operands.
    types = re.match(r"\(.*?\) (?=[a-z][\w-]*\()|\S+ ", match[1])
    if types and shape in types[0]:
      operation = re.match(r"[\w-]+", match[1][types.end() :])
      yield operation[0] if operation else "?", match[0]


def _copies(hlo, shape):
  """Instructions that make a new array of such a shape.

  What only passes one on, or updates it in place, does not count: a custom
  call whose outputs are its operands, a `dynamic-update-slice` by itself or as
  the result of a fusion.
  """
  passing = {"parameter", "get-tuple-element", "tuple", "while", "bitcast"}
  for operation, line in _of_shape(hlo, shape):
    in_place = operation == "dynamic-update-slice"
    if operation == "fusion":
      body = re.search(r"calls=(%?[\w.-]+)", line)[1]
      root = re.search(
        rf"^{re.escape(body)} [^\n]*{{\n(?:.*\n)*?\s*(ROOT .*)", hlo, re.M
      )[1]
      in_place = " dynamic-update-slice(" in root
    if operation == "custom-call":
      in_place = "output_to_operand_aliasing=" in line
    if operation not in passing and not in_place:
      yield line[:200]


def _check_int8(hlo, models):
  """No matrix that drafts is ever widened, but within a kernel that reads it.

  Shapes of projections that a TPU lays out anew for the target are left out;
  what it only moves is the target's.
  """
  fused = "|".join(map(re.escape, re.findall(r"calls=(%?[\w.-]+)", hlo)))
  top = re.sub(rf"^(?:{fused}) [^\n]*{{\n(?:.*\n)*?^}}", "", hlo, flags=re.M)
  held = [
    leaf
    for leaf in jax.tree.leaves((models.drafters, models.draft_head))
    if leaf.dtype == jnp.int8
  ]
  assert len(held) == 2 * (2 + 4 * _DRAFTER_LAYERS) + 1
  for shape in sorted({leaf.shape for leaf in held}):
    rows, columns = shape
    assert f"s8[{rows},{columns}]" in top
    if 12_288 in shape or rows > 12_288:
      for name in ("bf16", "f32"):
        for order in (shape, shape[::-1]):
          wide = f"{name}[{order[0]},{order[1]}]"
          made = [kind for kind, _ in _of_shape(top, wide)]
          assert not {"convert", "fusion", "multiply"} & set(made), wide


def _calls(hlo, kernel):
  return len(re.findall(rf"%{kernel}[.\d]* = [^\n]* custom-call\(", hlo))


def _check_cycle(chip, compiled, args):
  """No copy of a cache, our kernels on TPU, and memory within the budget."""
  hlo, memory = compiled.as_text(), compiled.memory_analysis()
  caches = jax.tree.leaves((args[1].target_cache, args[1].drafter_caches))
  batch, heads, size, width = caches[0].shape
  for held in ((size, width), (width, size)):
    shape = f"bf16[{batch},{heads},{held[0]},{held[1]}]"
    assert list(_copies(hlo, shape)) == []
  layers = len(caches) // 2
  if chip == "h200":
    assert hlo.count('custom_call_target="mosaic_gpu') == layers
  else:
    assert _calls(hlo, "cascade_attention") == layers
    assert _calls(hlo, "write_rows") == layers
  cache_bytes = sum(2 * c.size for c in caches)
  assert memory.alias_size_in_bytes >= cache_bytes
  print(chip, len(caches) // 2, "layers:", memory)
  assert memory.temp_size_in_bytes < _TEMPORARY[chip]
  total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  assert total + memory.generated_code_size_in_bytes < _HBM[chip]


def test_whole_cycle(chip):
  args = _arguments(_LAYERS, 1, _QWEN3_8B, int8=True)
  program = generate
  if chip == "v5e":
    # In bfloat16 the weights alone (20.6 GB) pass one v5e's memory. So there
    # all layers share one layer's weights; every cache is its own.
    def shared(models, *rest, **options):
      layers = models.target.layers * _LAYERS
      target = dataclasses.replace(models.target, layers=layers)
      models = dataclasses.replace(models, target=target)
      return generate.__wrapped__(models, *rest, **options)

    program = jax.jit(
      shared, static_argnames=("mode", "config"), donate_argnums=1
    )
    models = args[0]
    target = dataclasses.replace(models.target, layers=models.target.layers[:1])
    args = (dataclasses.replace(models, target=target), *args[1:])
  compiled = _compile(program, *args, mode="d2sd", config=_TREE)
  _check_cycle(chip, compiled, args)
  _check_int8(compiled.as_text(), args[0])


# Not on the H200: XLA's own attention lays keys out anew there at several rows.
@pytest.mark.parametrize("sizes", [_HEADS_OF_128, _SMOLLM2_135M])
def test_cycle_of_several_rows(tpu, sizes):
  args = _arguments(3, 4, sizes)
  compiled = _compile(generate, *args, mode="d2sd", config=_TREE)
  _check_cycle(tpu, compiled, args)


@pytest.mark.parametrize("mode", ["ar", "prompt_lookup"])
def test_plain_steps(chip, mode):
  """A lone anchor's keys and values wait for the pass before they are kept."""
  del chip
  models, _, *rest = _arguments(3, 1, _QWEN3_8B)
  models = dataclasses.replace(models, drafters=())
  state = _state(models, 1)
  hlo = _compile(
    generate, models, state, *rest, mode=mode, config=_TREE
  ).as_text()
  shape = state.target_cache.keys[0].shape
  for held in (shape, (*shape[:2], shape[3], shape[2])):
    assert list(_copies(hlo, f"bf16[{','.join(map(str, held))}]")) == []


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
  hlo = _compile(attend, *args).as_text()
  assert _calls(hlo, "cascade_attention") == 1
  if not size:
    return
  name = {jnp.bfloat16: "bf16", jnp.float32: "f32"}[dtype]
  for held in ((size, head_dim), (head_dim, size)):
    shape = f"{name}[{batch},{kv_heads},{held[0]},{held[1]}]"
    assert list(_copies(hlo, shape)) == []


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
  named = [line.split()[0] for line in _copies(hlo, shape)]
  assert named == ["ROOT", "%w.2", "%s.1", "%f.2"]

"""Programs for chips that are not there: their shapes, and what HLO says.

Qwen3-8B's sizes, and never a weight in memory.
"""

import math
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
  prefill,
)
from d2sd_jax.config import default_target_layer_ids
from d2sd_jax.decoding.placement import put_drafter
from d2sd_jax.kernels.transposed import as_stored
from d2sd_jax.models.layers import LayerWeights
from d2sd_jax.models.target import LlamaTarget

LAYERS, CAPACITY = 36, 1024
DRAFTER_LAYERS, TREE = 5, TreeConfig(block_size=16, num_branches=4)
QWEN3_8B = {
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
SMOLLM2_135M = QWEN3_8B | {
  "vocab_size": 49_152,
  "hidden_size": 576,
  "intermediate_size": 1536,
  "num_heads": 9,
  "num_kv_heads": 3,
  "head_dim": 64,
}
HEADS_OF_128 = SMOLLM2_135M | {
  "hidden_size": 768,
  "num_heads": 6,
  "num_kv_heads": 2,
  "head_dim": 128,
}
HBM = {"v5e": 15.75 * 2**30, "v6e": 31.25 * 2**30, "h200": 141e9}
H200 = """
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
TPU_ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def devices_of(chip, topology):
  """Devices of a topology such as `2x4`; of GPUs a count will do."""
  if chip == "h200":
    if jax.__version_info__ < (0, 11):
      pytest.skip("compiling for a GPU that is not there needs jax 0.11")
    # Processes of one GPU each.
    shape = f"1x{topology}x1"
    return topologies.get_topology_desc(
      platform="cuda", target_config=H200, topology=shape
    ).devices
  os.environ.update(TPU_ENVIRONMENT)
  return topologies.get_topology_desc(
    f"{chip}:{topology}", platform="tpu"
  ).devices


def device_of(chip):
  """One device of that kind."""
  return devices_of(chip, "1" if chip == "h200" else "2x2")[0]


def compile_program(function, *args, **kwargs):
  """Compiles a jitted function of shapes for the default device.

  Shapes that say where they lie stay there.
  """
  device = jax.config.jax_default_device
  place = lambda x: jax.ShapeDtypeStruct(
    *(x.shape, x.dtype), sharding=x.sharding or SingleDeviceSharding(device)
  )
  traced = function.trace(*jax.tree.map(place, args), **kwargs)
  gpu = device.platform != "tpu"
  lowered = traced.lower(lowering_platforms=("cuda" if gpu else "tpu",))
  # Without a GPU there is nothing to time its GEMMs on.
  options = {"xla_gpu_autotune_level": 0} if gpu else {}
  return lowered.compile(compiler_options=options)


def make_layer(sizes):
  width, mlp = sizes["hidden_size"], sizes["intermediate_size"]
  head = sizes["head_dim"]
  key = sizes["num_kv_heads"] * head
  zeros = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
  matrix = lambda *shape: as_stored(zeros(*shape))
  return LayerWeights(
    input_norm=zeros(width),
    qkv_proj=matrix(width, width + 2 * key),
    o_proj=matrix(width, width),
    q_norm=zeros(head) if sizes is not SMOLLM2_135M else None,
    k_norm=zeros(head) if sizes is not SMOLLM2_135M else None,
    post_norm=zeros(width),
    gate_up_proj=matrix(width, 2 * mlp),
    down_proj=matrix(mlp, width),
  )


def make_models(num_layers, sizes):
  """A target of as many layers, and two drafters of five."""
  target = TargetConfig(
    num_layers=num_layers,
    tied_head=False,
    qk_norm=sizes is not SMOLLM2_135M,
    **sizes,
  )
  drafter = DrafterConfig(
    num_layers=DRAFTER_LAYERS,
    block_size=TREE.block_size,
    mask_token_id=sizes["vocab_size"] - 267,
    target_layer_ids=default_target_layer_ids(
      num_layers, 5 if num_layers == LAYERS else 1
    ),
    num_target_layers=num_layers,
    **sizes,
  )
  table = jnp.zeros((target.vocab_size, target.hidden_size), jnp.bfloat16)
  make = lambda: put_drafter(
    Drafter(drafter, rngs=nnx.Rngs(0), dtype=jnp.bfloat16), None
  )
  return Models(
    target=LlamaTarget(
      embedding=table,
      layers=tuple(make_layer(sizes) for _ in range(num_layers)),
      norm=jnp.zeros((target.hidden_size,), jnp.bfloat16),
      lm_head=table,
      config=target,
    ),
    drafters=(make(), make()),
  )


def arguments(num_layers, batch, sizes, int8=False):
  """Shapes of all that `generate` takes; drafters in int8, if so wanted."""
  make = lambda: make_models(num_layers, sizes)
  models = jax.eval_shape(
    lambda: make().with_int8_drafting() if int8 else make()
  )
  steps = jax.ShapeDtypeStruct((), jnp.int32)
  return (
    models,
    make_state(models, batch),
    jax.eval_shape(Sampling.create),
    steps,
  )


def make_state(models, batch):
  """Shapes of a state of so many rows."""
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  rows = [ints(batch)] * 3
  return jax.eval_shape(
    lambda *args: prefill(*args, capacity=CAPACITY),
    *(models, ints(batch, 64), *rows, ints(2)),
    jax.eval_shape(Sampling.create),
  )


def of_shape(hlo, shape):
  """Operation and line of every instruction that yields such an array."""
  instruction = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (.*)$", re.MULTILINE)
  for match in instruction.finditer(hlo):
    # A type, or types in brackets; then the operation and its operands.
    types = re.match(r"\(.*?\) (?=[a-z][\w-]*\()|\S+ ", match[1])
    if types and shape in types[0]:
      operation = re.match(r"[\w-]+", match[1][types.end() :])
      yield operation[0] if operation else "?", match[0]


def copies(hlo, shape):
  """Instructions that make a new array of such a shape.

  What only passes one on, or updates it in place, does not count: a custom
  call whose outputs are its operands, a `dynamic-update-slice` by itself or as
  the result of a fusion.
  """
  passing = {"parameter", "get-tuple-element", "tuple", "while", "bitcast"}
  for operation, line in of_shape(hlo, shape):
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


def moved_weights(hlo):
  """Instructions that lay an array of a weight's size out anew.

  An eighth of the smallest matrix of Qwen3-8B is 4 MiB; features of a tree
  are 3.
  """
  for operation, line in of_shape(hlo, "bf16["):
    sizes = re.search(r"bf16\[([\d,]*)\]", line)[1]
    count = math.prod(int(n) for n in sizes.split(",") if n)
    if operation in ("copy", "transpose") and 2 * count >= 2**22:
      yield line[:200]


def calls(hlo, kernel):
  return len(re.findall(rf"%{kernel}[.\d]* = [^\n]* custom-call\(", hlo))

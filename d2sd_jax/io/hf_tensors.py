"""Published tensors of a target: their names, their shapes, and what they fill.

Names and layouts are Hugging Face's: matrices `[out, in]`, except the experts'
where they are not quantised.
"""

import functools
import gc
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from d2sd_jax.config import DrafterConfig, TargetConfig
from d2sd_jax.errors import UsageError
from d2sd_jax.io import mxfp4
from d2sd_jax.models.experts import Experts
from d2sd_jax.models.target import LayerWeights, LlamaTarget

# Name of each field of a dense layer; its biases have the same names.
LAYER_TENSORS = {
  "input_norm": "input_layernorm",
  "q_proj": "self_attn.q_proj",
  "k_proj": "self_attn.k_proj",
  "v_proj": "self_attn.v_proj",
  "o_proj": "self_attn.o_proj",
  "q_norm": "self_attn.q_norm",
  "k_norm": "self_attn.k_norm",
  "post_norm": "post_attention_layernorm",
  "gate_proj": "mlp.gate_proj",
  "up_proj": "mlp.up_proj",
  "down_proj": "mlp.down_proj",
}
# Of a weight's published name and its shape in the model.
ShardingRule = Callable[[str, tuple[int, ...]], NamedSharding]
EMBEDDING, NORM, HEAD = (
  "model.embed_tokens.weight",
  "model.norm.weight",
  "lm_head.weight",
)
_SINKS, _ROUTER, _EXPERTS = "self_attn.sinks", "mlp.router", "mlp.experts"


def target_tensors(config: TargetConfig) -> dict[str, tuple[int, ...]]:
  """Name and shape of every tensor that such a target is published as."""
  table = (config.vocab_size, config.hidden_size)
  layer = layer_tensors(config)
  tensors = {EMBEDDING: table, NORM: (config.hidden_size,)}
  for i in range(config.num_layers):
    tensors |= {_in_layer(i, name): shape for name, shape in layer.items()}
  return tensors if config.tied_head else {**tensors, HEAD: table}


def layer_tensors(
  config: TargetConfig | DrafterConfig,
) -> dict[str, tuple[int, ...]]:
  """Name within its layer, and shape, of each tensor of one layer."""
  c = config
  width = c.hidden_size
  query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  attention = {
    "q_proj": (query, width),
    "k_proj": (key, width),
    "v_proj": (key, width),
    "o_proj": (width, query),
  }
  shapes = {"input_norm": (width,), "post_norm": (width,), **attention}
  if c.qk_norm:
    shapes |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
  if not c.num_experts:
    mlp = c.intermediate_size
    shapes |= {"gate_proj": (mlp, width), "up_proj": (mlp, width)}
    shapes |= {"down_proj": (width, mlp)}
  tensors = {f"{LAYER_TENSORS[k]}.weight": v for k, v in shapes.items()}
  if c.attention_bias:
    for field, shape in attention.items():
      tensors[f"{LAYER_TENSORS[field]}.bias"] = shape[:1]
  if c.sinks:
    tensors[_SINKS] = (c.num_heads,)
  if isinstance(c, TargetConfig) and c.num_experts:
    tensors |= _expert_tensors(c)
  return tensors


def _expert_tensors(config: TargetConfig) -> dict[str, tuple[int, ...]]:
  """Those of a layer's experts; gate and up alternate in one matrix."""
  count, width = config.num_experts, config.hidden_size
  mlp = config.intermediate_size
  tensors: dict[str, tuple[int, ...]] = {
    f"{_ROUTER}.weight": (count, width),
    f"{_ROUTER}.bias": (count,),
  }
  for field, inputs, outputs in (
    ("gate_up_proj", width, 2 * mlp),
    ("down_proj", mlp, width),
  ):
    name = f"{_EXPERTS}.{field}"
    tensors[f"{name}_bias"] = (count, outputs)
    if config.mxfp4:
      blocks = inputs // mxfp4.BLOCK
      tensors[f"{name}_blocks"] = (count, outputs, blocks, mxfp4.BLOCK // 2)
      tensors[f"{name}_scales"] = (count, outputs, blocks)
    else:
      tensors[name] = (count, inputs, outputs)
  return tensors


def _in_layer(layer: int, name: str) -> str:
  """The whole name of a layer's tensor."""
  return f"model.layers.{layer}.{name}"


def target_from_tensors(
  config: TargetConfig,
  tensors: Mapping[str, np.ndarray],
  dtype: jax.typing.DTypeLike,
  implementation: str | None = None,
  sharding: ShardingRule | None = None,
) -> LlamaTarget:
  """Builds a target from its published tensors, one at a time.

  `tensors` may read on demand: its names are asked for first, then each tensor
  once, which goes to the device and is let go before the next. What it hands
  over may be a view of a mapped file; it is copied.

  Args:
    config: the target's shape.
    tensors: every tensor of the model and no other (`target_tensors`); a tied
      head may be among them, if it is the embedding once more.
    dtype: of the weights and of all computation that is not float32 by rule.
    implementation: of `cascade_attention`.
    sharding: where each weight goes, by its published name and the shape it
      has here, matrices `[in, out]`; `None` is the default device. A reader
      with a method `part` (`TensorFolder`) is asked for each device's own part
      of a tensor alone; quantised experts are placed once dequantised.

  Raises:
    UsageError: a tensor is missing, left over, or of another shape or kind.
  """
  reader = _Reader(config, tensors, dtype, sharding)
  embedding = reader.array(EMBEDDING)
  return LlamaTarget(
    embedding=embedding,
    lm_head=reader.head(embedding),
    layers=tuple(reader.layer(i) for i in range(config.num_layers)),
    norm=reader.array(NORM),
    config=config,
    implementation=implementation,
  )


def _check_shape(
  name: str, found: tuple[int, ...], shape: tuple[int, ...]
) -> None:
  """Raises `UsageError` unless the tensor has the shape of its name."""
  if found != shape:
    raise UsageError(f"target tensor {name}: shape {found}, expected {shape}")


def _check_tensor(name: str, value: Any, shape: tuple[int, ...]) -> None:
  """Raises `UsageError` unless the tensor is what its name promises."""

  def refuse(found: str) -> None:
    raise UsageError(f"target tensor {name}: {found}")

  _check_shape(name, value.shape, shape)
  codes = name.endswith(("_blocks", "_scales"))
  if codes and value.dtype != np.uint8:
    refuse(f"dtype {value.dtype}, expected uint8")
  if not codes and not jnp.issubdtype(value.dtype, jnp.floating):
    refuse(f"dtype {value.dtype}, expected floating point")
  known = name.endswith("_scales") and isinstance(value, np.ndarray)
  if known and (value == mxfp4.NAN_SCALE).any():
    refuse("a NaN scale, expected numbers")


def _check_finite(name: str, array: jax.Array, found: str) -> None:
  """Raises `UsageError` unless all of it is numbers.

  Where only shapes are asked for (`jax.eval_shape`) there is none to look at.
  """
  if not isinstance(array, jax.core.Tracer) and not _is_finite(array):
    raise UsageError(f"target tensor {name}: {found}")


class _Reader:
  """Tensors checked and put on the device, in the layout of the model."""

  def __init__(self, config, tensors, dtype, sharding=None):
    self._config, self._tensors, self._dtype = config, tensors, dtype
    self._sharding = sharding
    self._shapes = target_tensors(config)
    if config.tied_head and HEAD in tensors:
      self._shapes[HEAD] = self._shapes[EMBEDDING]
    for name in sorted(self._shapes.keys() ^ tensors.keys()):
      missing = name in self._shapes
      problem = "missing" if missing else "not part of such a model"
      raise UsageError(f"target tensor {name}: {problem}")

  def _raw(self, name: str, place: NamedSharding | None = None) -> jax.Array:
    """The tensor as it is stored, on its devices."""
    if place is not None:
      array = self._parts(name, place)
      _check_finite(name, array, "NaN or infinite, not numbers")
      return array
    value = self._tensors[name]
    _check_tensor(name, value, self._shapes[name])
    # A copy, and a whole one: a CPU's "device" would share the file's memory.
    with np.errstate(over="ignore"):  # float64 beyond float32: told below
      array = jax.block_until_ready(jnp.array(value))
    gc.collect(0)  # jax lets go of what it copied from with the next collection
    if jnp.issubdtype(array.dtype, jnp.floating):
      _check_finite(name, array, "NaN or infinite, not numbers")
    return array

  def _parts(self, name: str, place: NamedSharding) -> jax.Array:
    """The tensor as it is stored, each device's part read by itself."""
    shape, tensors = self._shapes[name], self._tensors
    part = getattr(tensors, "part", lambda name, index: tensors[name][index])
    # A reader knows the shape from its header.
    stored = getattr(tensors, "tensors", tensors)[name].shape
    _check_shape(name, stored, shape)

    def read(index: Any) -> np.ndarray:
      value = part(name, index)
      _check_tensor(name, value, value.shape)
      return np.array(value)  # A copy, as above.

    array = jax.make_array_from_callback(shape, place, read)
    return jax.block_until_ready(array)

  def _place(self, name: str, transposed: bool) -> NamedSharding | None:
    """Where the rule puts a tensor, as it is stored."""
    if self._sharding is None:
      return None
    shape = self._shapes[name]
    place = self._sharding(name, shape[::-1] if transposed else shape)
    if not transposed:
      return place
    spec = [*place.spec, *[None] * (len(shape) - len(place.spec))]
    return NamedSharding(place.mesh, PartitionSpec(*spec[::-1]))

  def array(self, name: str) -> jax.Array:
    """A tensor in its published layout."""
    return self._raw(name, self._place(name, False)).astype(self._dtype)

  def head(self, embedding: jax.Array) -> jax.Array | None:
    """The head, or `None` where it is the embedding."""
    head = self.array(HEAD) if HEAD in self._shapes else None
    if head is None or not self._config.tied_head:
      return head
    if not bool((head == embedding).all()):
      raise UsageError(
        f"target tensor {HEAD}: other values than {EMBEDDING}, expected the"
        " same as they are tied"
      )
    return None

  def matrix(self, name: str) -> jax.Array:
    """A matrix, or a stack of them, transposed."""
    raw = self._raw(name, self._place(name, True))
    matrix = _transposed(raw, self._dtype)
    if self._sharding is None:
      return matrix
    # XLA keeps each part where it is; this only says so.
    return jax.device_put(matrix, self._sharding(name, matrix.shape))

  def layer(self, i: int) -> LayerWeights:
    """All weights of layer i."""
    config = self._config
    names = layer_tensors(config)

    def field(name: str) -> jax.Array | None:
      if name not in names:
        return None
      read = self.matrix if len(names[name]) == 2 else self.array
      return read(_in_layer(i, name))

    weights: dict[str, Any] = {
      k: field(f"{name}.weight") for k, name in LAYER_TENSORS.items()
    }
    for k in "qkvo":
      weights[f"{k}_bias"] = field(f"{LAYER_TENSORS[f'{k}_proj']}.bias")
    weights["sinks"] = field(_SINKS)
    if config.num_experts:
      weights["experts"] = self._experts(i)
    return LayerWeights(**weights)

  def _experts(self, i: int) -> Experts:
    """The experts of layer i, gate and up apart."""
    stem = _in_layer(i, _EXPERTS)
    bias = self.array(f"{stem}.gate_up_proj_bias")
    weights = self._expert_matrices(f"{stem}.gate_up_proj")
    gate, up = _halves(weights)
    return Experts(
      router=self.matrix(_in_layer(i, f"{_ROUTER}.weight")),
      router_bias=self.array(_in_layer(i, f"{_ROUTER}.bias")),
      gate_proj=gate,
      gate_bias=bias[:, ::2],
      up_proj=up,
      up_bias=bias[:, 1::2],
      down_proj=self._expert_matrices(f"{stem}.down_proj"),
      down_bias=self.array(f"{stem}.down_proj_bias"),
      top_k=self._config.experts_per_token,
      limit=self._config.swiglu_limit,
    )

  def _expert_matrices(self, name: str) -> jax.Array:
    """One matrix per expert `[in, out]`, dequantised on the device."""
    if not self._config.mxfp4:
      return self.array(name)
    blocks = self._raw(f"{name}_blocks")
    scales = self._raw(f"{name}_scales")
    weights = _dequantized(blocks, scales, self._dtype)
    _check_finite(f"{name}_scales", weights, "too large for float32")
    if self._sharding is None:
      return weights
    return jax.device_put(weights, self._sharding(name, weights.shape))


@jax.jit
def _is_finite(array):
  """Whether all of it is numbers."""
  return jnp.isfinite(array).all()


@functools.partial(jax.jit, static_argnames="dtype")
def _transposed(matrices, dtype):
  """The last two axes exchanged, in `dtype`."""
  return matrices.swapaxes(-1, -2).astype(dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantized(blocks, scales, dtype):
  """MXFP4 `[experts, out, in]` as `[experts, in, out]`."""
  return mxfp4.dequantize(blocks, scales, dtype).swapaxes(-1, -2)


@jax.jit
def _halves(weights):
  """Even and odd columns."""
  return weights[..., ::2], weights[..., 1::2]

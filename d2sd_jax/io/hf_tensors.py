"""A target from its published tensors, one at a time (`hf_names`)."""

import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from d2sd_jax.config import TargetConfig
from d2sd_jax.errors import UsageError
from d2sd_jax.io import mxfp4
from d2sd_jax.io.hf_names import (
  EMBEDDING,
  EXPERTS,
  HEAD,
  LAYER_TENSORS,
  NORM,
  ROUTER,
  SINKS,
  in_layer,
  layer_tensors,
  target_tensors,
)
from d2sd_jax.kernels.device import stores_transposed
from d2sd_jax.kernels.transposed import Transposed
from d2sd_jax.models.experts import Experts
from d2sd_jax.models.layers import LayerWeights
from d2sd_jax.models.target import LlamaTarget
from d2sd_jax.sharding import TENSOR
from d2sd_jax.tensor_parallel import Share, check_split, take_rows

# What a device has of a tensor: which rows, as a `Share` calls them, and along
# which axis of the tensor as it is stored; `None` is all of it.
_Cut = tuple[str, int] | None
_QUERIES, _KEYS, _INNER = ("query_rows", 0), ("key_rows", 0), ("inner_rows", 0)
_HEADS, _VOCABULARY = ("heads", 0), ("vocabulary_rows", 0)


def target_from_tensors(
  config: TargetConfig,
  tensors: Mapping[str, np.ndarray],
  dtype: jax.typing.DTypeLike,
  implementation: str | None = None,
  mesh: Mesh | None = None,
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
    mesh: devices that share the model by its axis `tensor` (see
      `d2sd_jax.tensor_parallel`); `None` is the default device alone. A reader
      with a method `part` (`TensorFolder`) is asked for each device's own rows
      of a matrix alone. What is split by columns is read whole by each process,
      as experts are, a layer at a time and on one device.

  Raises:
    UsageError: a tensor is missing, left over, or of another shape or kind; or
      the model cannot be shared by so many devices.
  """
  reader = _Reader(config, tensors, dtype, mesh)
  embedding = reader.weight((EMBEDDING, _VOCABULARY))
  return LlamaTarget(
    embedding=embedding,
    lm_head=reader.head(embedding),
    layers=tuple(reader.layer(i) for i in range(config.num_layers)),
    norm=reader.weight((NORM, None)),
    config=config,
    implementation=implementation,
    axis=None if mesh is None else TENSOR,
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
  """Tensors checked and put on their devices, in the layout of the model.

  A weight is made of shares, one a device, each of which is read, checked and
  laid out by itself. Without a mesh there is one, of everything.
  """

  def __init__(self, config, tensors, dtype, mesh=None):
    self._config, self._tensors, self._dtype = config, tensors, dtype
    self._mesh, size = mesh, 1 if mesh is None else mesh.shape[TENSOR]
    check_split(config, size)
    self._shares = [
      (Share(config=config, part=part, size=size), devices)
      for part, devices in _devices_by_part(mesh)
    ]
    self._shapes = target_tensors(config)
    if config.tied_head and HEAD in tensors:
      self._shapes[HEAD] = self._shapes[EMBEDDING]
    for name in sorted(self._shapes.keys() ^ tensors.keys()):
      missing = name in self._shapes
      problem = "missing" if missing else "not part of such a model"
      raise UsageError(f"target tensor {name}: {problem}")

  def weight(
    self, *sources: tuple[str, _Cut], transposed: bool = False
  ) -> jax.Array:
    """One weight, of one or more tensors laid end to end.

    Args:
      sources: tensors by name, and which part of each is a device's own.
      transposed: from `[out, in]` to `[in, out]`.
    """
    # A tensor has left the host's memory when the next is read.
    held = [self._held(*source) for source in sources]
    arrays = [
      _laid_out(pieces, self._dtype, transposed)
      for pieces in zip(*held, strict=True)
    ]
    cut = sources[0][1]
    axis = None if cut is None else cut[1] ^ transposed
    return self._assembled(arrays, axis)

  def matrix(self, *sources: tuple[str, _Cut]) -> jax.Array | Transposed:
    """One matrix `[in, out]` of `weight`, in the order that suits devices."""
    if stores_transposed():
      return Transposed(stored=self.weight(*sources))
    return self.weight(*sources, transposed=True)

  def _held(self, name: str, cut: _Cut) -> list[jax.Array]:
    """A tensor's shares on all devices, as they are stored."""
    return [
      self._put(name, value, device)
      for devices, value in self._read(name, cut)
      for device in devices
    ]

  def _read(
    self, name: str, cut: _Cut
  ) -> Iterator[tuple[Sequence[Any], np.ndarray]]:
    """Each share of a tensor as it is stored, and the devices that hold it."""
    shape = self._shapes[name]
    if cut is None or self._mesh is None:
      value = self._tensors[name]
      _check_tensor(name, value, shape)
      for _, devices in self._shares:
        yield devices, value
      return
    rows, axis = cut
    box = self._boxes(name, axis)
    for share, devices in self._shares:
      value = _take(box, getattr(share, rows), axis, len(shape))
      _check_tensor(name, value, value.shape)
      yield devices, value

  def _boxes(
    self, name: str, axis: int
  ) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Reads boxes of a tensor that is cut along an axis.

    From a file only the rows that are in a box; columns lie scattered there,
    so that what is cut by them is read whole, once.
    """
    tensors, shape = self._tensors, self._shapes[name]
    if axis == 0 and hasattr(tensors, "part"):
      # Its shape is known from the file's header.
      _check_shape(name, tensors.tensors[name].shape, shape)
      return functools.partial(tensors.part, name)
    whole = tensors[name]
    _check_shape(name, whole.shape, shape)
    return lambda index: whole[index]

  def _put(self, name: str, value: np.ndarray, device: Any) -> jax.Array:
    """An array of its own on a device, if all of it is numbers."""
    # A copy, and a whole one: a CPU's "device" would share the file's memory.
    with np.errstate(over="ignore"):  # float64 beyond float32: told below
      array = jax.block_until_ready(jnp.array(value, device=device))
    gc.collect(0)  # jax lets go of what it copied from with the next collection
    if jnp.issubdtype(array.dtype, jnp.floating):
      _check_finite(name, array, "NaN or infinite, not numbers")
    return array

  def _assembled(
    self, arrays: Sequence[jax.Array], axis: int | None
  ) -> jax.Array:
    """The devices' shares as one array, split along an axis or alike."""
    if self._mesh is None:
      return arrays[0]
    shape = list(arrays[0].shape)
    spec: list[str | None] = [None] * len(shape)
    if axis is not None:
      shape[axis] *= self._mesh.shape[TENSOR]
      spec[axis] = TENSOR
    place = NamedSharding(self._mesh, PartitionSpec(*spec))
    return jax.make_array_from_single_device_arrays(
      tuple(shape), place, list(arrays)
    )

  def head(self, embedding: jax.Array) -> jax.Array | None:
    """The head, or `None` where it is the embedding."""
    if HEAD not in self._shapes:
      return None
    head = self.weight((HEAD, _VOCABULARY))
    if not self._config.tied_head:
      return head
    if not bool((head == embedding).all()):
      raise UsageError(
        f"target tensor {HEAD}: other values than {EMBEDDING}, expected the"
        " same as they are tied"
      )
    return None

  def layer(self, i: int) -> LayerWeights:
    """All weights of layer i."""
    config = self._config
    names = layer_tensors(config)

    def weight(*fields: tuple[str, _Cut], kind: str = "weight"):
      sources = [
        (f"{LAYER_TENSORS[field]}.{kind}", cut) for field, cut in fields
      ]
      if sources[0][0] not in names:
        return None
      read = self.matrix if len(names[sources[0][0]]) == 2 else self.weight
      return read(*((in_layer(i, name), cut) for name, cut in sources))

    heads = [("q_proj", _QUERIES), ("k_proj", _KEYS), ("v_proj", _KEYS)]
    norms = ("input_norm", "q_norm", "k_norm", "post_norm")
    sinks = (in_layer(i, SINKS), _HEADS)
    return LayerWeights(
      **{name: weight((name, None)) for name in norms},
      qkv_proj=weight(*heads),
      qkv_bias=weight(*heads, kind="bias"),
      o_proj=weight(("o_proj", ("query_rows", 1))),
      o_bias=weight(("o_proj", None), kind="bias"),
      gate_up_proj=weight(("gate_proj", _INNER), ("up_proj", _INNER)),
      down_proj=weight(("down_proj", ("inner_rows", 1))),
      sinks=self.weight(sinks) if config.sinks else None,
      experts=self._experts(i) if config.num_experts else None,
    )

  def _experts(self, i: int) -> Experts:
    """The experts of layer i, gate and up apart."""
    stem = in_layer(i, EXPERTS)
    router = in_layer(i, ROUTER)
    gate, up = _halves(self._expert_matrices(f"{stem}.gate_up_proj"))
    bias = f"{stem}.gate_up_proj_bias"
    gate_bias, up_bias = _halves(self._on_one_device(bias).astype(self._dtype))
    return Experts(
      router=self.matrix((f"{router}.weight", None)),
      router_bias=self.weight((f"{router}.bias", None)),
      gate_proj=self._inner_share(gate, 2),
      gate_bias=self._inner_share(gate_bias, 1),
      up_proj=self._inner_share(up, 2),
      up_bias=self._inner_share(up_bias, 1),
      down_proj=self._inner_share(
        self._expert_matrices(f"{stem}.down_proj"), 1
      ),
      down_bias=self.weight((f"{stem}.down_proj_bias", None)),
      top_k=self._config.experts_per_token,
      limit=self._config.swiglu_limit,
    )

  def _inner_share(self, whole: jax.Array, axis: int) -> jax.Array:
    """A weight that is whole on one device, split by its inner width."""
    if self._mesh is None:
      return whole
    arrays = []
    for share, devices in self._shares:
      value = take_rows(whole, share.inner_rows, axis)
      arrays += [jax.device_put(value, device) for device in devices]
    return self._assembled(arrays, axis)

  def _on_one_device(self, name: str) -> jax.Array:
    """The tensor as it is stored."""
    value = self._tensors[name]
    _check_tensor(name, value, self._shapes[name])
    return self._put(name, value, self._shares[0][1][0])

  def _expert_matrices(self, name: str) -> jax.Array:
    """One matrix per expert `[in, out]`, dequantised on the device."""
    if not self._config.mxfp4:
      return self._on_one_device(name).astype(self._dtype)
    blocks = self._on_one_device(f"{name}_blocks")
    scales = self._on_one_device(f"{name}_scales")
    weights = _dequantized(blocks, scales, self._dtype)
    _check_finite(f"{name}_scales", weights, "too large for float32")
    return weights


def _devices_by_part(
  mesh: Mesh | None,
) -> list[tuple[int, Sequence[jax.Device | None]]]:
  """This process's devices that hold each share; `None` is the default one."""
  if mesh is None:
    return [(0, [None])]
  parts = np.moveaxis(mesh.devices, mesh.axis_names.index(TENSOR), 0)
  mine = jax.process_index()
  held = [[d for d in part.flat if d.process_index == mine] for part in parts]
  return [(i, devices) for i, devices in enumerate(held) if devices]


def _take(
  box: Callable[[tuple[slice, ...]], np.ndarray],
  rows: np.ndarray,
  axis: int,
  ndim: int,
) -> np.ndarray:
  """Rows of a tensor along an axis, zeros where a row is -1.

  Args:
    box: reads a box of the tensor.
    rows: their numbers, in the order that is wanted.
    axis: along which they are counted.
    ndim: of the tensor.
  """
  real = rows[rows >= 0]
  first, end = (int(real.min()), int(real.max()) + 1) if len(real) else (0, 0)
  around = [slice(None)] * ndim
  value = box((*around[:axis], slice(first, end)))
  if np.array_equal(rows, np.arange(first, end)):
    return value
  shape = list(value.shape)
  shape[axis] = len(rows)
  taken = np.zeros(shape, value.dtype)
  at = tuple(rows >= 0 if i == axis else slice(None) for i in range(ndim))
  taken[at] = np.take(value, real - first, axis=axis)
  return taken


@jax.jit
def _is_finite(array):
  """Whether all of it is numbers."""
  return jnp.isfinite(array).all()


@functools.partial(jax.jit, static_argnames=("dtype", "transposed"))
def _laid_out(pieces, dtype, transposed):
  """Tensors end to end in `dtype`, as columns if they are transposed."""
  weight = jnp.concatenate([piece.astype(dtype) for piece in pieces])
  return weight.T if transposed else weight


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantized(blocks, scales, dtype):
  """MXFP4 `[experts, out, in]` as `[experts, in, out]`."""
  return mxfp4.dequantize(blocks, scales, dtype).swapaxes(-1, -2)


@jax.jit
def _halves(weights):
  """Even and odd columns."""
  return weights[..., ::2], weights[..., 1::2]

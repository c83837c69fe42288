"""A residual sum and its RMSNorm: on Hopper one launch in the place of two.

In decoding a launch costs about as much as all that lies between two products.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from d2sd_jax.kernels.cascade_attention import mosaic_gpu
from d2sd_jax.typing import Array, Float

# Threads of a warpgroup; a row is made of as many elements, some several times.
_THREADS = 128
_MAX_BYTES = 16  # One thread loads at once.
# Many rows fill the device anyway, and XLA serves them well.
MAX_ROWS = mosaic_gpu.MAX_NODES


def rms_norm(
  x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
  """RMSNorm in float32, returned in `x`'s dtype."""
  wide = x.astype(jnp.float32)
  scale = lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
  return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def add_norm(
  x: Float[Array, "... D"],
  update: Float[Array, "... D"] | None,
  weight: Float[Array, " D"],
  eps: float,
  interpret: Any = None,
) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
  """`x + update` and its `rms_norm`, both in `x`'s dtype.

  Args:
    x: hidden states.
    update: what a sublayer adds to them; `None` is nothing.
    weight: of the norm.
    eps: of the norm.
    interpret: `InterpretGPUParams` runs Hopper's kernel on a CPU.
  """
  if interpret is None and not wins(x):
    return _add_norm(x, update, weight, eps)
  return _once(x, update, weight, eps, interpret)


def wins(x: Float[Array, "... D"]) -> bool:
  """Whether the kernel is the default: few rows of 16 bits, on Hopper."""
  return (
    x.dtype.name in mosaic_gpu.DTYPES
    and x.shape[-1] >= _THREADS
    and x.shape[-1] % 8 == 0
    and x.size // x.shape[-1] <= MAX_ROWS
    and mosaic_gpu.is_available()
  )


def _add_norm(x, update, weight, eps):
  """In XLA, on any device."""
  total = x if update is None else x + update
  return total, rms_norm(total, weight, eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _in_kernel(x, update, weight, eps, interpret):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  width = x.shape[-1]
  rows = [a.reshape(-1, width) for a in (x, update) if a is not None]
  out = jax.ShapeDtypeStruct(rows[0].shape, x.dtype)
  run = plgpu.kernel(
    functools.partial(_row, eps=eps, count=len(rows)),
    out_type=[out] * len(rows),
    grid=(len(rows[0]),),
    grid_names=("row",),
    interpret=interpret,
  )
  *total, normed = run(*rows, weight)
  return (total[0].reshape(x.shape) if total else x), normed.reshape(x.shape)


def _forward(x, update, weight, eps, interpret):
  operands = x, update, weight
  return _in_kernel(*operands, eps, interpret), operands


def _backward(eps, interpret, operands, cotangents):
  return jax.vjp(lambda *xs: _add_norm(*xs, eps), *operands)[1](cotangents)


_in_kernel.defvjp(_forward, _backward)
# All layers of a model share one lowering this way.
_once = jax.jit(_in_kernel, static_argnums=(3, 4))


def _row(*refs, eps, count):
  """One block: one row, read once."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  *added, weight = refs[: count + 1]
  *total, normed = refs[count + 1 :]
  row, width = lax.axis_index("row"), weight.shape[0]
  spans = []
  for first, size, repeated in _spans(width):
    here = pl.ds(first, size)
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=_vector(first, size))
    load = lambda ref: plgpu.load(ref, layout=layout).astype(jnp.float32)  # noqa: B023
    value = functools.reduce(
      jnp.add, [load(ref.at[row, here]) for ref in added]
    )
    if total:
      # Rounded, as the sum that the next layer gets.
      value = value.astype(total[0].dtype)
      total[0][row, here] = value
      value = value.astype(jnp.float32)
    squares = value * value
    if repeated:
      index = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)
      squares = jnp.where(index >= repeated, squares, 0.0)
    spans.append((here, value, load(weight.at[here]), squares.sum()))
  scale = lax.rsqrt(sum(span[-1] for span in spans) / width + eps)
  for here, value, factor, _ in spans:
    normed[row, here] = (value * scale * factor).astype(normed.dtype)


def _spans(width):
  """Parts of a row that a warpgroup can hold: first element, size, repeated.

  What whole warpgroups leave over is read with some of what lies before it.
  """
  whole = width - width % _THREADS
  yield 0, whole, 0
  if whole < width:
    yield width - _THREADS, _THREADS, _THREADS - width % _THREADS


def _vector(first, size):
  """Elements of 16 bits that a thread loads at once."""
  fits = lambda n: size % (n * _THREADS) == 0 and first % n == 0
  return max(n for n in (1, 2, 4, 8) if 2 * n <= _MAX_BYTES and fits(n))

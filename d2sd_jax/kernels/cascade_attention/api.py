"""The public operation: shapes, semantics and dispatch."""

from collections.abc import Callable, Mapping
from typing import Literal

import jax.numpy as jnp

from d2sd_jax.errors import require
from d2sd_jax.kernels.cascade_attention import (
  cudnn,
  lone_node,
  mosaic_gpu,
  mosaic_tpu,
  reference,
  xla,
)
from d2sd_jax.kernels.cascade_attention.heads import Heads, taken
from d2sd_jax.typing import Array, Bool, Float, Int

IMPLEMENTATIONS: Mapping[str, Callable[..., Array]] = {
  "cudnn": cudnn.cascade_attention,
  "lone_node": lone_node.cascade_attention,
  "mosaic_gpu": mosaic_gpu.cascade_attention,
  "mosaic_tpu": mosaic_tpu.cascade_attention,
  "reference": reference.cascade_attention,
  "xla": xla.cascade_attention,
}
# What reads `Heads` where they lie.
IN_PLACE = ("lone_node", "mosaic_gpu")
CAUSAL: Literal["causal"] = "causal"
LocalMask = Bool[Array, "#B #G R R"] | Literal["causal"] | None
# From so many nodes a row, one dense flash attention beats two parts in XLA.
MIN_CUDNN_NODES = 128


def cascade_attention(
  query: Float[Array, "B G R N H"] | Heads,
  prefix_keys: Float[Array, "B J S H"],
  prefix_values: Float[Array, "B J S H"],
  local_keys: Float[Array, "B G R J H"] | Heads,
  local_values: Float[Array, "B G R J H"] | Heads,
  *,
  prefix_end: Int[Array, "B"] | Int[Array, "B G"],
  prefix_start: Int[Array, "B G R"] | None = None,
  local_mask: LocalMask = None,
  sinks: Float[Array, "N"] | None = None,
  implementation: str | None = None,
) -> Float[Array, "B G R N H"]:
  """Softmax attention of G groups of R nodes over a shared prefix and a tree.

  A node attends to prefix rows `[prefix_start, prefix_end)` and, within its
  own group only, to the nodes its row of `local_mask` allows. The two parts
  are computed apart, so that the prefix is read once for all nodes, and are
  merged by their float32 log-sum-exp (Sec. 3.3):

      o = (e^{l1-m} o1 + e^{l2-m} o2) / (e^{l1-m} + e^{l2-m}),  m = max(l1, l2)

  One operation for four callers: the first draft (one group, all-to-all), the
  second draft (K groups), verification (one group, ancestor mask) and training
  (one group per anchor, each with its own prefix end).

  Args:
    query: already rotated, not yet scaled; scores are divided by sqrt(H).
      `Heads` are read where they lie, if the implementation can.
    prefix_keys: rows of the cache; rows past `prefix_end` may hold anything
      finite. S may be 0.
    prefix_values: as `prefix_keys`.
    local_keys: keys of the nodes themselves.
    local_values: as `local_keys`.
    prefix_end: rows of the prefix to be seen, of each batch row or each group.
    prefix_start: first row to be seen by each node (sliding windows); `None`
      is 0.
    local_mask: `mask[b, g, i, j]`: node i sees node j; `None` is all-to-all,
      `CAUSAL` that a node sees itself and those before it.
    sinks: a logit per query head that joins the softmax's denominator.
    implementation: a key of `IMPLEMENTATIONS`; `None` chooses by device, dtype
      and sizes (`default_implementation`).

  Returns:
    The attention output in `query`'s dtype; zero for a node that sees nothing.

  Raises:
    UsageError: `implementation` is unknown, or cannot run this here.
    ValueError: the shapes do not fit each other.
  """
  batch, groups, nodes, heads, head_dim = query.shape
  kv_heads = local_keys.shape[3]
  local = (batch, groups, nodes, kv_heads, head_dim)
  if local_keys.shape != local or local_values.shape != local:
    raise ValueError(f"local keys and values: expected shape {local}")
  prefix = (batch, kv_heads, prefix_keys.shape[2], head_dim)
  if prefix_keys.shape != prefix or prefix_values.shape != prefix:
    raise ValueError(f"prefix keys and values: expected shape {prefix}")
  if heads % kv_heads:
    raise ValueError(f"{heads} query heads do not share {kv_heads} key heads")
  name = implementation or default_implementation(
    query, prefix_keys, sinks, local_keys
  )
  require(
    name in IMPLEMENTATIONS,
    "implementation",
    name,
    f"one of {', '.join(IMPLEMENTATIONS)}",
  )
  if prefix_end.ndim == 1:
    prefix_end = prefix_end[:, None]
  if local_mask is None:
    local_mask = jnp.ones((1, 1, nodes, nodes), bool)
  elif isinstance(local_mask, str) and name != "cudnn":
    local_mask = jnp.tri(nodes, dtype=bool)[None, None]
  if name not in IN_PLACE:
    query, local_keys, local_values = map(
      taken, (query, local_keys, local_values)
    )
  return IMPLEMENTATIONS[name](
    query,
    prefix_keys,
    prefix_values,
    local_keys,
    local_values,
    prefix_end=jnp.broadcast_to(prefix_end, (batch, groups)),
    prefix_start=prefix_start,
    local_mask=local_mask,
    sinks=sinks,
  )


def default_implementation(
  query: Float[Array, "B G R N H"] | Heads,
  prefix_keys: Float[Array, "B J S H"],
  sinks: Float[Array, "N"] | None = None,
  local_keys: Float[Array, "B G R J H"] | Heads | None = None,
) -> str:
  """The fastest implementation for these operands on the default device.

  On a GPU a lone node over a short cache has a kernel of its own. Mosaic GPU's
  serves decoding on Hopper, and Mosaic TPU's on a TPU. cuDNN's
  wants 16-bit operands, and is worth its waste from a few hundred nodes a row;
  its gradient asks for even sizes. XLA runs everything.

  Args:
    query: as for `cascade_attention`.
    prefix_keys: as for `cascade_attention`.
    sinks: as for `cascade_attention`.
    local_keys: as for `cascade_attention`; `None`: of `query`'s dtype.
  """
  _, groups, nodes, _, head_dim = query.shape
  rows = groups * nodes
  if lone_node.wins(query, prefix_keys, local_keys):
    return "lone_node"
  if mosaic_gpu.wins(query, prefix_keys, local_keys):
    return "mosaic_gpu"
  fits = (
    query.dtype.name in cudnn.DTYPES
    and sinks is None
    and rows >= MIN_CUDNN_NODES
    and rows % 2 == 0
    and prefix_keys.shape[2] % 2 == 0
    and head_dim % 8 == 0
    and head_dim <= 128
  )
  if fits and cudnn.is_available():
    return "cudnn"
  return "mosaic_tpu" if mosaic_tpu.wins(query, prefix_keys) else "xla"

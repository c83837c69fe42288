"""The splits of a prefix as one output, in one launch; see `mosaic_gpu`.

XLA takes two of them for more nodes than one: it lays the logarithms out anew.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from d2sd_jax.kernels import triton
from d2sd_jax.typing import Array, Float


def merge(
  outputs: Float[Array, "splits B J rows H"],
  logs: Float[Array, "splits B J rows"],
  *,
  nodes: int,
  chunk: int,
  share: int,
  dtype: jax.typing.DTypeLike,
) -> Float[Array, "B nodes N H"]:
  """Outputs weighted by 2^(l - m) (Sec. 3.3), of each node and head.

  Args:
    outputs: of each split; rows are chunks of nodes, each of all query heads of
      a key head one after another, as the kernel takes them.
    logs: their log-sum-exp, base 2.
    nodes: how many there are.
    chunk: nodes in a chunk.
    share: query heads of a key head.
    dtype: of the result.

  Returns:
    One output for each node and query head.
  """
  batch, kv_heads, _, head_dim = outputs.shape[1:]
  own = lambda b, j, a, n: (0, b, j, a * share + n)
  splits = len(outputs)
  return triton.call(
    functools.partial(_kernel, nodes=nodes),
    grid=(batch * kv_heads, pl.cdiv(nodes, chunk), share),
    in_specs=[
      pl.BlockSpec(
        (splits, None, None, chunk, head_dim),
        lambda i, a, n: (*own(i // kv_heads, i % kv_heads, a, n), 0),
      ),
      pl.BlockSpec(
        (splits, None, None, chunk),
        lambda i, a, n: own(i // kv_heads, i % kv_heads, a, n),
      ),
    ],
    out_specs=pl.BlockSpec(
      (None, chunk, None, head_dim),
      lambda i, a, n: (i // kv_heads, a, i % kv_heads * share + n, 0),
    ),
    out_shape=jax.ShapeDtypeStruct(
      (batch, nodes, kv_heads * share, head_dim), dtype
    ),
    warps=4,
    name="merge",
  )(outputs, logs)


def _kernel(outputs_ref, logs_ref, merged_ref, *, nodes):
  """A chunk of nodes of one head."""
  splits, rows, head_dim = outputs_ref.shape
  logs = [logs_ref[i] for i in range(splits)]
  top = functools.reduce(jnp.maximum, logs)
  weights = [jnp.exp2(x - top) for x in logs]
  terms = [outputs_ref[i] * w[:, None] for i, w in enumerate(weights)]
  total = functools.reduce(jnp.add, weights)[:, None]
  merged = functools.reduce(jnp.add, terms) / total
  there = pl.program_id(1) * rows + jnp.arange(rows) < nodes
  triton.language.store(
    merged_ref,
    merged.astype(merged_ref.dtype),
    mask=jnp.broadcast_to(there[:, None], (rows, head_dim)),
  )

"""Norm and rotation of a few nodes' heads on a GPU, in one launch.

XLA takes two to four behind a product that is a kernel of its own.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from d2sd_jax.kernels import triton
from d2sd_jax.typing import Array, Float

# Of more programs the last begin late, so each has some heads, a power of two.
MOST_PROGRAMS, MOST_HEADS = 1024, 8


def fits(heads: Float[Array, "*positions heads H"]) -> bool:
  """Whether the kernel can run, and pays."""
  *positions, _, head_dim = heads.shape
  return (
    triton.runs_here()
    and head_dim & (head_dim - 1) == 0
    and 0 < math.prod(positions) <= triton.MOST_ROWS
  )


@triton.lowered_once("eps", "num_heads", "num_kv_heads")
def queries_and_keys(
  heads: Float[Array, "*positions heads H"],
  cos: Float[Array, "*positions half"],
  sin: Float[Array, "*positions half"],
  norms: tuple[Float[Array, " H"], Float[Array, " H"]] | None,
  eps: float,
  *,
  num_heads: int,
  num_kv_heads: int,
) -> Float[Array, "*positions rotated H"]:
  """Normed and rotated queries and keys, without a gradient.

  Args:
    heads: queries, keys, then values, which are not read.
    cos: of the angles of each position, float32.
    sin: as `cos`.
    norms: weights for a query's and a key's norm; `None` is no norm.
    eps: of the norms.
    num_heads: how many queries.
    num_kv_heads: how many keys.

  Returns:
    Queries, then keys.
  """
  *positions, held, head_dim = heads.shape
  half, rotated = head_dim // 2, num_heads + num_kv_heads
  heads = heads.reshape(-1, held, head_dim)
  angles = [
    jnp.broadcast_to(x, (*positions, half)).reshape(-1, half)
    for x in (cos, sin)
  ]
  each = _heads_each(len(heads), rotated)
  own = pl.BlockSpec((None, each, head_dim), lambda row, i: (row, i, 0))
  angle = pl.BlockSpec((None, half), lambda row, _: (row, 0))
  norm = pl.BlockSpec((head_dim,), lambda *_: (0,))
  out = triton.call(
    functools.partial(_kernel, eps=eps, num_heads=num_heads),
    grid=(len(heads), rotated // each),
    in_specs=[own, angle, angle, *([norm] * 2 if norms else [])],
    out_specs=own,
    out_shape=jax.ShapeDtypeStruct(
      (len(heads), rotated, head_dim), heads.dtype
    ),
    warps=max(1, each // 2),
    name="norm_and_rotate",
  )(heads, *angles, *(norms or ()))
  return out.reshape(*positions, rotated, head_dim)


def _heads_each(rows: int, heads: int) -> int:
  """How many heads a program has: one, until programs are too many."""
  return math.gcd(heads, MOST_HEADS) if rows * heads > MOST_PROGRAMS else 1


def _kernel(heads_ref, cos_ref, sin_ref, *refs, eps, num_heads):
  """Some heads of one node, their two halves apart."""
  *norm_refs, out_ref = refs
  each, half = len(heads_ref), len(cos_ref)
  halves = (pl.ds(0, half), pl.ds(half, half))
  a, b = (heads_ref[:, at].astype(jnp.float32) for at in halves)
  if norm_refs:
    squares = (a * a + b * b).sum(1, keepdims=True)
    scale = jax.lax.rsqrt(squares / (2 * half) + eps)
    own = pl.program_id(1) * each + jnp.arange(each)
    is_query = (own < num_heads)[:, None]
    query, key = norm_refs
    a, b = (
      x * scale * jnp.where(is_query, query[at], key[at]).astype(jnp.float32)
      for x, at in zip((a, b), halves, strict=True)
    )
  cos, sin = cos_ref[...], sin_ref[...]
  turned = (a * cos - b * sin, b * cos + a * sin)
  for at, x in zip(halves, turned, strict=True):
    out_ref[:, at] = x.astype(out_ref.dtype)

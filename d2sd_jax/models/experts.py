"""A mixture of experts, routed per token, as GPT-OSS has it."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange

from d2sd_jax.kernels.dot import dot_float32, matmul
from d2sd_jax.kernels.transposed import Transposed
from d2sd_jax.tensor_parallel import sum_parts
from d2sd_jax.typing import Array, Float, Int

# Slope of the gate's sigmoid: x sigmoid(1.702 x) approximates GELU.
ALPHA = 1.702
# Longer inputs go through in slices, so that all experts' activations fit.
MAX_ROWS = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
  """E feed-forward networks of which each token takes `top_k`.

  Attributes:
    router: with `router_bias`, scores of the experts.
    gate_proj, up_proj, down_proj: of each expert, `[in, out]`.
    limit: clamps the gate from above and the up projection on both sides.
  """

  router: Float[Array, "D E"] | Transposed
  router_bias: Float[Array, " E"]
  gate_proj: Float[Array, "E D M"]
  gate_bias: Float[Array, "E M"]
  up_proj: Float[Array, "E D M"]
  up_bias: Float[Array, "E M"]
  down_proj: Float[Array, "E M D"]
  down_bias: Float[Array, "E D"]
  top_k: int = dataclasses.field(metadata={"static": True})
  limit: float = dataclasses.field(metadata={"static": True})


def mix_experts(
  experts: Experts, x: Float[Array, "*positions D"], axis: str | None = None
) -> Float[Array, "*positions D"]:
  """Each token's `top_k` experts, weighed by a softmax over their scores.

  With few rows only the chosen experts' weights are read; with more, all of
  them, once, as a tree's rows choose nearly all.

  Args:
    experts: the experts; every device of a mesh has a part of each.
    x: hidden states.
    axis: of the mesh, over whose devices the inner widths are split.
  """
  rows = x.reshape(-1, x.shape[-1])
  count, num_experts = len(rows), len(experts.gate_proj)
  # What is gathered is read, written and read again.
  few = 3 * count * experts.top_k <= num_experts
  mix = _mix_chosen if few else _mix_all
  if count > MAX_ROWS and count % MAX_ROWS == 0:
    slices = rearrange(rows, "(c n) d -> c n d", n=MAX_ROWS)
    output = jax.lax.map(lambda part: mix(experts, part, axis), slices)
  else:
    output = mix(experts, rows, axis)
  return output.reshape(x.shape)


def route(
  experts: Experts, rows: Float[Array, "n D"]
) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
  """The chosen experts, the best first, and their float32 shares."""
  scores = dot_float32("nd,de->ne", rows, experts.router)
  scores = scores + experts.router_bias.astype(jnp.float32)
  top, chosen = jax.lax.top_k(scores, experts.top_k)
  return chosen, jax.nn.softmax(top, axis=-1)


def _mix_all(experts, rows, axis):
  """Every expert on every row, weighed by 0 where it was not chosen."""
  chosen, shares = route(experts, rows)
  one_hot = jax.nn.one_hot(chosen, len(experts.gate_proj), dtype=shares.dtype)
  shares = matmul("nk,nke->ne", shares, one_hot).astype(rows.dtype)
  hidden = _gated(
    matmul("nd,edm->nem", rows, experts.gate_proj) + experts.gate_bias,
    matmul("nd,edm->nem", rows, experts.up_proj) + experts.up_bias,
    experts.limit,
  )
  output = matmul("nem,emd->nd", hidden * shares[..., None], experts.down_proj)
  bias = matmul("ne,ed->nd", shares, experts.down_bias)
  return sum_parts(output, axis) + bias


def _mix_chosen(experts, rows, axis):
  """The chosen experts' weights gathered row by row."""
  chosen, shares = route(experts, rows)
  shares = shares.astype(rows.dtype)
  pick = lambda weights: jnp.take(weights, chosen, axis=0)
  hidden = _gated(
    matmul("nd,nkdm->nkm", rows, pick(experts.gate_proj))
    + pick(experts.gate_bias),
    matmul("nd,nkdm->nkm", rows, pick(experts.up_proj)) + pick(experts.up_bias),
    experts.limit,
  )
  hidden = hidden * shares[..., None]
  output = matmul("nkm,nkmd->nd", hidden, pick(experts.down_proj))
  bias = matmul("nk,nkd->nd", shares, pick(experts.down_bias))
  return sum_parts(output, axis) + bias


def _gated(gate, up, limit):
  """Clamped SwiGLU: (u + 1) g sigmoid(α g), g ≤ limit, |u| ≤ limit."""
  gate = jnp.minimum(gate, limit)
  up = jnp.clip(up, -limit, limit)
  return (up + 1) * gate * jax.nn.sigmoid(ALPHA * gate)

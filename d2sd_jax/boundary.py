"""Where will the first draft fail? (Sec. 3.2, Eq. 3-5)."""

import jax
import jax.numpy as jnp

from d2sd_jax.tensor_parallel import largest_score, sum_parts
from d2sd_jax.typing import Array, Float, Int


def token_confidence(
  logits: Float[Array, "... V"], axis: str | None = None
) -> Float[Array, "..."]:
  """Probability of the drafter's own argmax at each slot (Eq. 3).

  Always at temperature 1 and in float32, whatever the sampling temperature
  and the model's dtype: confidences rank where drafts fail, they do not
  choose tokens.

  Args:
    logits: drafter logits, any leading shape.
    axis: of a mesh, over whose devices the vocabulary is split.

  Returns:
    float32 probabilities in (0, 1], `logits`' leading shape.
  """
  logits = logits.astype(jnp.float32)
  # Not exp(max - logsumexp): their difference loses what large logits round.
  largest = largest_score(logits, axis)[..., None]
  return 1.0 / sum_parts(jnp.exp(logits - largest).sum(-1), axis)


def boundary_posterior(
  confidence: Float[Array, "... slots"],
) -> Float[Array, "... slots"]:
  """Probability that exactly i drafted tokens are accepted (Eq. 4).

  `r(i) = prod_{k<=i} c_k * (1 - c_{i+1})`. The mass left over, `prod c_k`,
  is "all accepted" and has no entry: there is nothing to re-draft.

  Args:
    confidence: `c_1..c_{γ-1}` along the last axis, at least one slot.

  Returns:
    float32 `r(0)..r(γ-2)`, same shape as `confidence`.
  """
  confidence = confidence.astype(jnp.float32)
  reached = jnp.cumprod(confidence, axis=-1)
  before = jnp.concatenate(
    [jnp.ones_like(reached[..., :1]), reached[..., :-1]], axis=-1
  )
  return before * (1.0 - confidence)


def select_prefixes(
  posterior: Float[Array, "... slots"], num_branches: int
) -> Int[Array, "... K"]:
  """The K likeliest accepted lengths, likeliest first (Eq. 5).

  Args:
    posterior: `r(i)` along the last axis.
    num_branches: K, static, at most the number of slots.

  Returns:
    int32, pairwise distinct prefix lengths i; ties go to the smaller i.
  """
  # `lax.top_k` documents that equal values keep the order of their indices.
  return jax.lax.top_k(posterior, num_branches)[1].astype(jnp.int32)

"""D²SD, dual-diffusion speculative decoding, in JAX.

The functions of the paper's Sections 3.1-3.3 are pure, jit-able and batched;
each can be used alone. `generate` runs them in one loop.
"""

__version__ = "0.1.0"

from d2sd_jax.boundary import (
  boundary_posterior,
  select_prefixes,
  token_confidence,
)
from d2sd_jax.config import DrafterConfig, TargetConfig, TreeConfig
from d2sd_jax.decoding.cycle import decode_cycle
from d2sd_jax.decoding.loop import generate, stream
from d2sd_jax.decoding.policies import POLICIES, TreePolicy
from d2sd_jax.decoding.state import DecodeState, Models, prefill
from d2sd_jax.errors import UsageError
from d2sd_jax.io.models import load_drafter, load_target
from d2sd_jax.kernels.cascade_attention import cascade_attention
from d2sd_jax.models.cache import KVCache
from d2sd_jax.models.drafter import Drafter
from d2sd_jax.models.target import LlamaTarget, Target, TargetOutput
from d2sd_jax.sampling import Sampling
from d2sd_jax.tree import PrefixTree, ancestor_mask, build_prefix_tree
from d2sd_jax.verify import Verdict, longest_accepted_path, target_choices

__all__ = [
  "POLICIES",
  "DecodeState",
  "Drafter",
  "DrafterConfig",
  "KVCache",
  "LlamaTarget",
  "Models",
  "PrefixTree",
  "Sampling",
  "Target",
  "TargetConfig",
  "TargetOutput",
  "TreeConfig",
  "TreePolicy",
  "UsageError",
  "Verdict",
  "ancestor_mask",
  "boundary_posterior",
  "build_prefix_tree",
  "cascade_attention",
  "decode_cycle",
  "generate",
  "load_drafter",
  "load_target",
  "longest_accepted_path",
  "prefill",
  "select_prefixes",
  "stream",
  "target_choices",
  "token_confidence",
]

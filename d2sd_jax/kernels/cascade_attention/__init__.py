"""Attention of groups of nodes over one shared prefix and their own tree."""

from d2sd_jax.kernels.cascade_attention.api import (
  CAUSAL,
  IMPLEMENTATIONS,
  LocalMask,
  cascade_attention,
)
from d2sd_jax.kernels.cascade_attention.heads import Heads

__all__ = [
  "CAUSAL",
  "IMPLEMENTATIONS",
  "Heads",
  "LocalMask",
  "cascade_attention",
]

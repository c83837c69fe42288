"""Attention of groups of nodes over one shared prefix and their own tree."""

from d2sd_jax.kernels.cascade_attention.api import (
  CAUSAL,
  IMPLEMENTATIONS,
  LocalMask,
  cascade_attention,
)

__all__ = ["CAUSAL", "IMPLEMENTATIONS", "LocalMask", "cascade_attention"]

"""Attention of groups of nodes over one shared prefix and their own tree."""

from d2sd_jax.kernels.cascade_attention.api import (
  IMPLEMENTATIONS,
  cascade_attention,
)

__all__ = ["IMPLEMENTATIONS", "cascade_attention"]

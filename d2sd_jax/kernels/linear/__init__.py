"""Matrix products with the norm before them and the gate or sum after them."""

from d2sd_jax.kernels.linear.api import IMPLEMENTATIONS, linear

__all__ = ["IMPLEMENTATIONS", "linear"]

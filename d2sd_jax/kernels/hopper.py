"""Pallas kernels for Hopper, in Mosaic GPU: whether they run, and on what."""

import jax

from d2sd_jax.kernels.device import target_device

# Of an H100 or H200 (SXM): streaming multiprocessors, and what shared memory
# one block can have.
MULTIPROCESSORS = 132
SHARED_MEMORY = 227 * 1024


def runs_here() -> bool:
  """Whether such a kernel can run where this is traced."""
  capability = str(getattr(target_device(), "compute_capability", ""))
  return capability.startswith("9.") and has_kernels()


def has_kernels() -> bool:
  """Whether this JAX has the Pallas Mosaic GPU the kernels are written in."""
  return jax.version.__version_info__ >= (0, 11)

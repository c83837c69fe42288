"""Kernels, one package each: api, reference, and one file per backend."""

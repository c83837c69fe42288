"""What a decode cycle costs, piece by piece: `python -m d2sd_jax.bench`."""

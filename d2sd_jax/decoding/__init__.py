"""Decoding: one state, one cycle, one loop; a mode is a tree policy."""

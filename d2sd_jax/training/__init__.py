"""Distilling drafters from a frozen target (Sec. 3.4)."""

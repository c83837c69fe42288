"""Targets and drafters."""

"""Measuring drafters on real prompts."""

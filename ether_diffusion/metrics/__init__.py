"""Measuring adapters: what they draw, against what they should draw."""

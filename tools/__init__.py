"""Benches of the numbers in docs/speed.md: in a checkout, `python -m tools.NAME`."""

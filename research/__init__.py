"""The paper's claims and the studies behind docs/results.md: in a checkout, `python -m research.NAME`."""

BASE = "tiny_world_2"
"""The embedded base of the studies."""

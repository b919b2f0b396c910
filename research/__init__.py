"""The paper's claims and the studies behind docs/results.md: in a checkout, `python -m research.NAME`."""

BASE = "tiny_world"
"""The embedded base of the studies that name no other."""

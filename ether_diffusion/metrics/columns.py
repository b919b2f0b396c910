"""The names of scores, and what tables call them."""

OBJECT = "object"
"""Likeness to the true picture of the scene, which only Tiny World has: `truth.py`."""
RECOGNISED = "recognised"
PROMPT = "tiny_t"

COLUMNS = {
    "dino": "DINO ↑",
    "clip_i": "CLIP-I ↑",
    OBJECT: "object ↑",
    "tiny_i": "tiny-I ↑",
    "clip_t": "CLIP-T ↑",
    PROMPT: "tiny-T ↑",
    "lpips_to_photos": "LPIPS ↑",
    RECOGNISED: "recognised ↑",
}
"""Those of the paper's table, in its order; tiny are of Tiny World's own encoder."""

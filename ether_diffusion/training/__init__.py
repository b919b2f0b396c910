"""Training: what goes in is found and checked here before a model is loaded."""

from ether_diffusion.training.decoding import decode_photo
from ether_diffusion.training.photos import (
    Photo,
    PhotoChanges,
    PhotoFolder,
    Refusal,
    compare_fingerprints,
    find_photos,
)

__all__ = [
    "Photo",
    "PhotoChanges",
    "PhotoFolder",
    "Refusal",
    "compare_fingerprints",
    "decode_photo",
    "find_photos",
]

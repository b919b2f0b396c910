"""Training: what goes in is found and checked here before a model is loaded."""

from ether_diffusion.training.captions import Caption, Captions, read_captions
from ether_diffusion.training.decoding import decode_photo
from ether_diffusion.training.photos import (
    Photo,
    PhotoChanges,
    PhotoFolder,
    Refusal,
    compare_fingerprints,
    find_photos,
)
from ether_diffusion.training.prompt_tokens import PromptCut, doubt_token, find_cut

__all__ = [
    "Caption",
    "Captions",
    "Photo",
    "PhotoChanges",
    "PhotoFolder",
    "PromptCut",
    "Refusal",
    "compare_fingerprints",
    "decode_photo",
    "doubt_token",
    "find_cut",
    "find_photos",
    "read_captions",
]

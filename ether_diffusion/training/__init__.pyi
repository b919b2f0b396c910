from .captions import Caption, Captions, read_captions
from .decoding import decode_photo
from .photos import (
    Photo,
    PhotoChanges,
    PhotoFolder,
    Refusal,
    compare_fingerprints,
    find_photos,
)
from .prompt_tokens import PromptCut, doubt_token, find_cut

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

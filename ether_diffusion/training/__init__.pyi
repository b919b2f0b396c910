from .captions import PromptCut, doubt_token, find_cut
from .dataset import TrainingData, read_training_data
from .decoding import decode_photo
from .photos import (
    Photo,
    PhotoFolder,
    Refusal,
    compare_fingerprints,
    find_photos,
)

__all__ = [
    "Photo",
    "PhotoFolder",
    "PromptCut",
    "Refusal",
    "TrainingData",
    "compare_fingerprints",
    "decode_photo",
    "doubt_token",
    "find_cut",
    "find_photos",
    "read_training_data",
]

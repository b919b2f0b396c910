"""The hash that names an adapter by its numbers, whatever file they came from."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of an adapter's tensors, by sorted name, as float32; 64 hexadecimal digits.

    Saving an adapter again, with another trigger or base name, does not change it.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()

"""Random numbers of training: each draw is a function of what it is for, so that resuming needs no state."""

import hashlib

import torch


def stream(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """Return a CPU generator that depends on nothing but the arguments: the same in every process and run."""
    name = repr((seed, purpose, indices)).encode()
    value = int.from_bytes(hashlib.sha256(name).digest()[:8], "little", signed=True)
    return torch.Generator().manual_seed(value)

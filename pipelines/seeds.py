"""Seeds of pictures: each has its own, and its own generator, so that it can be made again alone."""

import operator
from collections.abc import Sequence

import torch

Generators = torch.Generator | Sequence[torch.Generator] | None
MAX_SEED = 2**63 - 1


def expand_seeds(seed: int | Sequence[int] | None, num_images: int) -> list[int]:
    """Return a seed per picture: seed, seed + 1, …, or those given; None draws the first from torch's own.

    Raises:
        ValueError: not a seed per picture, or one out of range.
    """
    if seed is None:
        seed = int(torch.randint(2**32, ()))
    if isinstance(seed, Sequence):
        seeds = [operator.index(value) for value in seed]
    else:
        seeds = [operator.index(seed) + index for index in range(num_images)]
    if len(seeds) != num_images:
        raise ValueError(f"found {len(seeds)} seeds for {num_images} pictures; give one per picture, or one")
    wrong = [value for value in seeds if not 0 <= value <= MAX_SEED]
    if wrong:
        raise ValueError(f"a seed is a whole number from 0 to 2^63 - 1; found {wrong[0]}")
    return seeds


def make_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return a generator per picture. On the CPU, whose draws are the same on every machine."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def seeds_of(generator: Generators, num_images: int) -> list[int | None]:
    """Return the seeds that a caller's generators stand for; None where a seed does not say it all."""
    if isinstance(generator, torch.Generator):
        alone = num_images == 1
        return [_fresh_seed(generator) if alone else None] * num_images
    generators = list(generator or [])
    return [_fresh_seed(one) for one in generators] if len(generators) == num_images else [None] * num_images


def _fresh_seed(generator: torch.Generator) -> int | None:
    seed = generator.initial_seed()
    if generator.device.type != "cpu" or not 0 <= seed <= MAX_SEED:
        return None
    is_fresh = torch.equal(torch.Generator("cpu").manual_seed(seed).get_state(), generator.get_state())
    return seed if is_fresh else None

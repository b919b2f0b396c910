"""The concepts that each world's model is trained on: those of the shipped world, and of the next one."""

import json
from pathlib import Path

from ether_diffusion.tiny_world.concepts import Concept, load_concepts

SECOND_CONCEPTS_FILE = Path(__file__).with_name("concepts_2.json")
WORLDS = (1, 2)


def _second_concepts(split: str) -> tuple[Concept, ...]:
    rows = json.loads(SECOND_CONCEPTS_FILE.read_text(encoding="utf-8"))[split]
    return tuple(Concept(**row) for row in rows)


def trained_concepts(world: int) -> tuple[Concept, ...]:
    """The concepts of a world's model: world 2 has those of world 1, then its own.

    Raises:
        ValueError: there is no such world.
    """
    if world not in WORLDS:
        raise ValueError(f"there is no world {world}; use one of {', '.join(map(str, WORLDS))}")
    return load_concepts("trained") + (_second_concepts("trained") if world == 2 else ())


def benchmark_concepts() -> tuple[Concept, ...]:
    """Concepts kept from training beside the held-out ones, for the benchmark alone."""
    return _second_concepts("benchmark")

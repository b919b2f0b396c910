"""The concepts of Tiny World: those its models were trained on, and those kept from them as subjects."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

CONCEPTS_FILE = Path(__file__).with_name("concepts.json")
RENDERS_FOLDER = Path(__file__).with_name("renders")
PLURALS = ("cherries", "grapes", "blueberries", "pancakes", "fries")

WORLDS = (1, 2)
"""The first world is of 64 px, the second of 128 px."""
Split = Literal["trained", "held_out", "trained_2", "benchmark"]


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn.

    name is the word used in captions ("cat"), kind its hypernym ("animal"), emoji_name its Unicode name, and
    render the stem of its WebP file (the code points in hexadecimal).
    """

    name: str
    kind: str
    emoji_name: str
    render: str

    @property
    def phrase(self) -> str:
        """The name with its article: "a cat", "an apple", "cherries"."""
        return with_article(self.name)


def with_article(noun: str) -> str:
    """Put "a" or "an" before a singular noun; plural names of the world stay bare."""
    if noun.split()[-1] in PLURALS:
        return noun
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith("uni") else f"a {noun}"


def load_concepts(split: Split) -> tuple[Concept, ...]:
    """Read the concepts of one split, in the order that gives each its class index."""
    rows = json.loads(CONCEPTS_FILE.read_text(encoding="utf-8"))[split]
    return tuple(Concept(**row) for row in rows)


def trained_concepts(world: int) -> tuple[Concept, ...]:
    """Return what a world's model knows: that of the second knows the first one's concepts, then its own.

    Raises:
        ValueError: there is no such world.
    """
    if world not in WORLDS:
        raise ValueError(f"there is no world {world}; use one of {', '.join(map(str, WORLDS))}")
    return load_concepts("trained") + (load_concepts("trained_2") if world == 2 else ())


def subject_concepts() -> tuple[Concept, ...]:
    """Return what no model was trained on: held out, and kept for the benchmark alone."""
    return load_concepts("held_out") + load_concepts("benchmark")


def all_concepts() -> tuple[Concept, ...]:
    """The first world's concepts, the trained ones before the held-out ones: the classes of the judge."""
    return load_concepts("trained") + load_concepts("held_out")


def find_concept(name: str) -> Concept:
    """Find a concept of any split by its name."""
    concepts = {concept.name: concept for concept in trained_concepts(2) + subject_concepts()}
    if name not in concepts:
        subjects = ", ".join(concept.name for concept in subject_concepts())
        raise ValueError(f"no concept is named {name!r}; the subjects of Tiny World are {subjects}")
    return concepts[name]


def shipped_concepts() -> tuple[Concept, ...]:
    """Return the concepts whose renders are shipped: those of no training, and some that were trained."""
    every = all_concepts() + load_concepts("benchmark")
    return tuple(each for each in every if (RENDERS_FOLDER / f"{each.render}.webp").is_file())


@lru_cache(maxsize=256)
def read_render(render: str, renders_folder: Path = RENDERS_FOLDER) -> "Image":
    """Read one render as RGBA, cropped to its opaque box."""
    path = renders_folder / f"{render}.webp"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; the package carries only the renders of its demos; others come from "
            "python -m recipes.tiny_world --stage data"
        )
    from PIL import Image  # here, as commands read the names of concepts for their help

    with Image.open(path) as picture:
        rgba = picture.convert("RGBA")
    return rgba.crop(rgba.getchannel("A").point(lambda alpha: 255 if alpha > 16 else 0).getbbox())

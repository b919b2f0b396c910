"""The concepts of Tiny World: those its model was trained on, and those kept from it as future subjects."""

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

Split = Literal["trained", "held_out"]


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


def all_concepts() -> tuple[Concept, ...]:
    """The trained concepts followed by the held-out ones: the classes of the judge."""
    return load_concepts("trained") + load_concepts("held_out")


def find_concept(name: str) -> Concept:
    """Find a concept of either split by its name."""
    concepts = {concept.name: concept for concept in all_concepts()}
    if name not in concepts:
        raise ValueError(f"no concept is named {name!r}; Tiny World has {', '.join(concepts)}")
    return concepts[name]


def shipped_concepts() -> tuple[Concept, ...]:
    """Return the concepts whose renders are shipped: the held-out ones, and some that were trained."""
    return tuple(each for each in all_concepts() if (RENDERS_FOLDER / f"{each.render}.webp").is_file())


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

"""Which concept a picture shows: that of the nearest true picture of its scene, in a network's features."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.tiny_world.concepts import RENDERS_FOLDER, Concept, shipped_concepts
from ether_diffusion.tiny_world.networks import load_tiny_clip
from ether_diffusion.tiny_world.pictures import draw_scenes
from ether_diffusion.tiny_world.world import Scene

Features = Callable[[torch.Tensor], torch.Tensor]
"""From images (b, 3, 64, 64) in [-1, 1] to unit features (b, d)."""

OBJECT, RECOGNISED = "object", "recognised"
"""The scores against the true picture of a scene, which only a world that can be drawn has."""

MARGIN = 6
"""One pixel in so many is cut off on each side. What is left is the object in the middle, and little of the
background, which else decides likeness."""


def object_crops(images: torch.Tensor) -> torch.Tensor:
    """Return the middles of images (b, 3, h, h), enlarged to the size they came from."""
    size = images.shape[-1]
    margin = size // MARGIN
    middle = images[..., margin : size - margin, margin : size - margin]
    return F.interpolate(middle, size=size, mode="bicubic", align_corners=False)


def recognise(
    features: Features,
    pictures: torch.Tensor,
    scenes: Sequence[Scene],
    concepts: Sequence[Concept],
    *,
    cropped: bool = True,
    renders_folder: Path = RENDERS_FOLDER,
) -> list[Concept]:
    """Name the concept of each picture (b, 3, h, h): the likeliest of `concepts` drawn into the same scene.

    Background, size and place are the scene's in all of them, so that only the object decides. `cropped`
    compares the middles, for scenes with their objects there.
    """
    view = object_crops if cropped else _whole
    found = []
    for picture, scene in zip(pictures, scenes, strict=True):
        candidates = [replace(scene, concept=concept) for concept in concepts]
        true_pictures = draw_scenes(candidates, renders_folder=renders_folder)
        likeness = features(view(true_pictures)) @ features(view(picture[None]))[0]
        found.append(concepts[int(likeness.argmax())])
    return found


def _whole(images: torch.Tensor) -> torch.Tensor:
    return images


def score_against_truth(
    pictures: torch.Tensor, scenes: Sequence[Scene], usable: Sequence[int] | None = None
) -> dict[str, float]:
    """Score pictures (b, 3, 64, 64) in [-1, 1] of scenes with their objects in the middle.

    `object` is the mean cosine of a picture's middle with that of its scene's true picture, in the features
    of Tiny World's image tower, over the pictures at `usable` (all). `recognised` is the share of all
    pictures whose object is likest to the scene's own among all shipped concepts'.

    Unlike likeness to the photos it is not higher where a photo is shown whatever is asked, and the best that
    can be reached is known: 1.
    """
    clip = load_tiny_clip(tiny_world_path())
    chosen = list(range(len(scenes)) if usable is None else usable)
    drawn, true = (
        F.normalize(clip.embed_images(object_crops(each)).double(), dim=-1)
        for each in (pictures[chosen], draw_scenes([scenes[number] for number in chosen]))
    )
    named = recognise(clip.embed_images, pictures, scenes, shipped_concepts())
    hits = [name == scene.concept for name, scene in zip(named, scenes, strict=True)]
    return {OBJECT: float((drawn * true).sum(dim=1).mean()), RECOGNISED: sum(hits) / len(hits)}

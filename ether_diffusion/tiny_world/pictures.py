"""Pictures as tensors: from PIL, from scenes and from a pipeline; and which concept they show."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.tiny_world.concepts import RENDERS_FOLDER, Concept, shipped_concepts
from ether_diffusion.tiny_world.networks import Features, TinyClip, load_tiny_clip
from ether_diffusion.tiny_world.world import NATIVE_SIZE, Scene, draw

MARGIN = 6
"""One pixel in so many is cut off on each side. What is left is the object in the middle, and little of the
background, which else decides likeness."""


def object_crops(images: torch.Tensor) -> torch.Tensor:
    """Return the middles of images (b, 3, h, h), enlarged to the size they came from."""
    size, margin = images.shape[-1], images.shape[-1] // MARGIN
    middle = images[..., margin : size - margin, margin : size - margin]
    return F.interpolate(middle, size=size, mode="bicubic", align_corners=False)


def to_tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Turn RGB pictures of one size into a tensor (b, 3, height, width) in [-1, 1]."""
    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def at_native_size(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Turn pictures of any sizes into a tensor (b, 3, NATIVE_SIZE, NATIVE_SIZE) in [-1, 1]."""
    native, smooth = (NATIVE_SIZE, NATIVE_SIZE), Image.Resampling.LANCZOS
    rgb = (each.convert("RGB") for each in pictures)
    return to_tensor([each if each.size == native else each.resize(native, smooth) for each in rgb])


def to_images(pictures: torch.Tensor) -> list[Image.Image]:
    """Turn pictures (b, 3, h, w) in [-1, 1] into RGB images."""
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(each.numpy()) for each in pixels]


def draw_scenes(
    scenes: Sequence[Scene], *, size: int = NATIVE_SIZE, renders_folder: Path = RENDERS_FOLDER
) -> torch.Tensor:
    """Draw scenes as they really are: (b, 3, size, size) in [-1, 1]."""
    return to_tensor([draw(scene, size=size, renders_folder=renders_folder) for scene in scenes])


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    num_steps: int = 20,
    guidance_scale: float = 3.0,
    seed: int = 0,
    batch_size: int = 16,
) -> tuple[torch.Tensor, float]:
    """Generate one picture for each prompt with a pipeline of diffusers, picture k from seed + k.

    Returns images (b, 3, height, width) in [-1, 1] and seconds per picture.
    """
    pipeline.set_progress_bar_config(disable=True)
    pieces, started = [], time.perf_counter()
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        output = pipeline(
            part,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed + start + index) for index in range(len(part))],
            output_type="np",
        )
        pieces.append(torch.from_numpy(output.images).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(pieces), (time.perf_counter() - started) / len(prompts)


OBJECT, OUTSIDE, RECOGNISED = "object", "outside", "recognised"
"""The scores against the true picture of a scene, which only a world that can be drawn has."""


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

    found = []
    for picture, scene in zip(pictures, scenes, strict=True):
        true = _views_in(features, scene, tuple(concepts), picture.shape[-1], cropped, renders_folder)
        own = picture[None]
        found.append(concepts[int((true @ features(object_crops(own) if cropped else own)[0]).argmax())])
    return found


@lru_cache(maxsize=256)
def _views_in(
    features: Features,
    scene: Scene,
    concepts: tuple[Concept, ...],
    size: int,
    cropped: bool,
    renders_folder: Path,
) -> torch.Tensor:
    """Return the features (n, d) of concepts drawn into a scene: a benchmark asks often for the same."""
    drawn = [replace(scene, concept=each) for each in concepts]
    pictures = draw_scenes(drawn, size=size, renders_folder=renders_folder)
    return features(object_crops(pictures) if cropped else pictures)


@cache
def _load_judge() -> TinyClip:
    return load_tiny_clip(tiny_world_path())


def score_against_truth(
    pictures: torch.Tensor,
    scenes: Sequence[Scene],
    usable: Sequence[int] | None = None,
    *,
    outside: Features | None = None,
) -> dict[str, float]:
    """Score pictures (b, 3, h, h) in [-1, 1] of scenes with their objects in the middle.

    `object` is the mean cosine of a picture's middle with that of its scene's true picture, in the features
    of Tiny World's image tower, over the pictures at `usable` (all). `recognised` is the share of all
    pictures whose object is likest to the scene's own among all shipped concepts'. Unlike likeness to the
    photos it is not higher where a photo is shown whatever is asked, and the best that can be reached is 1.
    `outside` is as `object`, in features that no training and no choice has seen, where they are given.
    """
    clip = _load_judge()
    chosen = list(range(len(scenes)) if usable is None else usable)
    true = draw_scenes([scenes[number] for number in chosen], size=pictures.shape[-1])
    shown = [object_crops(each) for each in (pictures[chosen], true)]
    found = {}
    for name, features in ((OBJECT, clip.embed_images), (OUTSIDE, outside)):
        if features is not None:
            ours, truth = (F.normalize(features(each).double(), dim=-1) for each in shown)
            found[name] = float((ours * truth).sum(dim=1).mean())
    named = recognise(clip.embed_images, pictures, scenes, shipped_concepts())
    hits = [name == scene.concept for name, scene in zip(named, scenes, strict=True)]
    return {**found, RECOGNISED: sum(hits) / len(hits)}

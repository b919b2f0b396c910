"""Pictures against the true pictures of their scenes, which only a world that can be drawn has."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ether_diffusion.metrics.columns import OBJECT, RECOGNISED
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.tiny_world.clip import load_tiny_clip
from ether_diffusion.tiny_world.pictures import draw_scenes
from ether_diffusion.tiny_world.recognition import object_crops, recognise, shipped_concepts
from ether_diffusion.tiny_world.world import Scene


def score_against_truth(
    pictures: Tensor, scenes: Sequence[Scene], usable: Sequence[int] | None = None
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

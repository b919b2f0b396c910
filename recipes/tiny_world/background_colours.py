"""Does a picture have the background that was asked for? Its border says so."""

from collections.abc import Sequence

import torch

from ether_diffusion.tiny_world.networks import Segmenter, at_side
from ether_diffusion.tiny_world.world import BACKGROUND_CLASSES, CLASSES, COLOURS, Scene


def background_colours(images: torch.Tensor) -> list[str]:
    """Name the colour nearest in RGB to the median of each picture's four corners of 6 x 6 px."""
    corners = torch.cat(
        [images[:, :, rows, columns].flatten(2) for rows in (slice(0, 6), slice(-6, None)) for columns in
         (slice(0, 6), slice(-6, None))], dim=2
    )  # fmt: skip
    medians = (corners.float().median(dim=2).values + 1) * 127.5  # (b, 3)
    names = list(COLOURS)
    palette = torch.tensor([COLOURS[name] for name in names], dtype=torch.float32)
    nearest = (medians[:, None] - palette[None]).square().sum(-1).argmin(1)
    return [names[int(index)] for index in nearest]


def background_accuracy(images: torch.Tensor, scenes: Sequence[Scene]) -> float:
    """Share of the scenes with a plain background whose picture has its colour at the border."""
    colours = background_colours(images)
    hits = [
        colour == scene.background.name
        for colour, scene in zip(colours, scenes, strict=True)
        if scene.background.kind == "plain"
    ]
    return sum(hits) / len(hits) if hits else float("nan")


def scenery_accuracy(segmenter: Segmenter, images: torch.Tensor, scenes: Sequence[Scene]) -> float:
    """Share of the scenes with a scenery whose picture has it: the commonest class of background within.

    Images (b, 3, h, h) are seen at 64 px. Objects are left out, so that a big one hides nothing.
    """
    first = CLASSES.index(BACKGROUND_CLASSES[0])
    hits = []
    for classes, scene in zip(segmenter.segment(at_side(images)), scenes, strict=True):
        if scene.background.kind == "scene":
            counts = torch.bincount(classes.flatten(), minlength=len(CLASSES))[first:]
            hits.append(BACKGROUND_CLASSES[int(counts.argmax())] == scene.background.name)
    return sum(hits) / len(hits) if hits else float("nan")

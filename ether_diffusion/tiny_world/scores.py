"""Scores of Tiny World's pictures: concepts by the judge, background colours by pixels."""

from collections.abc import Sequence

import torch

from ether_diffusion.tiny_world.backgrounds import COLOURS
from ether_diffusion.tiny_world.clip import TinyClip
from ether_diffusion.tiny_world.concepts import load_concepts
from ether_diffusion.tiny_world.judge import Judge
from ether_diffusion.tiny_world.world import Scene


@torch.no_grad()
def rank_concepts(judge: Judge, images: torch.Tensor, *, num_concepts: int | None = None) -> torch.Tensor:
    """Return class indices (b, num_concepts), likeliest first, for images (b, 3, 64, 64) in [-1, 1].

    num_concepts keeps only the judge's first classes: the trained ones come before the held-out ones.
    """
    logits = torch.cat([judge(images[start : start + 64].float()) for start in range(0, len(images), 64)])
    ranked: torch.Tensor = logits[:, :num_concepts].argsort(dim=1, descending=True)
    return ranked


def rank_captions(clip: TinyClip, images: torch.Tensor, scenes: Sequence[Scene]) -> torch.Tensor:
    """Rank the trained concepts (b, num_concepts) by the likeness of pictures and captions with them."""
    rows = []
    for embedding, scene in zip(clip.embed_images(images), scenes, strict=True):
        captions = [scene.caption(concept.name) for concept in load_concepts("trained")]
        rows.append(clip.embed_texts(captions) @ embedding)
    return torch.stack(rows).argsort(dim=1, descending=True)


def caption_likeness(clip: TinyClip, images: torch.Tensor, scenes: Sequence[Scene]) -> float:
    """Mean cosine of pictures and their captions (CLIP-T, by Tiny World's own CLIP)."""
    captions = clip.embed_texts([scene.caption() for scene in scenes])
    return float((clip.embed_images(images) * captions).sum(1).mean())


def top_accuracy(ranked: torch.Tensor, labels: torch.Tensor, count: int) -> float:
    """Share of pictures whose label (b) is among the first count of its ranking (b, num_concepts)."""
    return float((ranked[:, :count] == labels[:, None]).any(1).float().mean())


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

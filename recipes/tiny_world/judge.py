"""The judge of Tiny World's pictures, a small network of its own, and the ranks that it and CLIP give."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from ether_diffusion.tiny_world.concepts import all_concepts, load_concepts
from ether_diffusion.tiny_world.networks import TinyClip, at_side
from ether_diffusion.tiny_world.world import Scene

JUDGE_FILE = "judge.safetensors"


def _block(channels_in: int, channels_out: int, stride: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
        torch.nn.BatchNorm2d(channels_out),
        torch.nn.ReLU(),
    )


class Judge(torch.nn.Module):
    """Class k is all_concepts()[k]: convolutions, mean and maximum over places, one linear layer."""

    def __init__(self, num_concepts: int) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            _block(3, 24, 2), _block(24, 48, 2), _block(48, 64, 1), _block(64, 128, 2), _block(128, 192, 2)
        )
        self.head = torch.nn.Linear(2 * 192, num_concepts)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return features (b, 384) of images (b, 3, 64, 64) in [-1, 1]."""
        features = self.features(images)
        return torch.cat((features.mean((2, 3)), features.amax((2, 3))), dim=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (b, num_concepts) of images (b, 3, 64, 64) in [-1, 1]."""
        logits: torch.Tensor = self.head(self.embed(images))
        return logits


def load_judge(folder: Path) -> Judge:
    """Load the judge that the training stage of the same name left in a folder.

    Raises:
        FileNotFoundError: the folder has no judge.
    """
    path = folder / JUDGE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; train it: python -m recipes.tiny_world --stage judge")
    judge = Judge(len(all_concepts()))
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return judge.eval()


@torch.no_grad()
def rank_concepts(judge: Judge, images: torch.Tensor, *, num_concepts: int | None = None) -> torch.Tensor:
    """Return class indices (b, num_concepts), likeliest first, for images (b, 3, h, h) in [-1, 1].

    num_concepts keeps only the judge's first classes: the trained ones come before the held-out ones.
    """
    logits = torch.cat([judge(at_side(part.float())) for part in torch.split(images, 64)])
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

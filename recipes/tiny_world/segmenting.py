"""The segmenter stage: the class of each pixel, of drawn and of decoded pictures, shifted and recoloured."""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F

from ether_diffusion.tiny_world.networks import Segmenter
from recipes.tiny_world.loop import Batch
from recipes.tiny_world.segments import Segments

logger = logging.getLogger(__name__)

MAX_SHIFT = 6
COLOUR_JITTER = 0.06
PIXEL_NOISE = 0.05


class SegmenterObjective(torch.nn.Module):
    """Cross-entropy of each pixel."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Loss for images (b, 3, 64, 64) in [-1, 1] and classes (b, 64, 64)."""
        return F.cross_entropy(self.segmenter(images).float(), classes)


class SegmenterStage:
    """The segmenter in training, on all concepts: it is no part of the model that it judges."""

    name = "segmenter"
    batch_size = 32
    learning_rate = 2e-3
    average_decay = 0.99

    def __init__(self, segments: Segments) -> None:
        self.segments = segments
        self.segmenter = Segmenter()
        self.model = SegmenterObjective(self.segmenter)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, object]]:
        """One group."""
        return [{"params": list(self.model.parameters()), "lr": learning_rate}]

    def make_batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw pictures, a third as drawn; shifted and mirrored with their classes, then recoloured."""
        indices = torch.randint(len(self.segments.classes), (batch_size,), generator=generator)
        as_drawn = torch.rand((batch_size, 1, 1, 1), generator=generator) < 1 / 3
        pixels = torch.where(as_drawn, self.segments.drawn[indices], self.segments.decoded[indices])
        images = pixels.float() / 127.5 - 1
        both = torch.cat((images, self.segments.classes[indices].float()[:, None]), 1)  # (b, 4, 64, 64)
        both = F.pad(both, (MAX_SHIFT,) * 4, mode="replicate")
        top, left, mirrored = torch.randint(0, 2 * MAX_SHIFT + 1, (3,), generator=generator).tolist()
        both = both[..., top : top + 64, left : left + 64]
        if mirrored % 2:
            both = both.flip(-1)
        return {"images": _recolour(both[:, :3], generator), "classes": both[:, 3].long()}

    @torch.no_grad()
    def write_sheet(self, path: Path, device: torch.device) -> None:
        """Draw nothing; log the accuracy on training pictures (new ones are scored by the tests)."""
        count = len(self.segments.classes)
        indices = torch.randint(count, (min(count, 512),), generator=torch.Generator().manual_seed(1))
        for name, pixels in (("drawn", self.segments.drawn), ("decoded", self.segments.decoded)):
            images = (pixels[indices].float() / 127.5 - 1).to(device)
            right = self.segmenter.segment(images).cpu() == self.segments.classes[indices]
            logger.info("segmenter right on %.4f of the pixels as %s", right.float().mean().item(), name)


def _recolour(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Change contrast and each channel's level a little, soften half of the pictures, add noise."""
    count = len(images)
    contrast = 1 + COLOUR_JITTER * torch.randn((count, 1, 1, 1), generator=generator)
    level = COLOUR_JITTER * torch.randn((count, 3, 1, 1), generator=generator)
    softened = F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, 1)
    softness = (2 * torch.rand((count, 1, 1, 1), generator=generator) - 1).clamp(min=0)
    noise = PIXEL_NOISE * torch.rand((count, 1, 1, 1), generator=generator)
    changed = torch.lerp(images, softened, softness) * contrast + level
    return changed + noise * torch.randn(images.shape, generator=generator)

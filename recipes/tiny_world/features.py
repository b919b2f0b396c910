"""The features stage: a small network that names emoji in pictures, for its features' sake."""

import logging
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from recipes.tiny_world.fresh_pictures import FreshPictures
from recipes.tiny_world.loop import Batch

logger = logging.getLogger(__name__)

SIZE = 128
WIDTHS = (16, 32, 64, 96, 128)


class FeatureNet(torch.nn.Module):
    """Five levels of convolutions, the first at the picture's own size, each later one at half of it."""

    def __init__(self, num_concepts: int) -> None:
        super().__init__()
        self.levels = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Conv2d(width_in, width, 3, 1 if index == 0 else 2, 1, bias=False),
                torch.nn.BatchNorm2d(width),
                torch.nn.ReLU(),
                *((torch.nn.Conv2d(width, width, 3, 1, 1), torch.nn.ReLU()) if index > 1 else ()),
            )
            for index, (width_in, width) in enumerate(pairwise((3, *WIDTHS)))
        )
        self.head = torch.nn.Linear(WIDTHS[-1], num_concepts)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return each level's features of images (b, 3, 128, 128) in [-1, 1]."""
        found = []
        for level in self.levels:
            images = level(images)
            found.append(images)
        return found

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy for images (b, 3, 128, 128) in [-1, 1] and class indices (b)."""
        logits = self.head(self.features(images)[-1].amax((2, 3)))
        return F.cross_entropy(logits.float(), labels)


def feature_distance(net: FeatureNet, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean over the levels of the squared distance of unit features, as in LPIPS (arXiv:1801.03924)."""
    with torch.no_grad():
        wanted = net.features(theirs)
    distances = [
        (F.normalize(mine.float(), dim=1) - F.normalize(true.float(), dim=1)).square().sum(1).mean()
        for mine, true in zip(net.features(ours), wanted, strict=True)
    ]
    return torch.stack(distances).mean()


class FeaturesStage:
    """The network in training, on pictures of everything but what is kept out of training."""

    name = "features"
    batch_size = 32
    learning_rate = 2e-3
    average_decay = 0.99

    def __init__(self, pictures: FreshPictures) -> None:
        self.pictures = pictures
        self.model = FeatureNet(len(pictures.known) + len(pictures.others))

    def parameter_groups(self, learning_rate: float) -> list[dict[str, object]]:
        """One group."""
        return [{"params": list(self.model.parameters()), "lr": learning_rate}]

    def make_batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw new pictures, with a little noise."""
        images, labels = self.pictures.draw(batch_size, SIZE, generator)
        return {"images": images + 0.05 * torch.randn(images.shape, generator=generator), "labels": labels}

    @torch.no_grad()
    def write_sheet(self, path: Path, device: torch.device) -> None:
        """Draw nothing; log the loss on new pictures."""
        images, labels = self.pictures.draw(128, SIZE, torch.Generator().manual_seed(1))
        logits = self.model.head(self.model.features(images.to(device))[-1].amax((2, 3)))
        right = (logits.argmax(1).cpu() == labels).float().mean().item()
        logger.info("concept right on %.3f of 128 new pictures", right)

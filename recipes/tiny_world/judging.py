"""The judge stage: a concept classifier trained on composites, shifted and mixed with noise."""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F

from ether_diffusion.tiny_world.concepts import all_concepts
from recipes.tiny_world.data import Composites
from recipes.tiny_world.judge import Judge
from recipes.tiny_world.loop import Batch

logger = logging.getLogger(__name__)

MAX_SHIFT = 4
MAX_BLUR = 0.5


class JudgeObjective(torch.nn.Module):
    """Cross-entropy with label smoothing."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss for images (b, 3, 64, 64) in [-1, 1] and class indices (b)."""
        return F.cross_entropy(self.judge(images).float(), labels, label_smoothing=0.05)


class JudgeStage:
    """The judge in training, on trained and held-out concepts: it is no part of the model that it judges."""

    name = "judge"
    batch_size = 64
    learning_rate = 2e-3
    average_decay = 0.99

    def __init__(self, composites: Composites) -> None:
        self.composites = composites
        self.judge = Judge(len(all_concepts()))
        self.model = JudgeObjective(self.judge)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, object]]:
        """One group."""
        return [{"params": list(self.model.parameters()), "lr": learning_rate}]

    def make_batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw composites, shifted a few px and half of them blurred, as generated pictures are softer."""
        indices = torch.randint(len(self.composites.labels), (batch_size,), generator=generator)
        images = F.pad(self.composites.images(indices), (MAX_SHIFT,) * 4, mode="replicate")
        top, left = torch.randint(0, 2 * MAX_SHIFT + 1, (2,), generator=generator).tolist()
        images = images[..., top : top + 64, left : left + 64]
        softened = F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, 1)
        blur = torch.rand((batch_size, 1, 1, 1), generator=generator)
        images = torch.lerp(images, softened, (blur - 1 + MAX_BLUR).clamp(min=0) / MAX_BLUR)
        noise = torch.randn(images.shape, generator=generator)
        return {"images": images + 0.05 * noise, "labels": self.composites.labels[indices]}

    @torch.no_grad()
    def write_sheet(self, path: Path, device: torch.device) -> None:
        """Draw nothing; log the accuracy on training composites (new ones are scored by the evaluation)."""
        indices = torch.randint(
            len(self.composites.labels), (1024,), generator=torch.Generator().manual_seed(1)
        )
        predicted = self.model.judge(self.composites.images(indices).to(device)).argmax(1).cpu()
        logger.info(
            "judge right on %.3f", (predicted == self.composites.labels[indices]).float().mean().item()
        )

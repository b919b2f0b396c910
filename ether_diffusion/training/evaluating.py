"""What training needs of an evaluation: prompts to draw, and scores of what was drawn.

The measuring is handed in by who trains.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from PIL import Image

from ether_diffusion.bases import Base
from ether_diffusion.strict_json import Json
from ether_diffusion.training.best import Curve, Measured
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.dataset import TrainingData

Rows = Sequence[Sequence[Image.Image]]
"""Pictures by prompt and seed."""


class Evaluator(Protocol):
    """Measures pictures of prompts with the subject and of others without it."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts that name the subject."""

    @property
    def other_prompts(self) -> tuple[str, ...]:
        """Prompts that do not."""

    def facts(self) -> dict[str, Json]:
        """Return what scores depend on besides the pictures, free of names of this machine's folders."""

    def load(self, device: torch.device) -> None:
        """Load what measures.

        Raises:
            ValueError: it is incomplete, or cannot do it.
        """

    def measure(self, subject: Rows, other: Rows, base_other: Rows) -> Measured:
        """Score an adapter's pictures; base_other are the base's of the same prompts and seeds as other."""

    def draw(self, curve: Curve) -> bytes | None:
        """Return a PNG of the scores against steps; None where nothing here can draw it."""


OpenEvaluator = Callable[[DreamBoothConfig, Base, TrainingData], Evaluator]
"""Returns the evaluator of a run; raises ValueError or FileNotFoundError for what cannot be measured with."""

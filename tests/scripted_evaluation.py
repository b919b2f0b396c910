"""An evaluator that measures nothing: fidelity is, evaluation after evaluation, what it was told."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.curve import Scores
from ether_diffusion.training.run import train_dreambooth

RISING = (0.1, 0.2, 0.5, 0.4, 0.5, 0.3, 0.3, 0.3, 0.3)
"""Of the base and eight steps: the second is the best, and two evaluations later nothing rose."""


class Scripted:
    """Draws one picture with the subject and one without, and looks at neither."""

    prompts, other_prompts = ("a sks cat",), ("a cat",)

    def __init__(self, fidelity: Sequence[float]) -> None:
        self.fidelity = list(fidelity)

    def facts(self) -> dict[str, Json]:
        return {}

    def load(self, device: torch.device, loaded: object) -> None:
        pass

    def measure(self, subject: object, other: object, base_other: object) -> Scores:
        value = self.fidelity.pop(0)
        return {"fidelity": (value, value + 0.01), "prompt": (0.5, 0.5), "drift": (0.0, 0.0)}


@contextmanager
def scripted(*fidelity: float) -> Iterator[None]:
    """Put such an evaluator in the place of each run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ether_diffusion.training.setup.open_evaluator", lambda *arguments: Scripted(fidelity))
        patch.setattr("ether_diffusion.training.evaluation.draw_curve", lambda curve: b"")
        yield


def train_scripted(config: DreamBoothConfig, *fidelity: float) -> int:
    """Train with such an evaluator."""
    with scripted(*fidelity):
        return train_dreambooth(config)

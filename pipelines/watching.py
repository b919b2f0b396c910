"""Looking on while a picture is drawn: after each step, without changing anything."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

OnStep = Callable[[int, int, Tensor], None]
"""Hears how many of how many steps of a picture are done, and its latents (b, c, h, w); it may raise."""


class StepWatcher:
    """A `callback_on_step_end` of diffusers' that changes nothing, so that pictures do not name it."""

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step

    def __call__(
        self, pipeline: Any, step: int, timestep: object, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Tell of a step; the pipeline goes on with its own tensors."""
        self._on_step(step + 1, pipeline.num_timesteps, tensors["latents"])
        return {}

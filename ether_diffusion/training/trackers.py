"""accelerate's trackers: TensorBoard, W&B, trackio and Comet, beside the run's own log."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from accelerate import Accelerator
from accelerate.utils import (
    is_comet_ml_available,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)
from PIL import Image

from ether_diffusion.training.config import DreamBoothConfig

AVAILABLE = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "trackio": is_trackio_available,
    "comet_ml": is_comet_ml_available,
}


def tracker_problem(name: str | None) -> str | None:
    """Say that a tracker's package is missing, which accelerate passes over in silence."""
    if name == "all" and not any(is_available() for is_available in AVAILABLE.values()):
        return f"report_to=all finds none of {', '.join(AVAILABLE)}; pip install one, or leave it out"
    if name in AVAILABLE and not AVAILABLE[name]():
        return f"report_to={name} needs the package {name}; pip install {name}, or leave it out"
    return None


@contextmanager
def tracked(accelerator: Accelerator, config: DreamBoothConfig) -> Iterator[None]:
    """Open the trackers with the run's settings, and close them after."""
    if config.output.report_to is not None:
        settings = {name: _simple(value) for name, value in config.flat().items()}
        accelerator.init_trackers(config.output.tracker_project_name, config=settings)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # end_training would also part the processes
            tracker.finish()
        accelerator.trackers = []


def track(accelerator: Accelerator, values: Mapping[str, float], step: int) -> None:
    """Give numbers to every tracker."""
    if accelerator.trackers:
        accelerator.log(dict(values), step=step)


def track_images(accelerator: Accelerator, rows: Sequence[Sequence[Image.Image]], step: int) -> None:
    """Give images to every tracker that takes them."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            arrays = np.stack([np.asarray(image) for row in rows for image in row])
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": arrays}, step=step, **options)


def _simple(value: object) -> object:
    return value if isinstance(value, bool | int | float | str) else str(value)

"""Detectors: from a photo to the control image that says where things are in it, by name."""

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image

from ether_diffusion.control.canny import canny
from ether_diffusion.control.detector_names import CANNY_THRESHOLDS, MODEL_DETECTORS, detector_problem
from ether_diffusion.control.images import check_shape, resampling_of
from ether_diffusion.wording import printable

_HALF = 128
"""Of an alpha channel, from which on a pixel is inside: the object covers at least half of it."""


@dataclass(frozen=True)
class Detector:
    """A detector by its name; the thresholds are those of canny.

    Raises:
        ValueError: there is none of this name, or what it needs is not installed.
    """

    name: str
    low_threshold: float = CANNY_THRESHOLDS[0]
    high_threshold: float = CANNY_THRESHOLDS[1]

    def __post_init__(self) -> None:
        problem = detector_problem(self.name) or (
            self.is_model and not _has_models() and _no_models(self.name)
        )
        if problem:
            raise ValueError(problem)

    @property
    def is_model(self) -> bool:
        """Whether a network looks at the photo."""
        return self.name in MODEL_DETECTORS

    @property
    def needs_alpha(self) -> bool:
        """Whether it can do nothing with a photo that is opaque everywhere."""
        return self.name == "silhouette"

    def draw(self, photo: Image.Image, alpha: Image.Image | None) -> Image.Image:
        """Return the control image (mode RGB) of a photo of the same size.

        The photo is of mode RGB; `alpha` is its alpha channel (mode L), None where it is opaque.

        Raises:
            ValueError: the photo has no alpha channel and the detector needs one, or its model cannot be had.
        """
        if self.name == "palette":
            return photo
        if self.name == "canny":
            edges = canny(np.asarray(photo), self.low_threshold, self.high_threshold)
            return Image.fromarray(edges).convert("RGB")
        if self.name == "silhouette":
            if alpha is None:
                raise ValueError("it has no transparent parts to take a silhouette from; cut the subject out")
            return alpha.point([0] * _HALF + [255] * (256 - _HALF)).convert("RGB")
        found: Image.Image = self._model(photo)
        return found.convert("RGB").resize(photo.size, Image.Resampling.BILINEAR)

    def draw_at(
        self, photo: Image.Image, alpha: Image.Image | None, *, width: int, height: int
    ) -> Image.Image:
        """Return the control image of a photo at the size (px) of the picture that is to follow it.

        The photo is brought to that size first, as in training, so that lines are as thin as there.

        Raises:
            ValueError: the photo has other proportions, or as `draw`.
        """
        check_shape(photo, width=width, height=height)
        resampling = resampling_of("palette") if self.name == "palette" else Image.Resampling.LANCZOS
        resized = photo.resize((width, height), resampling)
        return self.draw(resized, None if alpha is None else alpha.resize((width, height), resampling))

    @cached_property
    def _model(self) -> Any:
        try:
            return import_module("controlnet_aux.processor").Processor(self.name)
        except ImportError as error:
            raise ValueError(f"{_no_models(self.name)} ({printable(error)})") from None
        except OSError as error:
            raise ValueError(
                f"the model of the detector {self.name} cannot be had ({printable(error, 300)}); connect "
                "to the hub once, or draw control images beforehand and give conditioning_data_dir"
            ) from None


def _has_models() -> bool:
    return find_spec("controlnet_aux") is not None


def _no_models(name: str) -> str:
    return f"the detector {name} needs controlnet-aux; pip install 'ether-diffusion[controlnet-aux]'"

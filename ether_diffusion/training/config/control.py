"""What an image that says where adds to a run: where it comes from, its encoder, how often it is left out."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.control.detector_names import CANNY_THRESHOLDS, detector_problem
from ether_diffusion.options import option, shown
from ether_diffusion.training.config.section import Section

MAX_ENCODER_RATE = 1e-4
"""ETHER, Bini et al. 2024, arXiv:2405.20271, appendix C.2: the encoder learns at 1e-4 at most."""


@dataclass(frozen=True)
class ControlConfig(Section):
    """Control images and their encoder."""

    conditioning_data_dir: Path | None = option(
        None, "Folder of control images with the photos' names: what says where."
    )
    conditioning_image_column: str = option(
        "conditioning_image", "Or the column of the dataset that holds them."
    )
    detector: str | None = option(
        None,
        "Or what draws them from the photos: canny, silhouette (of the alpha channel), or a model of "
        "controlnet-aux, e.g. depth_midas; palette: the images given are segmentation maps.",
    )
    canny_low_threshold: float = option(
        CANNY_THRESHOLDS[0], "Gradient from which on canny continues an edge, as in OpenCV.", least=0.0
    )
    canny_high_threshold: float = option(
        CANNY_THRESHOLDS[1], "Gradient from which on canny begins an edge, as in OpenCV.", least=0.0
    )
    control_type: str | None = option(
        None,
        "What they show, e.g. silhouette or edges; the detector's if not given. Colours of a palette are "
        "never blended.",
    )
    palette: str | None = option(
        None,
        "Classes and colours that control_type=palette is checked against: tiny_world, or a JSON file "
        '{"sky": [0, 128, 255], …}.',
    )
    control_learning_rate: float = option(
        MAX_ENCODER_RATE, "Learning rate of the control encoder.", above=0.0, most=MAX_ENCODER_RATE
    )
    control_dropout: float = option(
        0.0, "Share of samples that are trained without their control image.", least=0.0, most=1.0
    )
    validation_image: tuple[str, ...] = option(
        (),
        "Control image of a validation prompt, or the photo that the detector draws it from; one for each "
        "prompt in their order, or one for all.",
    )

    @property
    def is_detected(self) -> bool:
        """Whether control images are drawn from the photos."""
        return self.detector not in (None, "palette")

    def contradictions(self) -> Iterator[str]:
        """Say which options exclude each other."""
        problem = None if self.detector is None else detector_problem(self.detector)
        if problem is not None:
            yield problem
        elif self.is_detected and self.conditioning_data_dir is not None:
            yield (
                f"conditioning_data_dir and detector={self.detector} are two sources of control images; give "
                "one"
            )
        if self.canny_low_threshold > self.canny_high_threshold:
            yield (
                f"canny_low_threshold={self.canny_low_threshold:g} is above canny_high_threshold="
                f"{self.canny_high_threshold:g}; exchange them"
            )
        if self.control_type is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", self.control_type):
            yield f"control_type={shown(self.control_type)} is no name; use letters, digits, _ and -"
        pair = {self.detector, self.control_type} - {None}
        if "palette" in pair and len(pair) > 1:
            yield (
                f"detector={self.detector} and control_type={self.control_type} contradict each other; leave "
                "one out"
            )

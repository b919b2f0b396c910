"""What an image that says where adds to a run: its files, its encoder, and how often it is left out."""

from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.options import option
from ether_diffusion.training.config.section import Section

MAX_ENCODER_RATE = 1e-4
"""ETHER, Bini et al. 2024, arXiv:2405.20271, appendix C.2: the encoder learns at 1e-4 at most."""


@dataclass(frozen=True)
class ControlConfig(Section):
    """Control images and their encoder."""

    conditioning_data_dir: Path | None = option(
        None, "Folder of control images with the photos' names: what says where."
    )
    control_type: str | None = option(
        None, "What they show, e.g. silhouette or edges; colours of a palette are never blended."
    )
    control_learning_rate: float = option(
        MAX_ENCODER_RATE, "Learning rate of the control encoder.", above=0.0, most=MAX_ENCODER_RATE
    )
    control_dropout: float = option(
        0.0, "Share of samples that are trained without their control image.", least=0.0, most=1.0
    )
    validation_image: tuple[str, ...] = option(
        (), "Control image of a validation prompt; give one for each, in their order."
    )

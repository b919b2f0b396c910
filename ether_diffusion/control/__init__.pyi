from .conditioning import (
    ControlConfig,
    ControlEncoder,
    LoadedControl,
    controlled,
    holds_control,
    load_control,
    new_encoder,
    read_control,
    save_control,
)
from .detectors import Detector
from .images import ControlImage, control_batch, control_image_sha256
from .palette import Palette, read_palette

__all__ = [
    "ControlConfig",
    "ControlEncoder",
    "ControlImage",
    "Detector",
    "LoadedControl",
    "Palette",
    "control_batch",
    "control_image_sha256",
    "controlled",
    "holds_control",
    "load_control",
    "new_encoder",
    "read_control",
    "read_palette",
    "save_control",
]

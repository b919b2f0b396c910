from .conditioning import controlled
from .detectors import Detector
from .encoder import ControlConfig, ControlEncoder, new_encoder
from .images import ControlImage, control_batch, control_image_sha256
from .loading import LoadedControl, load_control, read_control_folder, save_control
from .palette import Palette, read_palette
from .reader import holds_control, read_control

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
    "read_control_folder",
    "read_palette",
    "save_control",
]

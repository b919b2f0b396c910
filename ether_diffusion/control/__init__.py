"""Control: a small encoder lets an image say where, added once after the frozen UNet's first convolution."""

from ether_diffusion.control.conditioning import controlled
from ether_diffusion.control.detectors import Detector
from ether_diffusion.control.encoder import ControlConfig, ControlEncoder, new_encoder
from ether_diffusion.control.images import ControlImage, control_batch, control_image_sha256
from ether_diffusion.control.loading import LoadedControl, load_control, save_control
from ether_diffusion.control.palette import Palette, read_palette
from ether_diffusion.control.reader import holds_control, read_control

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

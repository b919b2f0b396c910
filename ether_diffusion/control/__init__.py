"""Control: a small encoder lets an image say where, added once after the frozen UNet's first convolution."""

from ether_diffusion.control.conditioning import controlled
from ether_diffusion.control.encoder import ControlConfig, ControlEncoder, new_encoder
from ether_diffusion.control.images import ControlImage, control_batch, control_image_sha256

__all__ = [
    "ControlConfig",
    "ControlEncoder",
    "ControlImage",
    "control_batch",
    "control_image_sha256",
    "controlled",
    "new_encoder",
]

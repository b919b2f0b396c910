"""The control encoder in training: made, kept in checkpoints, and written beside the adapter."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from ether_diffusion.adapters.control_encoder import control_files
from ether_diffusion.adapters.format import CONTROL_CONFIG_NAME, ENCODER_NAME
from ether_diffusion.bases import Base, Denoiser
from ether_diffusion.control import ControlEncoder, control_batch, new_encoder, read_control
from ether_diffusion.training.config import ControlConfig
from ether_diffusion.training.dataset import control_finisher, detector_of
from ether_diffusion.training.decoding import BLACK, WHITE, decode_photo
from ether_diffusion.training.methods import TrainedPart, adapter_tensors
from ether_diffusion.training.randomness import stream
from ether_diffusion.wording import printable

CONTROL_FILES = (CONTROL_CONFIG_NAME, ENCODER_NAME)


def new_control(config: ControlConfig, base: Base, unet: Denoiser, *, seed: int) -> ControlEncoder:
    """Return a fresh encoder for a UNet, decided by the seed."""
    encoder = new_encoder(
        unet,
        vae_scale_factor=base.vae_scale_factor,
        seed=stream(seed, "control encoder").initial_seed(),
        control_type=config.control_type,
    )
    encoder.train()
    return encoder


def validation_controls(config: ControlConfig | None, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the control image (1, 3, height, width) of each validation prompt; none without control.

    Raises:
        ValueError: one cannot be read, or has other proportions than what is drawn.
    """
    if config is None:
        return ()
    height, width = size
    return tuple(
        control_batch(
            _validation_picture(config, path, width=width, height=height),
            height=height,
            width=width,
            control_type=config.control_type,
        )
        for path in config.validation_image
    )


def _validation_picture(config: ControlConfig, path: str, *, width: int, height: int) -> Image.Image:
    detector = detector_of(config)
    background = BLACK if detector is None else WHITE  # photos lie over white in training, too
    picture, alpha = decode_photo(path, background=background, min_side=1)
    try:
        if detector is None:
            return control_finisher(config)(picture)
        return detector.draw_at(picture, alpha, width=width, height=height)
    except ValueError as reason:
        raise ValueError(f"validation_image {printable(path)}: {reason}") from None


def control_result_files(encoder: ControlEncoder, parts: Sequence[TrainedPart]) -> dict[str, bytes]:
    """Return the encoder's files, which name the UNet's adapter where there is one."""
    unet = next((part.model for part in parts if part.part == "unet"), None)
    return control_files(encoder, None if unet is None else adapter_tensors(unet))


def restore_control(encoder: ControlEncoder, folder: Path) -> None:
    """Give the encoder the values of one that was written.

    Raises:
        ValueError: it is of another form, or damaged.
        FileNotFoundError: there is none.
    """
    found = read_control(folder)
    if found.config != encoder.config:
        raise ValueError(
            f"{folder} holds no control encoder of this form; give another --output_dir, or the control "
            "settings and the base that it was made with"
        )
    encoder.load_state_dict(found.state_dict())

"""Pictures and latents: what the autoencoder makes of one for the other."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderTiny,
)
from diffusers.image_processor import VaeImageProcessor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

VAE: TypeAlias = AutoencoderKL | AutoencoderTiny | AutoencoderDC | AutoencoderKLFlux2 | AutoencoderKLQwenImage
Check: TypeAlias = Callable[[Tensor], tuple[Tensor, Sequence[bool] | None]]
"""What is left of decoded pictures (b, 3, height, width), and which of them were taken out."""
_FAULT = "ether_diffusion_fault"

logger = logging.getLogger(__name__)


class Fault(StrEnum):
    """Why a picture shows nothing, and what to do, as what follows its name."""

    BLACKENED = (
        "was blackened by the base's safety checker; take another seed or prompt, or a base without it"
    )
    NOT_FINITE = (
        "has values that are not finite, and is black there; draw in float32, with less strength, or fetch "
        "the base again"
    )
    EMPTY = "is empty, of one colour throughout; draw in float32, with more steps, or fetch the base again"


def fault_of(picture: Image.Image) -> Fault | None:
    """Return what was found wrong with a picture when it was drawn; a black one that was drawn so is fine."""
    found = picture.info.get(_FAULT)
    return None if found is None else Fault(found)


def to_pictures(values: NDArray[np.floating], blackened: Sequence[bool] | None = None) -> list[Image.Image]:
    """Return values (b, height, width, 3) in [0, 1] as pictures that know what is wrong with them.

    What is not finite becomes black. `blackened` are those that a safety checker has taken out.
    """
    pictures: list[Image.Image] = VaeImageProcessor.numpy_to_pil(np.nan_to_num(values))
    for picture, each, is_blackened in zip(pictures, values, blackened or [False] * len(values), strict=True):
        fault = Fault.BLACKENED if is_blackened else _find_fault(each)
        if fault is not None:
            picture.info[_FAULT] = fault.value
    return pictures


def _find_fault(values: NDArray[np.floating]) -> Fault | None:
    if not np.isfinite(values).all():
        return Fault.NOT_FINITE
    first = values[:1, :1]
    # what is drawn black, white or red is clipped there; between, no two numbers of a drawing are the same
    return Fault.EMPTY if (values == first).all() and ((first > 0) & (first < 1)).any() else None


@torch.no_grad()
def encode_images(vae: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (b, c, h, w), float32 on the CPU, of the posterior of images.

    Images are (b, 3, height, width) in [-1, 1]; the latents are as the autoencoder gives them, unscaled.
    """
    images = images.to(vae.device, vae.dtype)
    with _as_stored(vae):
        encoded = vae.encode(images.unsqueeze(2) if _is_of_video(vae) else images)
    if isinstance(vae, AutoencoderTiny | AutoencoderDC):  # they have no posterior
        mean = encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent
        std = torch.zeros_like(mean)
    else:
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    if isinstance(vae, AutoencoderKLFlux2):  # whose statistics are those of means, as its pipelines'
        std = torch.zeros_like(mean)
    if _is_of_video(vae):
        mean, std = mean.squeeze(2), std.squeeze(2)
    return mean.float().cpu(), std.float().cpu()


def scale_latents(vae: VAE, latents: Tensor) -> Tensor:
    """Map latents of the autoencoder to those of the denoiser: shifted and scaled as it says."""
    scale, shift = _statistics(vae, latents)
    return (latents - shift) * scale


@torch.no_grad()
def decode_latents(vae: VAE, latents: Tensor, check: Check | None = None) -> list[Image.Image]:
    """Return the pictures of latents (b, c, h, w) of the denoiser, as `check` leaves them."""
    latents = latents.float().cpu()
    scale, shift = _statistics(vae, latents)
    latents = (latents / scale + shift).to(vae.device, vae.dtype)
    with _as_stored(vae), decoded_again(vae):
        decoded = vae.decode(latents.unsqueeze(2) if _is_of_video(vae) else latents).sample
    if _is_of_video(vae):
        decoded = decoded.squeeze(2)
    decoded, blackened = (decoded, None) if check is None else check(decoded)
    return to_pictures(VaeImageProcessor().postprocess(decoded.float(), output_type="np"), blackened)


@contextmanager
def decoded_again(vae: VAE) -> Iterator[None]:
    """Inside, what a VAE's decoder overflows at in half precision is decoded again in float32.

    SDXL's own VAE does so in float16. What is infinite even then is NaN, which no clipping hides.
    """
    handle = vae.decoder.register_forward_hook(_decode_again)
    try:
        yield
    finally:
        handle.remove()


def _decode_again(decoder: nn.Module, inputs: tuple[Any, ...], decoded: Tensor) -> Tensor | None:
    if decoded.isfinite().all():
        return None
    dtype = next(decoder.parameters()).dtype
    is_here = not any(parameter.is_meta for parameter in decoder.parameters())
    if decoded.dtype != torch.float32 and is_here and inputs[0].isfinite().all():
        logger.warning("the VAE overflows in %s; it decodes in float32 instead", str(decoded.dtype)[6:])
        try:
            with torch.autocast(decoded.device.type, enabled=False):
                decoded = decoder.to(torch.float32)(*(each.float() for each in inputs))
        finally:
            decoder.to(dtype)
    return decoded.where(decoded.isfinite(), torch.nan)


def _as_stored(vae: VAE) -> torch.autocast:
    """Work in the autoencoder's own dtype, also under mixed precision: SDXL's gives NaN in float16."""
    return torch.autocast(vae.device.type, enabled=False)


def _is_of_video(vae: VAE) -> bool:
    """Say whether an autoencoder takes a picture as a video of one frame."""
    return isinstance(vae, AutoencoderKLQwenImage)


def _statistics(vae: VAE, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and shift for latents (b, c, h, w): the denoiser sees (latents - shift) * scale."""
    config = vae.config
    if isinstance(vae, AutoencoderKLFlux2):  # of each place in a patch of 2 × 2
        tiles = (1, 1, latents.shape[-2] // 2, latents.shape[-1] // 2)
        std = (vae.bn.running_var.float().cpu() + config.batch_norm_eps).sqrt()
        mean = vae.bn.running_mean.float().cpu()
        std, mean = (each.view(1, -1, 2, 2).repeat(tiles) for each in (std, mean))
        return 1 / std, mean
    scale = torch.tensor(config.get("scaling_factor", 1.0))
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return scale.view(1, 1, 1, 1), torch.tensor(config.get("shift_factor") or 0.0).view(1, 1, 1, 1)
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (mean, std))
    return scale / std, mean


def vae_scale_factor(config: Mapping[str, Any]) -> int:
    """Return what an autoencoder of a config divides the sides of pictures by."""
    if "temperal_downsample" in config:  # diffusers' own spelling, of a video's
        return int(2 ** len(config["temperal_downsample"]))
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (64,)
    return int(2 ** (len(blocks) - 1))

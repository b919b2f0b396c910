"""Pictures and latents: what the autoencoder makes of one for the other."""

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (b, c, h, w), float32 on the CPU, of the posterior of images.

    Images are (b, 3, height, width) in [-1, 1]; the latents are as the autoencoder gives them, unscaled.
    """
    with _as_stored(vae):
        posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    return posterior.mean.float().cpu(), posterior.std.float().cpu()


def scale_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Map latents of the autoencoder to those of the UNet: shifted and scaled as its config says."""
    scale, shift = _statistics(vae)
    return (latents - shift) * scale


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """Return the pictures of latents (b, c, h, w) of the UNet."""
    scale, shift = _statistics(vae)
    with _as_stored(vae):
        decoded = vae.decode((latents.float().cpu() / scale + shift).to(vae.device, vae.dtype)).sample
    pictures: list[Image.Image] = VaeImageProcessor().postprocess(decoded.float(), output_type="pil")
    return pictures


def _as_stored(vae: AutoencoderKL) -> torch.autocast:
    """Work in the autoencoder's own dtype, also under mixed precision: SDXL's gives NaN in float16."""
    return torch.autocast(vae.device.type, enabled=False)


def _statistics(vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Return scale and shift, each (1, c or 1, 1, 1): the UNet sees (latents - shift) * scale."""
    config = vae.config
    scale = torch.tensor(config.scaling_factor)
    if config.latents_mean is None or config.latents_std is None:
        return scale.view(1, 1, 1, 1), torch.tensor(config.shift_factor or 0.0).view(1, 1, 1, 1)
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (config.latents_mean, config.latents_std))
    return scale / std, mean

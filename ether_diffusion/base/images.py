"""Pictures and latents: what the autoencoder makes of one for the other."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (b, c, h, w), float32 on the CPU, of the posterior of images.

    Images are (b, 3, height, width) in [-1, 1]; the latents are as the autoencoder gives them, unscaled.
    """
    posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    return posterior.mean.float().cpu(), posterior.std.float().cpu()


def scale_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Map latents of the autoencoder to those of the UNet: shifted and scaled as its config says."""
    config = vae.config
    scale: float = config.scaling_factor
    if config.latents_mean is None or config.latents_std is None:
        shift: float = config.shift_factor or 0.0
        return (latents - shift) * scale
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
    )
    return (latents - mean) * (scale / std)

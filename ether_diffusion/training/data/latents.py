"""Views as the VAE sees them: each encoded by itself, so that none depends on its neighbours."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ether_diffusion.training.data.holes import shrink_hole
from ether_diffusion.training.data.views import View
from ether_diffusion.wording import printable


@dataclass(frozen=True)
class Codec:
    """A base's VAE: `encode` turns images (b, 3, H, W) in [-1, 1] into the posterior's mean and standard
    deviation, each (b, c, h, w), unscaled float32 on the CPU; `scale` turns latents into what the UNet
    sees.
    """

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    scale: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Posterior:
    """What the VAE knows of an image: mean and standard deviation (c, h, w) of its unscaled latents."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw latents (c, h, w)."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)


@dataclass(frozen=True)
class EncodedView:
    """A view without its pixels; `mask` and `hole` (1, h, w) are of the latents' size.

    `masked` is the image with its hole filled by gray, None where there is no hole. `control` (3, H, W) is
    the view's in 8 bits, a quarter of the memory.
    """

    name: str
    posterior: Posterior
    mask: Tensor | None
    hole: Tensor | None
    masked: Posterior | None
    size_ids: tuple[int, int, int, int, int, int]
    control: Tensor | None = None


def encode_view(view: View, codec: Codec) -> EncodedView:
    """Encode a view.

    Raises:
        ValueError: the VAE gives values that are not finite; the message names the photo.
    """
    posterior = _encode(view.pixels, view.name, codec)
    size = (posterior.mean.shape[-2], posterior.mean.shape[-1])
    masked = None if view.hole is None else _encode(view.pixels * (view.hole < 0.5), view.name, codec)
    return EncodedView(
        name=view.name,
        posterior=posterior,
        mask=None if view.mask is None else _average(view.mask, size),
        hole=None if view.hole is None else shrink_hole(view.hole, size),
        masked=masked,
        size_ids=view.size_ids,
        control=None if view.control is None else (view.control * 255).round().to(torch.uint8),
    )


def _encode(pixels: Tensor, name: str, codec: Codec) -> Posterior:
    with torch.no_grad():
        mean, std = codec.encode(pixels[None])
    assert mean.dtype == std.dtype == torch.float32
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise ValueError(
            f"the VAE turns {printable(name)} into latents that are not finite, as SDXL's does in float16; "
            "load it in float32, or give one mended for float16 as pretrained_vae_model_name_or_path"
        )
    return Posterior(mean[0].clone(), std[0].clone())


def _average(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask (1, H, W) as the mean of each latent pixel's area (1, h, w)."""
    height, width = size
    rows, columns = mask.shape[-2] // height, mask.shape[-1] // width
    return mask.reshape(1, height, rows, width, columns).mean((2, 4))

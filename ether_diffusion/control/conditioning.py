"""Control in force: for a while, a UNet sees an image beside its latents, and is as before after."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ether_diffusion.adapters.control_encoder import ControlEncoder
from ether_diffusion.adapters.models import bare_model

Strength = float | Tensor
"""For all images, or (n,) with one for each."""


@contextmanager
def controlled(
    unet: nn.Module, encoder: ControlEncoder, images: Tensor, *, strength: Strength = 1.0
) -> Iterator[None]:
    """Add strength · encoder(images) to the output of the UNet's `conv_in` in every forward inside.

    Images are (n, 3, height, width) in [0, 1], at the size of the pictures. They are encoded once, on entry.
    A batch of k · n samples takes them k times over, which is the order of classifier-free guidance.
    Strength 0 is the base, bit for bit. Contexts inside one another add up.

    Raises:
        ValueError: the encoder is of another UNet, the images or the batch do not fit, or the strength is not
            finite.
    """
    first = check_encoder(unet, encoder)
    if images.ndim != 4 or images.shape[1] != encoder.config.conditioning_channels or not len(images):
        raise ValueError(
            f"found control images of shape {tuple(images.shape)}; they must be (n, 3, height, width)"
        )
    factor, (height, width) = encoder.config.scale_factor, images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"found control images of {width} × {height} px; sides must be multiples of {factor} px"
        )
    strengths = torch.as_tensor(strength)
    if not bool(torch.isfinite(strengths).all()):
        raise ValueError(f"the strength of control is {strength}; use finite numbers, where 0 is the base")
    if strengths.ndim and strengths.shape != (len(images),):
        raise ValueError(
            f"found {strengths.numel()} strengths for {len(images)} control images; give each one"
        )
    if not isinstance(strength, Tensor) and strength == 0:
        yield
        return
    weight = encoder.conv_in.weight
    features: Tensor = encoder(images.to(weight.device, weight.dtype))
    if isinstance(strength, Tensor):
        features = features * strength.to(features).view(-1, 1, 1, 1)
    elif strength != 1:
        features = features * strength

    def add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        repeats, rest = divmod(len(output), len(features))
        if rest or features.shape[-2:] != output.shape[-2:]:
            raise ValueError(
                f"{len(features)} control images for latents of {tuple(features.shape[-2:])} do not fit "
                f"{len(output)} samples with latents of {tuple(output.shape[-2:])}; give images at the size "
                "of the pictures, one for all or one for each"
            )
        return output + features.to(output.device, output.dtype).repeat(repeats, 1, 1, 1)

    handle = first.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def check_encoder(unet: nn.Module, encoder: ControlEncoder) -> nn.Module:
    """Return the UNet's first convolution, which the encoder fits.

    Raises:
        ValueError: it does not, or the UNet is compiled whole, which would pass over the control.
    """
    if hasattr(unet, "_orig_mod") or getattr(unet, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "the UNet is compiled as a whole, where control would have no effect; compile its blocks with "
            "unet.compile_repeated_blocks()"
        )
    model = bare_model(unet)
    first = getattr(model, "conv_in", None)
    if not isinstance(first, nn.Module):
        raise ValueError(f"{type(model).__name__} has no conv_in to add control after; use a UNet")
    width, found = encoder.config.conditioning_embedding_channels, next(first.parameters()).shape[0]
    if width != found:
        raise ValueError(
            f"the control encoder gives {width} channels and the UNet's conv_in {found}; "
            "load the base that it was made for"
        )
    return first

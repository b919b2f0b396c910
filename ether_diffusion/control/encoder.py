"""A fresh control encoder for a UNet, whose hidden convolutions keep the scale of what they see."""

import math

import torch
from torch import nn

from ether_diffusion.adapters.control_encoder import (
    CHANNELS,
    MAX_DOWNSAMPLINGS,
    ControlConfig,
    ControlEncoder,
)
from ether_diffusion.adapters.models import bare_model

__all__ = ["ControlConfig", "ControlEncoder", "new_encoder"]


def new_encoder(
    unet: nn.Module, *, vae_scale_factor: int, seed: int = 0, control_type: str | None = None
) -> ControlEncoder:
    """Return a fresh encoder for a UNet, float32 on its device: it adds zeros until it is trained.

    Raises:
        ValueError: the VAE's factor is no power of two from 1 to 64.
    """
    downsamplings = int(math.log2(vae_scale_factor)) if vae_scale_factor > 0 else -1
    if 2**downsamplings != vae_scale_factor or downsamplings > MAX_DOWNSAMPLINGS:
        raise ValueError(
            f"found a VAE that divides sides by {vae_scale_factor}; control needs a power of two up to "
            f"{2**MAX_DOWNSAMPLINGS}"
        )
    first = bare_model(unet).conv_in
    assert isinstance(first, nn.Module)
    channels = tuple(CHANNELS[min(index, len(CHANNELS) - 1)] for index in range(downsamplings + 1))
    weight = next(first.parameters())
    config = ControlConfig(weight.shape[0], channels, control_type=control_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ControlEncoder(config)
        _keep_scale(encoder)
    encoder.to(weight.device)
    return encoder


def _keep_scale(encoder: ControlEncoder) -> None:
    """Draw the hidden convolutions so that what they see keeps its scale (He et al. 2015, arXiv:1502.01852).

    torch's own initial weights lose two thirds of it at each: of a silhouette, a 500th would reach the
    last convolution, which at the paper's learning rate takes thousands of steps to make up for.
    """
    for convolution in (encoder.conv_in, *encoder.blocks):
        assert isinstance(convolution, nn.Conv2d)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")

"""The control encoder: from an image at the size of the picture to features at the size of the latents."""

import math
import re
from dataclasses import dataclass

import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import nn

from ether_diffusion.adapters.models import bare_model

CHANNELS = (16, 32, 96, 256)
"""Of the paper's encoder for a VAE that divides by 8: 1.09 M parameters on SD 1.5."""
MAX_DOWNSAMPLINGS = 6
MAX_CHANNELS = 4096
CONDITIONING_CHANNELS = 3
_TYPE = re.compile(r"[A-Za-z0-9_-]{1,40}")


@dataclass(frozen=True)
class ControlConfig:
    """The form of an encoder, in the words of diffusers' ControlNetModel.

    Attributes:
        conditioning_embedding_channels: the width of the UNet's first convolution.
        block_out_channels: a stride of 2 lies between one and the next.
        control_type: what its images show, e.g. "silhouette"; None where nobody said.
    """

    conditioning_embedding_channels: int
    block_out_channels: tuple[int, ...] = CHANNELS
    conditioning_channels: int = CONDITIONING_CHANNELS
    control_type: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.block_out_channels) <= MAX_DOWNSAMPLINGS + 1:
            raise ValueError(
                f"found {len(self.block_out_channels)} block_out_channels; "
                f"use from 1 to {MAX_DOWNSAMPLINGS + 1}"
            )
        for channels in (self.conditioning_embedding_channels, *self.block_out_channels):
            if not 1 <= channels <= MAX_CHANNELS:
                raise ValueError(f"found {channels} channels; use from 1 to {MAX_CHANNELS}")
        if self.conditioning_channels != CONDITIONING_CHANNELS:
            raise ValueError(
                f"conditioning_channels={self.conditioning_channels}; control images have "
                f"{CONDITIONING_CHANNELS}, which those with fewer are converted to"
            )
        if self.control_type is not None and not _TYPE.fullmatch(self.control_type):
            raise ValueError(
                f"control_type={self.control_type!r}; use up to 40 letters, digits, _ and -, as silhouette"
            )

    @property
    def scale_factor(self) -> int:
        """Pixels per latent along a side."""
        return 1 << len(self.block_out_channels) - 1


class ControlEncoder(ControlNetConditioningEmbedding):
    """diffusers' ControlNetConditioningEmbedding, whose last convolution begins at zero; with its config.

    It maps images (n, 3, height, width) in [0, 1] to (n, width of conv_in, height / f, width / f), as
    oft-control's encoder does (Qiu et al. 2023, arXiv:2306.07280).
    """

    def __init__(self, config: ControlConfig) -> None:
        super().__init__(
            conditioning_embedding_channels=config.conditioning_embedding_channels,
            conditioning_channels=config.conditioning_channels,
            block_out_channels=config.block_out_channels,
        )
        self.config = config


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

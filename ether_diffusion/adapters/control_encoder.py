"""The control encoder: from an image at the size of the picture to features at the size of the latents."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Literal, cast

import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from pydantic import Field
from torch import Tensor

from ether_diffusion.adapters import format as names
from ether_diffusion.adapters.tensor_file import finite, open_tensors, safetensors_bytes
from ether_diffusion.strict_json import StrictModel, checked, parse_json, validate

CHANNELS = (16, 32, 96, 256)
"""Of the paper's encoder for a VAE that divides by 8: 1.09 M parameters on SD 1.5."""
MAX_DOWNSAMPLINGS = 6
_Channels = Annotated[int, Field(ge=1, le=4096)]
_Type = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,40}$")]
_Blocks = Annotated[tuple[_Channels, ...], Field(min_length=1, max_length=MAX_DOWNSAMPLINGS + 1)]


@checked()
class ControlConfig:
    """The form of an encoder, in the words of diffusers' ControlNetModel.

    Attributes:
        conditioning_embedding_channels: the width of the UNet's first convolution.
        block_out_channels: a stride of 2 lies between one and the next.
        conditioning_channels: of control images; those with fewer are converted to 3.
        control_type: what its images show, e.g. "silhouette"; None where nobody said.
    """

    conditioning_embedding_channels: _Channels
    block_out_channels: _Blocks = CHANNELS
    conditioning_channels: Literal[3] = 3
    control_type: _Type | None = None

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


class _ControlFile(StrictModel):
    """control_config.json; adapter_sha256 is the content hash of the adapter that was trained with it."""

    format_version: Annotated[int, Field(ge=1)]
    adapter_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None
    conditioning_embedding_channels: _Channels
    conditioning_channels: Literal[3]
    block_out_channels: _Blocks
    control_type: _Type | None


def parse_control_config(data: bytes, where: str) -> tuple[ControlConfig, str | None]:
    """Return an encoder's form, and the hash of its adapter."""
    found = parse_json(data, where)
    if isinstance(found, dict):
        names.check_version(found.get("format_version"), where)
    form = validate(found, _ControlFile, where)
    return ControlConfig(**form.model_dump(exclude={"format_version", "adapter_sha256"})), form.adapter_sha256


def parse_encoder(data: bytes, config: ControlConfig, where: str) -> ControlEncoder:
    """Return the encoder of this form whose file has these bytes, frozen, in float32."""
    with torch.device("meta"):
        encoder = ControlEncoder(config)
    tensors, _ = open_tensors(data, where)
    needed = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(needed.keys() | shapes.keys()):
        found, own = shapes.get(name, "none"), needed.get(name, "none")
        if found != own:
            raise ValueError(
                f"{where}: {name} has shape {found} and the configuration says {own}; the two files do not "
                "belong together"
            )
    tensors = finite({name: tensor.float() for name, tensor in tensors.items()}, where)
    encoder.load_state_dict(tensors, assign=True)
    return cast(ControlEncoder, encoder.requires_grad_(False).eval())


def control_files(encoder: ControlEncoder, tensors: Mapping[str, Tensor] | None) -> dict[str, bytes]:
    """Return the files of an encoder in float32, which name the adapter of these tensors; None is alone."""
    own = {n: t.detach().to("cpu").float().contiguous() for n, t in sorted(encoder.state_dict().items())}
    sha256 = None if tensors is None else names.content_hash(tensors)
    config = asdict(encoder.config) | {"format_version": names.FORMAT_VERSION, "adapter_sha256": sha256}
    return {
        names.CONTROL_CONFIG_NAME: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        names.ENCODER_NAME: safetensors_bytes(
            finite(own, "the control encoder to be written"), {"format": "pt"}
        ),
    }

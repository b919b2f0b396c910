"""Control encoders: a fresh one for a UNet, and one folder for it and the adapter trained with it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch import nn

from ether_diffusion.adapters import Adapter, AdapterMetadata, AdapterPart, LoadReport, attach
from ether_diffusion.adapters.card import CONTROL_PIPELINE, encoder_card, is_ours, model_card
from ether_diffusion.adapters.control_encoder import (
    CHANNELS,
    MAX_DOWNSAMPLINGS,
    ControlConfig,
    ControlEncoder,
    control_files,
)
from ether_diffusion.adapters.format import CARD_NAME, CONFIG_NAME, CONTROL_CONFIG_NAME, EXPORT_NAME
from ether_diffusion.adapters.load import Attaching, read_for
from ether_diffusion.adapters.models import Pipeline, bare_model, find_parts
from ether_diffusion.adapters.read import find_source, read_encoder
from ether_diffusion.adapters.save import write_adapter
from ether_diffusion.control.conditioning import check_encoder
from ether_diffusion.durable_files import write_files
from ether_diffusion.wording import printable

__all__ = [
    "ControlConfig",
    "ControlEncoder",
    "LoadedControl",
    "encoder_of",
    "holds_control",
    "load_control",
    "new_encoder",
    "read_control",
    "save_control",
]


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
        # the hidden convolutions keep the scale of what they see (He et al. 2015, arXiv:1502.01852): torch's
        # own initial weights lose two thirds of it at each, so that of a silhouette a 500th would reach the
        # last one, which at the paper's learning rate takes thousands of steps to make up for
        for convolution in (encoder.conv_in, *encoder.blocks):
            assert isinstance(convolution, nn.Conv2d)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    encoder.to(weight.device)
    return encoder


@dataclass(frozen=True)
class LoadedControl:
    """An encoder, and what `attach` says of the adapter beside it; None for an encoder by itself."""

    encoder: ControlEncoder
    report: LoadReport | None


def load_control(
    pipeline_or_unet: Pipeline | nn.Module,
    adapter: str | Path | Adapter,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    **how: Unpack[Attaching],
) -> LoadedControl:
    """Load an adapter and its control encoder: the adapter into the model, the encoder beside it.

    The adapter may be of any method that is read, and was read or is a folder or a model of the Hub; it is
    named "control" unless `adapter_name` says otherwise. An encoder by itself changes nothing in the model.
    The encoder is in force inside `controlled`. Nothing is loaded unless all of it fits.

    Raises:
        FileNotFoundError: there is no such folder, model or file.
        ValueError: a file is not whole, not one of this model, or adapter and encoder are of different saves.
    """
    found = read_for(
        pipeline_or_unet, adapter, revision=revision, local_files_only=local_files_only, with_encoder=True
    )
    encoder = encoder_of(found)
    check_encoder(find_parts(pipeline_or_unet)[0].model, encoder)
    how.setdefault("adapter_name", "control")
    return LoadedControl(encoder, attach(pipeline_or_unet, found, **how) if found.parts else None)


def encoder_of(adapter: Adapter) -> ControlEncoder:
    """Return the control encoder of an adapter that was read.

    Raises:
        FileNotFoundError: it has none.
    """
    if adapter.encoder is None:
        raise FileNotFoundError(
            f"{adapter.name} has no {CONTROL_CONFIG_NAME}; give the folder of an adapter that follows a "
            "control image"
        )
    return adapter.encoder


def read_control(
    path_or_hub_id: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> ControlEncoder:
    """Read the control encoder of an adapter's folder or a model of the Hub, frozen, on the CPU.

    Raises:
        FileNotFoundError: there is no such folder, model or file.
        ValueError: a file is not whole; the message says what was found.
    """
    source = find_source(path_or_hub_id, revision=revision, local_files_only=local_files_only)
    return encoder_of(Adapter({}, read_encoder(source, None)[0], printable(source.name, 300)))


def holds_control(path_or_hub_id: str | Path) -> bool:
    """Say whether a folder or a model of the Hub has a control encoder.

    Raises:
        FileNotFoundError: it is neither.
    """
    return find_source(path_or_hub_id, revision=None, local_files_only=False).holds(None, CONTROL_CONFIG_NAME)


def save_control(folder: str | Path, encoder: ControlEncoder, *, adapter: AdapterPart | None = None) -> None:
    """Write an encoder and the adapter that was trained with it; `load_control` reads them back.

    Raises:
        ValueError: it would be refused on reading, or without `adapter` the folder holds one; nothing is
            written then.
        NotADirectoryError: `folder` is a file.
    """
    folder = Path(folder)
    files = control_files(encoder, None if adapter is None else adapter.tensors)
    if adapter is None and (folder / CONFIG_NAME).exists():
        raise ValueError(f"{printable(folder)} holds an adapter; save the encoder with it, or elsewhere")
    if adapter is not None:
        write_adapter(folder, adapter, card=False)
    folder.mkdir(parents=True, exist_ok=True)
    readme = folder / CARD_NAME
    if not readme.exists() or is_ours(readme):
        has_lora_export = (folder / EXPORT_NAME).exists()
        text = (
            encoder_card(AdapterMetadata())
            if adapter is None
            else model_card(adapter, has_lora_export=has_lora_export, control=CONTROL_PIPELINE)
        )
        files = {CARD_NAME: text.encode(), **files}
    write_files(folder, files)

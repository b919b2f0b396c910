"""Control encoders: made, read and saved with the adapter beside them, and in force for a while."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from ether_diffusion.adapters import Adapter, AdapterMetadata, AdapterPart, LoadReport, attach
from ether_diffusion.adapters.card import CONTROL_PIPELINE, encoder_card, is_ours, model_card
from ether_diffusion.adapters.control_encoder import CHANNELS, MAX_DOWNSAMPLINGS, control_files
from ether_diffusion.adapters.control_encoder import ControlConfig as ControlConfig
from ether_diffusion.adapters.control_encoder import ControlEncoder as ControlEncoder
from ether_diffusion.adapters.format import CARD_NAME, CONFIG_NAME, CONTROL_CONFIG_NAME, EXPORT_NAME
from ether_diffusion.adapters.load import Attaching, read_for
from ether_diffusion.adapters.models import Pipeline, bare_model, find_parts
from ether_diffusion.adapters.read import find_source, read_encoder
from ether_diffusion.adapters.save import write_adapter
from ether_diffusion.durable_files import write_files
from ether_diffusion.wording import printable

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
        ValueError: the encoder is of another UNet, the images, the strengths or the batch do not fit.
    """
    first, features = check_encoder(unet, encoder), features_of(encoder, images, strength)
    if features is None:
        yield
        return

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


def features_of(encoder: ControlEncoder, images: Tensor, strength: Strength = 1.0) -> Tensor | None:
    """Return what is added for images (n, 3, height, width) in [0, 1]: (n, c, h, w); None at strength 0.

    Raises:
        ValueError: the images or the strengths do not fit.
    """
    if images.ndim != 4 or images.shape[1] != encoder.config.conditioning_channels or not len(images):
        raise ValueError(f"found images of shape {tuple(images.shape)}; they must be (n, 3, height, width)")
    factor, (height, width) = encoder.config.scale_factor, images.shape[-2:]
    if height % factor or width % factor:
        needed = f"sides must be multiples of {factor} px"
        raise ValueError(f"found control images of {width} × {height} px; {needed}")
    strengths = torch.as_tensor(strength)
    if not bool(torch.isfinite(strengths).all()):
        raise ValueError(f"the strength of control is {strength}; use finite numbers, where 0 is the base")
    if strengths.ndim and strengths.shape != (len(images),):
        found = f"found {strengths.numel()} strengths for {len(images)} control images"
        raise ValueError(f"{found}; give each one")
    if not isinstance(strength, Tensor) and strength == 0:
        return None
    weight = encoder.conv_in.weight
    features: Tensor = encoder(images.to(weight.device, weight.dtype))
    if isinstance(strength, Tensor):
        return features * strength.to(features).view(-1, 1, 1, 1)
    return features if strength == 1 else features * strength


def check_encoder(unet: nn.Module, encoder: ControlEncoder, vae_scale_factor: int | None = None) -> nn.Module:
    """Return the UNet's first convolution, which the encoder fits; else, or if compiled, a ValueError."""
    factor = encoder.config.scale_factor
    if vae_scale_factor not in (None, factor):
        raise ValueError(
            f"the control encoder divides sides by {factor} and this VAE by {vae_scale_factor}; load the "
            "base that it was made for"
        )
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
        given = f"the control encoder gives {width} channels and the UNet's conv_in {found}"
        raise ValueError(f"{given}; load the base that it was made for")
    return first


def new_encoder(
    unet: nn.Module, *, vae_scale_factor: int, seed: int = 0, control_type: str | None = None
) -> ControlEncoder:
    """Return a fresh encoder for a UNet, float32 on its device: it adds zeros until it is trained.

    The VAE's factor is a power of two from 1 to 64.
    """
    downsamplings = int(math.log2(vae_scale_factor)) if vae_scale_factor > 0 else -1
    if 2**downsamplings != vae_scale_factor or downsamplings > MAX_DOWNSAMPLINGS:
        needed = f"control needs a power of two up to {2**MAX_DOWNSAMPLINGS}"
        raise ValueError(f"found a VAE that divides sides by {vae_scale_factor}; {needed}")
    first = bare_model(unet).conv_in
    assert isinstance(first, nn.Module)
    channels = tuple(CHANNELS[min(index, len(CHANNELS) - 1)] for index in range(downsamplings + 1))
    weight = next(first.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ControlEncoder(ControlConfig(weight.shape[0], channels, control_type=control_type))
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
    """Return the control encoder of an adapter that was read; without one it is a FileNotFoundError."""
    if adapter.encoder is None:
        needed = "give the folder of an adapter that follows a control image"
        raise FileNotFoundError(f"{adapter.name} has no {CONTROL_CONFIG_NAME}; {needed}")
    return adapter.encoder


def read_control(
    path_or_hub_id: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> ControlEncoder:
    """Read the control encoder of an adapter's folder or a model of the Hub, frozen, on the CPU."""
    source = find_source(path_or_hub_id, revision=revision, local_files_only=local_files_only)
    return encoder_of(Adapter({}, read_encoder(source, None)[0], printable(source.name, 300)))


def holds_control(path_or_hub_id: str | Path) -> bool:
    """Say whether a folder or a model of the Hub has a control encoder."""
    return find_source(path_or_hub_id, revision=None, local_files_only=False).holds(None, CONTROL_CONFIG_NAME)


def save_control(folder: str | Path, encoder: ControlEncoder, *, adapter: AdapterPart | None = None) -> None:
    """Write an encoder and the adapter that was trained with it; `load_control` reads them back.

    What would be refused on reading is a ValueError, as is a folder with an adapter where none is given;
    nothing is written then.
    """
    folder = Path(folder)
    files = control_files(encoder, None if adapter is None else adapter.tensors)
    if adapter is not None:
        write_adapter(folder, adapter, card=False)
    elif (folder / CONFIG_NAME).exists():
        raise ValueError(f"{printable(folder)} holds an adapter; save the encoder with it, or elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    readme, exported = folder / CARD_NAME, (folder / EXPORT_NAME).exists()
    if not readme.exists() or is_ours(readme):
        text = encoder_card(AdapterMetadata())
        if adapter is not None:
            text = model_card(adapter, has_lora_export=exported, control=CONTROL_PIPELINE)
        files = {CARD_NAME: text.encode(), **files}
    write_files(folder, files)

"""Reading an adapter of any method, once: everything that can be checked without a model is checked here."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ether_diffusion.adapters import tensor_file
from ether_diffusion.adapters.format import (
    CONFIG_NAME,
    CONTROL_CONFIG_NAME,
    ENCODER_NAME,
    TENSORS_NAME,
    Adapter,
    AdapterPart,
    Component,
    parse_metadata,
)
from ether_diffusion.adapters.methods import (
    check_layout,
    method_of,
    modules_of,
    parse_config,
    title_of,
    usable_values,
)
from ether_diffusion.adapters.models import COMPONENTS, TEXT_ENCODERS, plain_name
from ether_diffusion.adapters.source import Source, find_source, foreign_kind
from ether_diffusion.adapters.tensor_file import PEFT_PREFIX, open_tensors
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.wording import listed, printable

if TYPE_CHECKING:
    from ether_diffusion.adapters.control_encoder import ControlEncoder

MAX_CONFIG_BYTES = 2**20
ON_THE_HUB = ("unet", *TEXT_ENCODERS[:2], "transformer_2")
"""The components that the Hub is asked for where nobody says which; a folder says what it holds."""


def read_adapter(
    path_or_hub_id: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    components: Sequence[Component] | None = None,
    with_encoder: bool | None = None,
    only_ether: bool = False,
) -> Adapter:
    """Read an adapter of any method strictly, touching no model: PEFT's layout, and a control encoder's.

    Args:
        path_or_hub_id: a folder, or a model of the Hugging Face Hub; what exists on disk is taken from there.
        subfolder: where in it the adapter lies.
        revision: branch, tag or commit of the Hub model.
        local_files_only: do not ask the Hub, use what was downloaded before.
        components: which are looked for; None is all that a folder holds, the usual ones of the Hub.
        with_encoder: whether a control encoder is looked for; None is so in a folder, and not on the Hub.
        only_ether: refuse adapters of other methods, saying who reads them.

    Raises:
        FileNotFoundError: there is no such folder, model or file.
        ValueError: a file is not a whole, finite adapter of one method that is read; the message says what
            was found.
    """
    source = find_source(path_or_hub_id, revision=revision, local_files_only=local_files_only)
    is_folder = source.folder is not None
    place = printable("/".join(filter(None, (source.name, subfolder))), 300)
    encoder, adapter_sha256 = None, None
    if is_folder if with_encoder is None else with_encoder:
        encoder, adapter_sha256 = read_encoder(source, subfolder)
    if components is None:
        components = ("unet", *COMPONENTS) if is_folder else ON_THE_HUB
    parts = {}
    for component in components:
        inner = "/".join(filter(None, (subfolder, None if component == "unet" else component)))
        part = _read_part(source, inner or None, only_ether=only_ether)
        if part is not None:
            parts[component] = part
    if not parts and adapter_sha256 is not None:
        raise FileNotFoundError(
            f"{place} has no {CONFIG_NAME}, the adapter that its control encoder was trained with; fetch or "
            "save both again"
        )
    if not parts and encoder is None:
        source.refuse_missing(subfolder, CONFIG_NAME)
    adapter = Adapter(parts, encoder, place)
    if encoder is not None and parts and adapter.hashes.get("unet") != adapter_sha256:
        raise ValueError(
            f"{place} holds an adapter and a control encoder that were not saved together; fetch or save "
            "both again"
        )
    if len({method_of(part.config).title for part in parts.values()}) > 1:
        raise ValueError(f"{place} holds adapters of several methods; save one adapter a folder")
    return adapter


def _read_part(source: Source, subfolder: str | None, *, only_ether: bool) -> AdapterPart | None:
    data = source.read(subfolder, CONFIG_NAME, MAX_CONFIG_BYTES)
    if data is None:
        return None
    place = printable("/".join(filter(None, (source.name, subfolder))), 300)
    config = parse_config(data, f"{place}/{CONFIG_NAME}", only_ether=only_ether)
    if isinstance(config, EtherConfig) and config.modules_to_save:
        raise ValueError(
            f"{place} also carries whole modules (modules_to_save={listed(config.modules_to_save)}), which "
            "are not vectors of ETHER; use peft.PeftModel.from_pretrained"
        )
    data = source.read(subfolder, TENSORS_NAME, tensor_file.MAX_FILE_BYTES)
    if data is None:
        source.refuse_missing(subfolder, TENSORS_NAME)
    file = open_tensors(data, f"{place}/{TENSORS_NAME}")
    names = {name: plain_name(name.removeprefix(PEFT_PREFIX)) for name in file.shapes}
    if len(set(names.values())) < len(names):
        raise ValueError(
            f"{file.where} holds tensors of one projection under two names; save the adapter again"
        )
    shapes = {names[name]: shape for name, shape in file.shapes.items()}
    if not modules_of(config, shapes)[0] and (kind := foreign_kind(shapes)) is not None:
        raise ValueError(f"{file.where} is no {title_of(config)} adapter: {kind}")
    modules = check_layout(config, shapes, file.where)
    if len({name.startswith(PEFT_PREFIX) for name in names}) > 1:
        raise ValueError(
            f"{file.where} holds tensors both with and without the prefix {PEFT_PREFIX}; keep one set"
        )
    tensors = usable_values(config, {names[n]: tensor for n, tensor in file.tensors().items()}, file.where)
    metadata = parse_metadata(file.metadata, file.where)
    base = metadata.base_fingerprint
    if base is not None and len(base.norms) != len(modules):
        raise ValueError(
            f"{file.where} holds {len(modules)} projections and its header speaks of {len(base.norms)}; "
            "it is not whole, fetch or save it again"
        )
    if any(name.removeprefix(PEFT_PREFIX) != plain for name, plain in names.items()):
        # once saved from beneath another adapter; the hash of its base was taken over the wrong names
        metadata = replace(metadata, base_fingerprint=None)
    if not isinstance(config, EtherConfig):
        metadata = replace(
            metadata,
            base_model=metadata.base_model or config.base_model_name_or_path,
            trigger=metadata.trigger or file.metadata.get("trigger"),
        )
    return AdapterPart(config, tensors, metadata)


def read_encoder(source: Source, subfolder: str | None) -> "tuple[ControlEncoder | None, str | None]":
    """Read a control encoder, frozen, on the CPU, and the hash of its adapter; None where there is none.

    Raises:
        FileNotFoundError, ValueError: it is not whole.
    """
    place = printable("/".join(filter(None, (source.name, subfolder))), 300)
    data = source.read(subfolder, CONTROL_CONFIG_NAME, MAX_CONFIG_BYTES)
    if data is None:
        return None, None
    # diffusers' own, which takes seconds to import
    from ether_diffusion.adapters.control_encoder import parse_control_config, parse_encoder

    config, adapter_sha256 = parse_control_config(data, f"{place}/{CONTROL_CONFIG_NAME}")
    data = source.read(subfolder, ENCODER_NAME, tensor_file.MAX_FILE_BYTES)
    if data is None:
        raise FileNotFoundError(f"{place} has no {ENCODER_NAME}; fetch or save the adapter again")
    return parse_encoder(data, config, f"{place}/{ENCODER_NAME}"), adapter_sha256

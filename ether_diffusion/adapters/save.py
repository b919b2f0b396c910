"""save_ether and write_adapter: an adapter's files, which a crash at any moment leaves whole."""

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from peft import IA3Config
from torch import nn

from ether_diffusion.adapters import format as names
from ether_diffusion.adapters import methods, models
from ether_diffusion.adapters.card import is_ours, model_card
from ether_diffusion.adapters.format import Adapter, AdapterMetadata, AdapterPart, Fact, metadata_header
from ether_diffusion.adapters.read import check_no_modules
from ether_diffusion.adapters.tensor_file import PEFT_PREFIX, check_size, safetensors_bytes
from ether_diffusion.durable_files import write_files
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.tuner.other_layers import adapters_of
from ether_diffusion.wording import listed, printable

logger = logging.getLogger(__name__)


def save_ether(
    pipeline_or_model: models.Pipeline | nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    trigger: str | None = None,
    base_model: str | None = None,
    training: Mapping[str, Fact] | None = None,
) -> None:
    """Write an adapter that a pipeline or a model carries, in PEFT's layout; the inverse of `load_ether`.

    Args:
        base_model: name or path of the base for people; None takes the one that the model was loaded from.
        training: flat facts for the file's header and the model card, e.g. {"steps": 800}.

    Raises:
        ValueError: there is no such adapter, it cannot be read back, a component carries one of another
            method under that name, or `folder` holds the adapter of a component that this one lacks.
    """
    parts = models.find_parts(pipeline_or_model)
    configs = {part: models.configs_of(part.model).get(adapter_name) for part in parts}
    carrying = [part for part, config in configs.items() if isinstance(config, EtherConfig)]
    if not carrying:
        raise _lacking(parts[0].name, [part.model for part in parts], f"ETHER adapter named {adapter_name!r}")
    others = [part.name for part, config in configs.items() if config is not None and part not in carrying]
    if others:
        raise ValueError(
            f"{adapter_name!r} is an adapter of another method in {listed(others)}, which would be left out; "
            "give each model to save by itself"
        )
    within = [
        part.name for part in parts if part not in carrying and models.layers_with(part.model, adapter_name)
    ]
    if within:
        raise ValueError(
            f"{adapter_name!r} is carried by a model within {listed(within)}, which would be left out; give "
            "each of its models to save by itself"
        )
    written = {}
    for part in carrying:
        config = configs[part]
        assert config is not None
        name = base_model or models.shareable_name(config.base_model_name_or_path)
        name = name or models.name_of_base(pipeline_or_model) or models.name_of_base(part.model)
        metadata = AdapterMetadata(base_model=name, trigger=trigger, training=dict(training or {}))
        own = detach_adapter(part.model, adapter_name, metadata=metadata)
        written[part.component] = own, adapter_files(own)
    known = ("unet", *models.COMPONENTS, *written)
    places = {name: Path(folder, "" if name == "unet" else name) for name in known}
    there = {name for name, place in places.items() if (place / names.CONFIG_NAME).exists()}
    stale = sorted(there - written.keys())
    if stale:
        raise ValueError(
            f"{printable(folder)} holds adapters of {listed(stale)}, which {adapter_name!r} lacks; loading "
            "would mix the two: save into another folder"
        )
    for component, (own, files) in written.items():
        _write(places[component], own, files, card=component == "unet")


def detach_adapter(
    model: nn.Module, adapter_name: str, *, metadata: AdapterMetadata | None = None
) -> AdapterPart:
    """Return a copy of an adapter that a model carries, of any method, with the fingerprint of its base."""
    layers = models.layers_with(model, adapter_name)
    if not layers:
        raise _lacking(type(model).__name__, [model], f"adapter named {adapter_name!r}")
    base = models.base_fingerprint(model, list(layers))
    metadata = replace(metadata or AdapterMetadata(), base_fingerprint=base)
    config = copy.copy(models.configs_of(model)[adapter_name])
    # as PEFT's save_pretrained: a loaded adapter is for use until the caller says that it is to be trained
    config.inference_mode = True
    if isinstance(config, EtherConfig):
        kind = type(models.bare_model(model))  # as PEFT's save_pretrained
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        check_no_modules(config, f"the adapter {adapter_name!r}")
    else:
        config.base_model_name_or_path = metadata.base_model
        if isinstance(config.target_modules, str):  # a regex, which no reader should have to evaluate
            config.target_modules = list(layers)
        if isinstance(config, IA3Config):
            config.feedforward_modules = config.target_modules
    own = models.adapter_tensors(model, adapter_name)
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in own.items()}
    return AdapterPart(config, tensors, metadata)


def _lacking(name: str, searched: list[nn.Module], what: str) -> ValueError:
    held = {name for model in searched for layer in models.tuner_layers(model) for name in adapters_of(layer)}
    return ValueError(f"{name} carries no {what}; it has {listed(sorted(held)) or 'none'}")


def write_adapter(folder: str | Path, adapter: AdapterPart, *, card: bool = True) -> None:
    """Write adapter_config.json, adapter_model.safetensors and, with `card`, README.md into `folder`.

    The folder is made where it is missing; other files in it stay. An adapter that is there is replaced, the
    tensors last. A README.md is replaced only if it was written here and nobody edited it since.

    Raises:
        ValueError: `read_adapter` would refuse what was to be written; nothing is written then.
        NotADirectoryError: `folder` is a file.
    """
    _write(Path(folder), adapter, adapter_files(adapter), card=card)


def _write(folder: Path, adapter: AdapterPart, files: dict[str, bytes], *, card: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{printable(folder)} is a file; give a folder to write the adapter into")
    readme = folder / names.CARD_NAME
    if card and readme.exists() and not is_ours(readme):
        logger.info("left %s as it is: it was edited, or not written by ether-diffusion", printable(readme))
    elif card:
        text = model_card(adapter, has_lora_export=(folder / names.EXPORT_NAME).exists())
        files = {names.CARD_NAME: text.encode(), **files}
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, files)


def adapter_files(adapter: AdapterPart) -> dict[str, bytes]:
    """Return the files of a part of an adapter: equal values give equal bytes."""
    where, config = "the adapter to be written", adapter.config
    header, values = metadata_header(adapter.metadata), methods.config_json(config)
    if methods.name_of(config) in methods.METHODS:  # not full fine-tuning, which only training reads
        if isinstance(config, EtherConfig):
            check_no_modules(config, where)
        methods.config_from(values, where)
        methods.check_layout(config, {name: tuple(t.shape) for name, t in adapter.tensors.items()}, where)
        methods.usable_values(config, adapter.tensors, where)
        check_size(header, where)
    stored = {f"{PEFT_PREFIX}{name}": adapter.tensors[name].contiguous() for name in sorted(adapter.tensors)}
    text = json.dumps(values, indent=2, sort_keys=True) + ("\n" if isinstance(config, EtherConfig) else "")
    return {names.CONFIG_NAME: text.encode(), names.TENSORS_NAME: safetensors_bytes(stored, header)}


def folder_files(adapter: Adapter) -> dict[str, bytes]:
    """Return the files of a folder that holds an adapter: its parts, its encoder, and a card."""
    files: dict[str, bytes] = {}
    for component, part in adapter.parts.items():
        prefix = "" if component == "unet" else f"{component}/"
        files |= {f"{prefix}{name}": data for name, data in adapter_files(part).items()}
    unet = adapter.parts.get("unet")
    if adapter.encoder is not None:
        from ether_diffusion.adapters.control_encoder import control_files  # of diffusers' models

        files |= control_files(adapter.encoder, None if unet is None else unet.tensors)
    if adapter.parts:
        files[names.CARD_NAME] = model_card(adapter.first, has_lora_export=False).encode()
    return files

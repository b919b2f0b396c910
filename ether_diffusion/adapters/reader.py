"""Reading an adapter: everything that can be checked without a model is checked here."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from ether_diffusion.adapters import tensor_file
from ether_diffusion.adapters.adapter import Adapter, AdapterMetadata, vector_names
from ether_diffusion.adapters.config_schema import MAX_CONFIG_BYTES, parse_config
from ether_diffusion.adapters.foreign import foreign_kind
from ether_diffusion.adapters.models import plain_name
from ether_diffusion.adapters.schema import parse_metadata
from ether_diffusion.adapters.source import CONFIG_NAME, PICKLE_NAME, TENSORS_NAME, Source, find_source
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.wording import listed, printable

LORA_NAME = "pytorch_lora_weights.safetensors"


def read_adapter(
    path_or_hub_id: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Adapter:
    """Read an adapter strictly, touching no model: PEFT's adapter_config.json and adapter_model.safetensors.

    Args:
        path_or_hub_id: a folder, or a model of the Hugging Face Hub; what exists on disk is taken from there.
        subfolder: of the text encoders' adapters, e.g. "text_encoder".
        revision: branch, tag or commit of the Hub model.
        local_files_only: do not ask the Hub, use what was downloaded before.

    Raises:
        FileNotFoundError: there is no such folder, model or file.
        ValueError: a file is not a whole, finite ETHER adapter; the message says what was found.
    """
    source = find_source(path_or_hub_id, revision=revision, local_files_only=local_files_only)
    adapter = read_from(source, subfolder)
    if adapter is None:
        refuse_missing(source, subfolder, CONFIG_NAME)
    return adapter


def read_from(source: Source, subfolder: str | None) -> Adapter | None:
    """Read the adapter in a subfolder of `source`; None where there is no adapter_config.json."""
    config_data = source.read(subfolder, CONFIG_NAME, MAX_CONFIG_BYTES)
    if config_data is None:
        return None
    place = printable("/".join(filter(None, (source.name, subfolder))), 300)
    config = parse_config(config_data, f"{place}/{CONFIG_NAME}")
    if config.modules_to_save:
        raise ValueError(
            f"{place} also carries whole modules (modules_to_save={listed(config.modules_to_save)}), which "
            "are not vectors of ETHER; use peft.PeftModel.from_pretrained"
        )
    data = source.read(subfolder, TENSORS_NAME, tensor_file.MAX_FILE_BYTES)
    if data is None:
        refuse_missing(source, subfolder, TENSORS_NAME)
    where = f"{place}/{TENSORS_NAME}"
    stored, header = tensor_file.parse_tensors(data, where)
    metadata = parse_metadata(header, where)
    tensors = {plain_name(name): tensor for name, tensor in stored.items()}
    if len(tensors) < len(stored):
        raise ValueError(f"{where} holds tensors of one projection under two names; save the adapter again")
    check_consistent(config, tensors, metadata, where)
    if tensors.keys() != stored.keys():
        # once saved from beneath another adapter; the hash of its base was taken over the wrong names
        metadata = replace(metadata, base_fingerprint=None)
    return Adapter(config, tensors, metadata)


def check_consistent(
    config: EtherConfig, tensors: Mapping[str, Tensor], metadata: AdapterMetadata, where: str
) -> None:
    """Check that the tensors are those that the configuration speaks of.

    Raises:
        ValueError: a vector is missing or not of this variant, or has another number of blocks.
    """
    needed = vector_names(config)
    modules: dict[str, set[str]] = {}
    for name in tensors:
        module, _, vector = name.rpartition(".")
        modules.setdefault(module, set()).add(vector)
    missing = [f"{m}.{vector}" for m, found in modules.items() for vector in needed if vector not in found]
    extra = [f"{m}.{vector}" for m, found in modules.items() for vector in found if vector not in needed]
    setting = f"variant={config.variant!r}, sides={config.sides!r}"
    if missing:
        raise ValueError(f"{where} lacks {listed(missing)}, which {setting} needs; fetch or save it again")
    if extra:
        raise ValueError(f"{where} also holds {listed(sorted(extra))}, which {setting} has no use for")
    _check_blocks(config, tensors, where)
    print_of_base = metadata.base_fingerprint
    if print_of_base is not None and len(print_of_base.norms) != len(modules):
        raise ValueError(
            f"{where} holds {len(modules)} projections and its header speaks of {len(print_of_base.norms)}; "
            "it is not whole, fetch or save it again"
        )


def _check_blocks(config: EtherConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        allowed = allowed_blocks(config, name.rpartition(".")[0])
        if len(tensor) not in allowed:
            needed = " or ".join(map(str, sorted(allowed)))
            raise ValueError(
                f"{where}: {name} has {len(tensor)} blocks and the configuration says {needed}; "
                "the two files do not belong together"
            )


def allowed_blocks(config: EtherConfig, module: str) -> set[int]:
    """Return how many blocks a module may have under `config`.

    A pattern with regex operators is never evaluated: from a stranger it may take forever. Its number of
    blocks is allowed everywhere instead, and the tensors say where it holds.
    """
    if all(is_plain(pattern) for pattern in config.num_blocks_pattern):
        named = {
            num_blocks
            for pattern, num_blocks in config.num_blocks_pattern.items()
            if f".{module}".endswith(f".{pattern}")
        }
        return named or {config.num_blocks}
    return {config.num_blocks, *config.num_blocks_pattern.values()}


def is_plain(pattern: str) -> bool:
    """Say whether a pattern is a dotted name rather than a regex."""
    return pattern.replace(".", "").replace("_", "").isalnum()


def refuse_missing(source: Source, subfolder: str | None, name: str) -> NoReturn:
    place = printable("/".join(filter(None, (source.name, subfolder))), 300)
    kind = recognise(source, subfolder)
    if kind is not None:
        raise ValueError(f"{place} holds no ETHER adapter: {kind}")
    if source.folder is None and source.local_files_only:
        raise FileNotFoundError(f"{name} of {place} has not been downloaded; allow access to the Hub")
    raise FileNotFoundError(
        f"{place} has no {name}; give the folder of an ETHER adapter, as save_ether writes it"
    )


def recognise(source: Source, subfolder: str | None) -> str | None:
    """Say what else there is in place of an ETHER adapter, and what to use; None if nothing known."""
    if source.holds(subfolder, PICKLE_NAME):
        return f"{PICKLE_NAME} is a pickle, which can run code and is not read; ask for {TENSORS_NAME}"
    if source.folder is None:
        return "this is a LoRA; use pipe.load_lora_weights" if source.holds(subfolder, LORA_NAME) else None
    for path in sorted((source.folder / (subfolder or "")).glob("*.safetensors"))[:8]:
        if path.is_file():
            kind = foreign_kind(tensor_file.read_shapes(path))
            if kind is not None:
                return kind
    return None

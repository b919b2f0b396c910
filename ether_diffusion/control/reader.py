"""Reading a control encoder from an adapter's folder, as strictly as the adapter beside it."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from ether_diffusion.adapters.source import Source, find_source
from ether_diffusion.adapters.tensor_file import MAX_FILE_BYTES, parse_exact_tensors
from ether_diffusion.control.encoder import ControlConfig, ControlEncoder
from ether_diffusion.strict_json import Json, is_whole, parse_json
from ether_diffusion.wording import listed, printable

CONTROL_CONFIG_NAME = "control_config.json"
ENCODER_NAME = "control_encoder.safetensors"
FORMAT_VERSION = 1
MAX_CONFIG_BYTES = 64 * 2**10

_SCHEMA: dict[str, tuple[str, Callable[[Json], bool]]] = {
    "format_version": ("a whole number from 1", lambda value: is_whole(value) and cast(int, value) >= 1),
    "conditioning_embedding_channels": ("a whole number", is_whole),
    "conditioning_channels": ("a whole number", is_whole),
    "block_out_channels": (
        "a list of whole numbers",
        lambda value: isinstance(value, list) and all(map(is_whole, value)),
    ),
    "control_type": ("text or null", lambda value: isinstance(value, str | None)),
    "adapter_sha256": (
        "64 hexadecimal digits or null",
        lambda value: value is None or (isinstance(value, str) and _is_sha256(value)),
    ),
}


def read_control(
    path_or_hub_id: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> ControlEncoder:
    """Read the control encoder of an adapter's folder or a model of the Hub, frozen, on the CPU.

    Raises:
        FileNotFoundError: there is no such folder, model or file.
        ValueError: a file is not a whole, finite encoder; the message says what was found.
    """
    source = find_source(path_or_hub_id, revision=revision, local_files_only=local_files_only)
    return read_control_from(source)[0]


def holds_control(path_or_hub_id: str | Path) -> bool:
    """Say whether a folder or a model of the Hub has a control encoder.

    Raises:
        FileNotFoundError: it is neither.
    """
    return find_source(path_or_hub_id, revision=None, local_files_only=False).holds(None, CONTROL_CONFIG_NAME)


def read_control_from(source: Source) -> tuple[ControlEncoder, str | None]:
    """Read an encoder, and the content hash of the adapter that was saved with it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not whole.
    """
    place = printable(source.name, 300)
    config_data = _needed(source, CONTROL_CONFIG_NAME, MAX_CONFIG_BYTES)
    config, adapter_sha256 = parse_control_config(config_data, f"{place}/{CONTROL_CONFIG_NAME}")
    data = _needed(source, ENCODER_NAME, MAX_FILE_BYTES)
    return parse_encoder(data, config, f"{place}/{ENCODER_NAME}"), adapter_sha256


def parse_control_config(data: bytes, where: str) -> tuple[ControlConfig, str | None]:
    """Return an encoder's form, and the hash of its adapter.

    Raises:
        ValueError: it is not of the closed schema, or a newer release made it.
    """
    found = parse_json(data, where)
    if not isinstance(found, dict):
        raise ValueError(f"{where} is not a JSON object; save the adapter again")
    version = found.get("format_version")
    if is_whole(version) and cast(int, version) > FORMAT_VERSION:
        raise ValueError(
            f"{where} was made by a newer release (format {version}; this one reads up to {FORMAT_VERSION}); "
            "upgrade ether-diffusion"
        )
    if found.keys() != _SCHEMA.keys():
        raise ValueError(
            f"{where} has other entries than expected ({listed(sorted(found.keys() ^ _SCHEMA.keys()))}); "
            "save the adapter again"
        )
    for name, (needed, is_valid) in _SCHEMA.items():
        if not is_valid(found[name]):
            raise ValueError(f"{where}: {name} is {printable(json.dumps(found[name]))}; it must be {needed}")
    form: dict[str, Any] = {
        name: value for name, value in found.items() if name not in ("format_version", "adapter_sha256")
    }
    try:
        config = ControlConfig(**form | {"block_out_channels": tuple(form["block_out_channels"])})
    except ValueError as error:
        raise ValueError(f"{where}: {printable(error, 400)}") from None
    return config, cast(str | None, found["adapter_sha256"])


def parse_encoder(data: bytes, config: ControlConfig, where: str) -> ControlEncoder:
    """Return the encoder of this form whose file has these bytes, frozen.

    Raises:
        ValueError: it is no safetensors file of exactly its tensors, or these are not finite.
    """
    with torch.device("meta"):
        encoder = ControlEncoder(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    tensors = parse_exact_tensors(data, where, shapes)
    encoder.load_state_dict(tensors, assign=True)
    return cast(ControlEncoder, encoder.requires_grad_(False).eval())


def control_config_bytes(config: ControlConfig, adapter_sha256: str | None) -> bytes:
    """Return control_config.json: the same configuration gives the same bytes."""
    values = asdict(config) | {"format_version": FORMAT_VERSION, "adapter_sha256": adapter_sha256}
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _needed(source: Source, name: str, max_bytes: int) -> bytes:
    data = source.read(None, name, max_bytes)
    if data is None:
        raise FileNotFoundError(
            f"{printable(source.name, 300)} has no {name}; give the folder of an adapter that follows a "
            "control image"
        )
    return data


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")

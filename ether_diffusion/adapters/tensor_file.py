"""adapter_model.safetensors: from strangers' bytes to checked tensors, and back to bytes."""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ether_diffusion.adapters.foreign import foreign_kind
from ether_diffusion.strict_json import Json, parse_json
from ether_diffusion.wording import listed, printable

MAX_FILE_BYTES = 64 * 2**20
"""An SD 1.5 adapter has 0.4 MB, ETHER+ on SDXL 12 MB. Assign a larger number to read larger files."""
MAX_HEADER_BYTES = 2**20
MAX_METADATA_BYTES = 64 * 2**10
MAX_TENSORS = 4096
SAFE_EXPONENT = 30
"""Blocks whose largest entry is within 2^-30 and 2^30 keep their norm."""

PEFT_PREFIX = "base_model.model."
KEY = re.compile(r"(?:[A-Za-z0-9_-]{1,64}\.){1,32}ether_(?:input|output)_[uv]")
FLOATS = ("F64", "F32", "F16", "BF16")
NOT_ONE = "{where} is not a safetensors adapter ({reason}); fetch or save it again"


def parse_tensors(data: bytes, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors in float32, by their name in the model, and the header's metadata.

    Raises:
        ValueError: anything but a whole, bounded safetensors file with ETHER vectors that can be normalised.
    """
    header = _parse_header(data, where)
    metadata = _metadata(header.pop("__metadata__", {}), where)
    _check_number(header, where)
    _check_entries(header, where)
    loaded = _load(data, where)
    tensors = {
        name.removeprefix(PEFT_PREFIX): _usable(loaded[name], printable(name), where)
        for name in sorted(loaded)
    }
    if len(tensors) < len(loaded):
        raise ValueError(
            f"{where} holds tensors both with and without the prefix {PEFT_PREFIX}; keep one set"
        )
    return tensors, metadata


def parse_layout(data: bytes, where: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes by name that a file speaks of, and the header's metadata; no tensor is read.

    Raises:
        ValueError: it is no bounded safetensors file.
    """
    header = _parse_header(data, where)
    metadata = _metadata(header.pop("__metadata__", {}), where)
    _check_number(header, where)
    return _shapes(header), metadata


def parse_exact_tensors(data: bytes, where: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return tensors in float32 of a file that holds exactly those of these names and shapes.

    Raises:
        ValueError: anything but a whole, bounded safetensors file of them, with finite numbers.
    """
    header = _parse_header(data, where)
    _metadata(header.pop("__metadata__", {}), where)
    if header.keys() != shapes.keys():
        missing, extra = sorted(shapes.keys() - header.keys()), sorted(header.keys() - shapes.keys())
        found = f"lacks {listed(missing)}" if missing else f"also holds {listed(extra)}"
        raise ValueError(f"{where} {found}; fetch or save it again")
    for name, found_shape in _shapes(header).items():
        _check_entry(name, header[name], where)
        if found_shape != shapes[name]:
            raise ValueError(
                f"{where}: {name} has shape {found_shape} and the configuration says {shapes[name]}; "
                "the two files do not belong together"
            )
    loaded = {name: tensor.float() for name, tensor in _load(data, where).items()}  # F64 may overflow
    damaged = [name for name, tensor in loaded.items() if not torch.isfinite(tensor).all()]
    if damaged:
        raise ValueError(
            f"{where}: {damaged[0]} holds NaN or infinite numbers; the training diverged, use another save"
        )
    return loaded


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the file of an adapter: the same values give the same bytes, whatever order they came in."""
    stored = {f"{PEFT_PREFIX}{name}": tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return safetensors_bytes(stored, metadata)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file of contiguous tensors on the CPU: the same values give the same bytes."""
    data: bytes = safetensors.torch.save(dict(tensors), dict(metadata))
    # safetensors writes the metadata in the order of a hash table, another one in every process
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes by name that a safetensors file of any kind speaks of, reading its header only."""
    with path.open("rb") as file:
        start = file.read(8)
        (length,) = struct.unpack("<Q", start.ljust(8, b"\0"))
        data = start + file.read(min(length, MAX_HEADER_BYTES))
    return _shapes(_parse_header(data, printable(path)))


def _parse_header(data: bytes, where: str) -> dict[str, Json]:
    if len(data) < 8:
        raise ValueError(NOT_ONE.format(where=where, reason=f"it has {len(data)} bytes"))
    (length,) = struct.unpack("<Q", data[:8])
    if data[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        reason = "it is a pickle or a zip file, which can run code, under another name"
        raise ValueError(NOT_ONE.format(where=where, reason=reason))
    if length > len(data) - 8:
        reason = f"it promises a header of {length} bytes and has {len(data) - 8}"
        raise ValueError(NOT_ONE.format(where=where, reason=reason))
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"{where} has a header of {length} bytes; an adapter's has at most {MAX_HEADER_BYTES}"
        )
    header = parse_json(data[8 : 8 + length], f"the header of {where}")
    if not isinstance(header, dict):
        raise ValueError(NOT_ONE.format(where=where, reason="its header is not an object"))
    return header


def _metadata(found: Json, where: str) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(NOT_ONE.format(where=where, reason="its metadata is not text by name"))
    metadata = cast(dict[str, str], found)
    size = sum(
        len(key.encode(errors="replace")) + len(value.encode(errors="replace"))
        for key, value in metadata.items()
    )
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"{where} has {size} bytes of metadata; an adapter has at most {MAX_METADATA_BYTES}")
    return metadata


def _check_number(header: Mapping[str, Json], where: str) -> None:
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{where} holds {len(header)} tensors; an adapter has at most {MAX_TENSORS}")


def _check_entries(header: Mapping[str, Json], where: str) -> None:
    shapes = _shapes(header)
    kind = foreign_kind(shapes)
    if kind is not None:
        raise ValueError(f"{where} is no ETHER adapter: {kind}")
    strange = [name for name in header if not KEY.fullmatch(name.removeprefix(PEFT_PREFIX))]
    if strange:
        raise ValueError(
            f"{where} holds tensors that are not ETHER's ({listed(strange)}); names look like "
            "down_blocks.0.….to_q.ether_input_u: save the adapter again, without other weights"
        )
    if not header:
        raise ValueError(f"{where} holds no tensors; save the adapter again")
    for name, entry in header.items():
        checked = _check_entry(name, entry, where)
        if len(shapes[name]) != 2 or min(shapes[name]) < 1:
            shape = printable(checked["shape"])
            raise ValueError(
                f"{where}: {name} has shape {shape}; it must be (num_blocks, width / num_blocks)"
            )


def _check_entry(name: str, entry: Json, where: str) -> dict[str, Json]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(NOT_ONE.format(where=where, reason=f"the entry of {name} is malformed"))
    if entry["dtype"] not in FLOATS:
        dtype = printable(entry["dtype"])
        raise ValueError(
            f"{where}: {name} has dtype {dtype}; vectors are floating point ({', '.join(FLOATS)})"
        )
    return entry


def _load(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        return cast(dict[str, Tensor], safetensors.torch.load(data))
    except (SafetensorError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(NOT_ONE.format(where=where, reason=printable(error))) from None


def _usable(tensor: Tensor, name: str, where: str) -> Tensor:
    """Return the vectors in float32; a block whose norm float32 could not square is scaled by a power of two.

    Only directions matter, and such a factor leaves them exactly as they are.
    """
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"{where}: {name} holds NaN or infinite numbers; the training diverged, use another save"
        )
    wide = tensor.double()
    largest = wide.abs().amax(dim=1, keepdim=True)
    is_zero = largest < torch.finfo(torch.float64).tiny
    if is_zero.any():
        block = int(is_zero.flatten().nonzero()[0])
        raise ValueError(f"{where}: block {block} of {name} is zero and has no direction; use another save")
    exponent = torch.frexp(largest).exponent
    fits = (exponent > -SAFE_EXPONENT) & (exponent < SAFE_EXPONENT)
    return (wide * 2.0 ** torch.where(fits, 0, -exponent).double()).float()


def _shapes(header: Mapping[str, Json]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(_whole_numbers(entry.get("shape")) if isinstance(entry, dict) else ())
        for name, entry in header.items()
    }


def _whole_numbers(found: Json) -> list[int]:
    if not isinstance(found, list):
        return []
    return [number for number in found if isinstance(number, int) and not isinstance(number, bool)]

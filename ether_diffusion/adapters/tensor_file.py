"""Files of tensors: from strangers' bytes to checked tensors, and back to bytes that are always the same."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, cast

import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from ether_diffusion.strict_json import Json, StrictModel, parse_json, validate
from ether_diffusion.wording import printable

Shape = tuple[int, ...]

MAX_FILE_BYTES = 64 * 2**20
"""An SD 1.5 adapter has 0.4 MB, ETHER+ on SDXL 12 MB. Assign a larger number to read larger files."""
MAX_HEADER_BYTES, MAX_METADATA_BYTES, MAX_TENSORS = 2**20, 64 * 2**10, 4096
PEFT_PREFIX = "base_model.model."
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class _Entry(StrictModel):
    dtype: Literal["F64", "F32", "F16", "BF16"]
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: Annotated[list[int], Field(min_length=2, max_length=2)]


def finite(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return tensors, and refuse those that hold a number that is not finite."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {name} holds NaN or infinite numbers; use another save")
    return tensors


def open_tensors(data: bytes, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the floating-point tensors of a file as they are stored, and its metadata."""
    header = _parse_header(data, where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _no_file(where, "its metadata is not text by name")
    check_size(cast(dict[str, str], metadata), where)
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{where} holds {len(header)} tensors; an adapter has at most {MAX_TENSORS}")
    validate(header, dict[str, _Entry], where)
    try:
        found = dict(sorted(safetensors.torch.load(data).items()))
        return found, cast(dict[str, str], metadata)
    except (SafetensorError, ValueError, OverflowError, RuntimeError) as error:
        raise _no_file(where, printable(error)) from None


def read_names(path: Path) -> list[str]:
    """Return the names of the tensors of a safetensors file of any kind, reading its header only."""
    with path.open("rb") as file:
        start = file.read(8)
        (length,) = struct.unpack("<Q", start.ljust(8, b"\0"))
        return list(_parse_header(start + file.read(min(length, MAX_HEADER_BYTES)), printable(path)))


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


def check_size(metadata: Mapping[str, str], where: str) -> None:
    """Refuse more metadata than an adapter has."""
    size = sum(len(text.encode(errors="replace")) for pair in metadata.items() for text in pair)
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"{where} has {size} bytes of metadata; an adapter has at most {MAX_METADATA_BYTES}")


def _parse_header(data: bytes, where: str) -> dict[str, Json]:
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if data.startswith(_PICKLES) and data[8:9] != b"{":  # the length of a header may begin so, too
        raise _no_file(where, "it is a pickle or a zip file, which can run code, under another name")
    if len(data) < 8 or length > len(data) - 8:
        raise _no_file(where, f"it has {len(data)} bytes and promises a header of {length}")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{where} has a header of {length} bytes; it may have {MAX_HEADER_BYTES}")
    header = parse_json(data[8 : 8 + length], f"the header of {where}")
    if not isinstance(header, dict):
        raise _no_file(where, "its header is not an object")
    return header


def _no_file(where: str, reason: str) -> ValueError:
    return ValueError(f"{where} is not a safetensors adapter ({reason}); fetch or save it again")

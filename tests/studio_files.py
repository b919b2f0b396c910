"""Files that visitors of the studio send: zips made byte by byte, adapters of the embedded base."""

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from control_encoders import random_encoder

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import read_adapter, save_ether
from ether_diffusion.bases import open_base
from ether_diffusion.control import save_control
from ether_diffusion.ui.studio import Studio


@dataclass(frozen=True)
class Entry:
    """An entry of a zip as its author claims it to be, true or not."""

    name: str
    data: bytes = b"hello"
    mode: int = 0o100644
    flags: int = 0
    method: int = 0
    claimed_size: int | None = None
    packed: bytes | None = None


def raw_zip(entries: Sequence[Entry], *, num_claimed: int | None = None) -> bytes:
    """Return a zip by its specification (APPNOTE 6.3), with whatever it is told."""
    body, listing = b"", b""
    for entry in entries:
        name, packed = entry.name.encode(), entry.data if entry.packed is None else entry.packed
        size = len(entry.data) if entry.claimed_size is None else entry.claimed_size
        facts = struct.pack(
            "<5H3L2H", 20, 0x800 | entry.flags, entry.method, 0, 33, zlib.crc32(entry.data), len(packed),
            size, len(name), 0,
        )  # fmt: skip
        place = len(body)
        body += b"PK\x03\x04" + facts + name + packed
        listing += b"PK\x01\x02" + struct.pack("<H", 0x0314) + facts
        listing += struct.pack("<3H2L", 0, 0, 0, entry.mode << 16, place) + name
    count = len(entries) if num_claimed is None else num_claimed
    end = struct.pack("<4H2LH", 0, 0, count, count, len(listing), len(body), 0)
    return body + listing + b"PK\x05\x06" + end


def plain_zip(files: dict[str, bytes]) -> bytes:
    """Return a zip as everybody writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def save_tiny_world_adapter(folder: Path, *, seed: int = 0) -> Path:
    """Save an adapter of the embedded base as training leaves it; other seeds give others."""
    unet = open_base("tiny_world").load_denoiser()
    torch.manual_seed(seed)
    unet.add_adapter(replace(EtherConfig(variant="ether_plus", init_weights=False)))
    save_ether(
        unet, folder, trigger="a sks animal", base_model="tiny_world", training={"steps": 200, "seed": 0}
    )
    return folder


def furnish(folder: Path) -> dict[str, str]:
    """Give a studio Fox, a subject, Classes, an adapter that follows maps, and Shapes, an encoder alone.

    None was ever trained. Return their ids by their names.
    """
    saved, base = folder.parent / "saved", open_base("tiny_world")
    unet, factor = base.load_denoiser(), base.vae_scale_factor
    save_tiny_world_adapter(saved / "Fox")
    other = read_adapter(save_tiny_world_adapter(saved / "other", seed=1)).first
    classes = random_encoder(unet, factor=factor, control_type="palette")
    save_control(saved / "Classes", classes, adapter=other)
    save_control(saved / "Shapes", random_encoder(unet, factor=factor, control_type="silhouette"))
    library = Studio(folder, base="tiny_world").library
    return {name: library.add_run_result(saved / name, name).id for name in ("Fox", "Classes", "Shapes")}

"""Photo files made by hand: encoded pictures, raw PNG chunks, ICC profiles of known colours."""

import io
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.uint8]
Floats = NDArray[np.float64]

SRGB_TO_XYZ = np.array(  # the D50 matrix of the ICC's own sRGB profile
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
ADOBE_RGB_TO_XYZ = np.array(  # Adobe RGB (1998) Color Image Encoding, 4.3.5.3, adapted to D50
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
D50 = np.array([0.9642, 1.0, 0.8249])


def noise(width: int = 80, height: int = 70, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(picture: Image.Image | Array, kind: str, **options: object) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(seed: int = 0, kind: str = "PNG") -> bytes:
    return encode(noise(seed=seed), kind)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(size: tuple[int, int], depth: int, colour_type: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG whose rows, without their filter bytes, are given as the file stores them."""
    stride = len(rows) // size[1]
    filtered = b"".join(b"\0" + rows[start : start + stride] for start in range(0, len(rows), max(stride, 1)))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(filtered)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body


def gray_tiff(size: tuple[int, int], bits: int, photometric: int, rows: bytes) -> bytes:
    """A little-endian TIFF of one strip; `photometric` 0 says that zero is white, 1 that it is black."""
    tags = {256: size[0], 257: size[1], 258: bits, 259: 1, 262: photometric, 277: 1, 278: size[1]}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    entries += struct.pack("<HHII", 279, 4, 1, len(rows))
    place = struct.pack("<HHII", 273, 4, 1, 8 + 2 + 12 * 9 + 4)
    entries = entries[: 12 * 5] + place + entries[12 * 5 :]
    return b"II*\0" + struct.pack("<IH", 8, 9) + entries + bytes(4) + rows


def without_adobe_mark(jpeg: bytes) -> bytes:
    start = jpeg.index(b"\xff\xee")
    return jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big") :]


def adobe_rgb_profile() -> bytes:
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.19921875 * 256))
    tags = {
        name: _xyz(column)
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), ADOBE_RGB_TO_XYZ.T, strict=True)
    }
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def ink_profile(ink_lab: Mapping[tuple[int, ...], tuple[int, int, int]]) -> bytes:
    """A CMYK profile that knows full or no ink only: Lab of some corners, black where nothing is said."""
    corners = [tuple(int(bit) for bit in f"{index:04b}") for index in range(16)]
    lab = [ink_lab.get(corner, (0, 0, 0)) for corner in corners]
    table = bytes(value for L, a, b in lab for value in (round(L * 2.55), a + 128, b + 128))
    identity = struct.pack(">9i", *(np.eye(3).flatten() * 65536).astype(int))
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + ramp * 4 + table + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"wtpt": _xyz(D50), **tags}
    start = 128 + 4 + 12 * len(tags)
    directory, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        directory += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = bytes(8) + struct.pack(">I", 0x02400000) + kind + space + connection
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _xyz(D50)[8:]
    header = struct.pack(">I", start + len(body)) + header.ljust(128, b"\0")[4:]
    return header + directory + body


def _xyz(values: Floats) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def adobe_rgb_to_srgb(pixels: Array) -> Floats:
    return xyz_to_srgb((pixels / 255) ** 2.19921875 @ ADOBE_RGB_TO_XYZ.T)


def lab_to_srgb(lab: tuple[int, int, int]) -> Floats:
    """CIE 15:2004, 8.2.1, backwards."""
    y = (lab[0] + 16) / 116
    f = np.array([y + lab[1] / 500, y, y - lab[2] / 200])
    return xyz_to_srgb(np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2) * D50)


def xyz_to_srgb(xyz: Floats) -> Floats:
    """IEC 61966-2-1, on [0, 255]."""
    linear = np.clip(xyz @ np.linalg.inv(SRGB_TO_XYZ).T, 0, 1)
    encoded: Floats = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return encoded * 255


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """What lies on disk: mode, time of change and bytes or link target of everything below a folder."""
    found: dict[str, tuple[int, int, bytes]] = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        content = b""
        if path.is_symlink():
            content = os.fsencode(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
        found[str(path)] = (status.st_mode, status.st_mtime_ns, content)
    return found

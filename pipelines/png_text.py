"""Text chunks of PNGs from strangers: found by walking the chunks, without decoding a pixel."""

import io
import zlib
from pathlib import Path
from typing import BinaryIO

MAX_TEXT_BYTES = 1 << 18
MAX_CHUNKS = 1 << 12

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_png_text(picture: Path | bytes, keyword: str, where: str) -> str | None:
    """Return the tEXt chunk of a keyword that stands before the pixels; None where there is none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no PNG, or the chunk is given twice, compressed, too large, damaged or not ASCII.
    """
    if isinstance(picture, bytes):
        return _walk(io.BytesIO(picture), len(picture), keyword.encode(), where)
    if not picture.exists():
        raise FileNotFoundError(f"there is no file {where}")
    if not picture.is_file():
        raise ValueError(f"{where} is not a regular file; give a PNG")
    with picture.open("rb") as file:
        return _walk(file, picture.stat().st_size, keyword.encode(), where)


def _walk(file: BinaryIO, size: int, keyword: bytes, where: str) -> str | None:
    if file.read(8) != _SIGNATURE:
        raise ValueError(f"{where} is not a PNG; metadata is read from PNGs only")
    found: str | None = None
    for _ in range(MAX_CHUNKS):
        header = file.read(8)
        if len(header) < 8:
            raise ValueError(f"{where} ends before its pixels; the file is damaged")
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        if kind in (b"IDAT", b"IEND"):
            return found
        start = file.tell()
        if start + length + 4 > size:
            raise ValueError(f"{where} has a chunk longer than the file; the file is damaged")
        if kind in (b"tEXt", b"zTXt", b"iTXt") and file.read(len(keyword) + 1) == keyword + b"\0":
            if found is not None:
                raise ValueError(f"{where} carries {keyword.decode()} twice; it is not read")
            file.seek(start)
            found = _text(file, kind, length, keyword, where)
        file.seek(start + length + 4)
    raise ValueError(f"{where} has over {MAX_CHUNKS} chunks before its pixels; it is not read")


def _text(file: BinaryIO, kind: bytes, length: int, keyword: bytes, where: str) -> str:
    if kind != b"tEXt":
        raise ValueError(f"{where} carries {keyword.decode()} as {kind.decode()}, not tEXt; it is not read")
    if length > MAX_TEXT_BYTES:
        raise ValueError(f"{where} carries {length} bytes of metadata; at most {MAX_TEXT_BYTES} are read")
    data, checksum = file.read(length), file.read(4)
    if zlib.crc32(kind + data).to_bytes(4, "big") != checksum:
        raise ValueError(f"the metadata of {where} does not match its checksum; the file is damaged")
    try:
        return data[len(keyword) + 1 :].decode("ascii")
    except UnicodeDecodeError:
        raise ValueError(f"the metadata of {where} is not ASCII; the file is damaged") from None

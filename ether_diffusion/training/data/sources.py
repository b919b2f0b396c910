"""Where a photo's bytes come from: a file of a folder, or a row of a data set."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ether_diffusion.training.decoding import MAX_BYTES
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, read_plain_file
from ether_diffusion.wording import printable


class Source(Protocol):
    """What can be read again and again, in any process."""

    def read(self) -> bytes:
        """Return the file's bytes.

        Raises:
            UnusableFileError: they cannot be had.
        """
        ...


@dataclass(frozen=True)
class FileSource:
    """A file; links are followed to places within `inside`, and anywhere where it is None."""

    path: Path
    inside: Path | None

    def read(self) -> bytes:
        """Return the file's bytes."""
        return read_plain_file(self.path, inside=self.inside, max_bytes=MAX_BYTES)


class Rows(Protocol):
    """What is used of a `datasets.Dataset`."""

    def __getitem__(self, index: int) -> Mapping[str, object]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class RowSource:
    """An image of a data set, which holds its bytes or the path of a file."""

    rows: Rows
    index: int
    column: str
    inside: Path | None

    def read(self) -> bytes:
        """Return the image's bytes, undecoded."""
        image = self.rows[self.index][self.column]
        if not isinstance(image, Mapping):
            raise UnusableFileError("holds no image; delete the row")
        data, path = image.get("bytes"), image.get("path")
        if isinstance(data, bytes):
            if len(data) > MAX_BYTES:
                raise UnusableFileError(f"has more than {MAX_BYTES / 2**20:g} MiB; give a smaller file")
            return data
        if not isinstance(path, str):
            raise UnusableFileError("holds neither bytes nor a path; delete the row")
        return FileSource(Path(path), self.inside).read()


def read_again(source: Source, name: str, sha256: str) -> bytes:
    """Return the same bytes that were checked before.

    Raises:
        ValueError: they are gone, or others now.
    """
    shown = printable(name, NAME_LIMIT)
    try:
        data = source.read()
    except UnusableFileError as reason:
        raise ValueError(f"{shown} {reason}; put it back and resume, or train with cache_latents") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{shown} is not the file any more that was checked; put that back and resume")
    return data

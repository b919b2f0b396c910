"""Small files that the studio keeps beside adapters, pictures and runs, and what tells that files changed."""

from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Self

from ether_diffusion.durable_files import write_files
from ether_diffusion.strict_json import StrictModel, read_json
from ether_diffusion.training.plain_files import read_plain_file

MAX_BYTES = 64 * 2**20
Stamp = tuple[tuple[Path, int, int], ...]


class Facts(StrictModel):
    """Facts that are the file `name` of a folder."""

    name_of_file: ClassVar[str]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the file; a ValueError says that it is not there, or what is wrong with it."""
        data = read_plain_file(folder / cls.name_of_file, inside=folder, max_bytes=MAX_BYTES)
        return read_json(data, cls, cls.name_of_file)

    @classmethod
    def find(cls, folder: Path) -> Self | None:
        """Read the file; None where it is not there or damaged."""
        with suppress(ValueError):
            return cls.read(folder)
        return None

    def write(self, folder: Path) -> None:
        """Write the file, whole or not at all."""
        write_files(folder, {self.name_of_file: self.data()})

    def data(self) -> bytes:
        """Return what the file holds."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def stamp_of(folder: Path) -> Stamp:
    """Return what changes when a file in a folder does."""
    found = [(path, path.stat()) for path in sorted(folder.rglob("*"))]
    return tuple((path, status.st_mtime_ns, status.st_size) for path, status in found)

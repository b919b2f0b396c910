"""Everything that was drawn in a folder, found in the files themselves: there is no index to go stale."""

import os
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ether_diffusion.pipelines.metadata import read_image_metadata
from ether_diffusion.ui.errors import disk_explained
from ether_diffusion.ui.events import SavedPicture
from ether_diffusion.ui.outputs import BASE_SUFFIX, ID

_DEPTH = 3
"""Folders below outputs: day, grid, pictures."""


class History:
    """The pictures below a folder whose names are ids of ours; whatever else lies there is left alone.

    Each file is read once, and again when it has changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[tuple[Path, int, int], SavedPicture] = {}
        self._lock = threading.Lock()

    def pictures(self, *, text: str = "", adapter: str = "", with_base: bool = True) -> list[SavedPicture]:
        """Return the pictures for which all of it holds, the newest first, each seed's own before the base's.

        All words of `text` stand in the prompts, in any case and order; `adapter` was in force, by name;
        `with_base` leaves in those that were drawn by the base beside others.
        """
        words = text.casefold().split()

        def is_found(picture: SavedPicture) -> bool:
            if not with_base and picture.id.endswith(BASE_SUFFIX):
                return False
            if picture.metadata is None:
                return not words and not adapter
            said = picture.metadata
            prompt = f"{said.prompt or ''} {said.negative_prompt or ''}".casefold()
            names = {use.name for use in said.adapters}
            return all(word in prompt for word in words) and (not adapter or adapter in names)

        return [picture for picture in self._all() if is_found(picture)]

    def picture(self, picture_id: str) -> SavedPicture:
        """Return the picture of an id.

        Raises:
            FileNotFoundError: there is none, or no longer.
        """
        found = next((picture for picture in self._all() if picture.id == picture_id), None)
        if found is None:
            raise FileNotFoundError(
                "this picture is no longer there: it was deleted meanwhile; refresh the page"
            )
        return found

    def adapters(self) -> list[str]:
        """Return the names of all adapters that pictures were drawn with, sorted."""
        said = [picture.metadata for picture in self._all()]
        return sorted({use.name for each in said if each is not None for use in each.adapters})

    def write_zip(self, pictures: Sequence[SavedPicture], target: Path) -> Path:
        """Write pictures into one zip, by day; those deleted meanwhile are left out.

        Raises:
            ValueError: there is none, or the disk is full.
        """
        aside = target.with_name(f".{target.name}.part")
        with disk_explained(target.parent, "writing the zip"):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as file:  # PNGs are compressed already
                    for picture in pictures:
                        with suppress(FileNotFoundError):
                            data = picture.path.read_bytes()
                            info = zipfile.ZipInfo(picture.path.relative_to(self.folder).as_posix())
                            info.external_attr = 0o644 << 16
                            file.writestr(info, data)
                    if not file.namelist():
                        raise ValueError("there is no picture to download; draw some, or widen the search")
                aside.replace(target)
            finally:
                aside.unlink(missing_ok=True)
        return target

    def _all(self) -> list[SavedPicture]:
        with self._lock:
            self._known = {key: self._known.get(key) or _read(key[0]) for key in _files(self.folder, _DEPTH)}
            pictures = list(self._known.values())
        return sorted(pictures, key=_order, reverse=True)


def _files(folder: Path, depth: int) -> Iterator[tuple[Path, int, int]]:
    """Yield the regular files of ours below a folder, with what changes when they do; links lead nowhere."""
    with suppress(OSError):  # deleted while we look, or not ours to read
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False) and depth > 0:
                yield from _files(Path(entry.path), depth - 1)
            elif entry.name.endswith(".png") and ID.fullmatch(entry.name[:-4]):
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if entry.is_file(follow_symlinks=False):
                        yield Path(entry.path), status.st_mtime_ns, status.st_size


def _read(path: Path) -> SavedPicture:
    metadata = None
    with suppress(OSError, ValueError):  # changed by hand; the picture may still be looked at
        metadata = read_image_metadata(path)
    return SavedPicture(path.stem, path, metadata)


def _order(picture: SavedPicture) -> tuple[str, bool]:
    return picture.id.removesuffix(BASE_SUFFIX), not picture.id.endswith(BASE_SUFFIX)

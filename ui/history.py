"""Everything that was drawn in a folder, found in the files themselves: there is no index to go stale."""

import os
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.pipelines.metadata import ImageMetadata, read_image_metadata
from ether_diffusion.ui.errors import disk_explained
from ether_diffusion.ui.events import SavedPicture
from ether_diffusion.ui.outputs import BASE_SUFFIX, ID

_GONE = "this picture is no longer there: it was deleted meanwhile; refresh the page"
_DEPTH = 3
"""Folders below outputs: day, grid, pictures."""


@dataclass(frozen=True)
class Search:
    """What to look for: all of it must hold.

    Attributes:
        text: all of its words stand in the prompt, in any case and order.
        adapter: name of an adapter in force; "" is any.
        with_base: also the pictures that were drawn by the base beside others.
    """

    text: str = ""
    adapter: str = ""
    seed: int | None = None
    with_base: bool = True

    def finds(self, picture: SavedPicture) -> bool:
        """Say whether a picture is what is looked for."""
        if not self.with_base and picture.id.endswith(BASE_SUFFIX):
            return False
        said = picture.metadata
        if said is None:
            return not (self.text.strip() or self.adapter) and self.seed is None
        prompt = f"{said.prompt or ''} {said.negative_prompt or ''}".casefold()
        return (
            all(word in prompt for word in self.text.casefold().split())
            and (not self.adapter or self.adapter in {use.name for use in said.adapters})
            and (self.seed is None or self.seed == said.seed)
        )


class History:
    """The pictures below a folder whose names are ids of ours; whatever else lies there is left alone.

    Each file is read once, and again when it has changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, tuple[tuple[int, int], SavedPicture]] = {}
        self._lock = threading.Lock()

    def pictures(self, search: Search = Search()) -> list[SavedPicture]:
        """Return the pictures that a search finds, the newest first, each seed's own before the base's."""
        return [picture for picture in self._all() if search.finds(picture)]

    def picture(self, picture_id: str) -> SavedPicture:
        """Return the picture of an id.

        Raises:
            FileNotFoundError: there is none, or no longer.
        """
        found = [picture for picture in self._all() if picture.id == picture_id]
        if not found:
            raise FileNotFoundError(_GONE)
        return found[0]

    def adapters(self) -> list[str]:
        """Return the names of all adapters that pictures were drawn with, sorted."""
        said = [picture.metadata for picture in self._all()]
        return sorted({use.name for each in said if each is not None for use in each.adapters})

    def delete(self, picture_id: str) -> None:
        """Delete a picture.

        Raises:
            FileNotFoundError: there is none, or no longer.
            ValueError: the folder cannot be written to.
        """
        picture = self.picture(picture_id)
        with disk_explained(self.folder, "deleting the picture"):
            picture.path.unlink(missing_ok=True)

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
                        _add(file, picture, self.folder)
                    if not file.namelist():
                        raise ValueError("there is no picture to download; draw some, or widen the search")
                aside.replace(target)
            finally:
                aside.unlink(missing_ok=True)
        return target

    def _all(self) -> list[SavedPicture]:
        with self._lock:
            found = {path: self._read(path, stamp) for path, stamp in _files(self.folder, _DEPTH)}
            self._known = found
            pictures = [picture for _, picture in found.values()]
        return sorted(pictures, key=_order, reverse=True)

    def _read(self, path: Path, stamp: tuple[int, int]) -> tuple[tuple[int, int], SavedPicture]:
        known = self._known.get(path)
        if known is not None and known[0] == stamp:
            return known
        return stamp, SavedPicture(path.stem, path, _metadata(path))


def _files(folder: Path, depth: int) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Yield the regular files of ours below a folder, with what changes when they do; links lead nowhere."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # deleted while we look, or not ours to read
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and depth > 0:
            yield from _files(Path(entry.path), depth - 1)
        elif entry.name.endswith(".png") and ID.fullmatch(entry.name[:-4]):
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if entry.is_file(follow_symlinks=False):
                yield Path(entry.path), (status.st_mtime_ns, status.st_size)


def _metadata(path: Path) -> ImageMetadata | None:
    try:
        return read_image_metadata(path)
    except (OSError, ValueError):  # changed by hand; the picture may still be looked at
        return None


def _order(picture: SavedPicture) -> tuple[str, bool]:
    is_base = picture.id.endswith(BASE_SUFFIX)
    return picture.id.removesuffix(BASE_SUFFIX), not is_base


def _add(file: zipfile.ZipFile, picture: SavedPicture, folder: Path) -> None:
    try:
        data = picture.path.read_bytes()
    except FileNotFoundError:
        return
    info = zipfile.ZipInfo(picture.path.relative_to(folder).as_posix())
    info.external_attr = 0o644 << 16
    file.writestr(info, data)

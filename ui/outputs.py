"""The folder of pictures: files under names of ours, by day, found again in the files themselves."""

import io
import os
import re
import secrets
import threading
import zipfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from PIL import Image
from pydantic import Field

from ether_diffusion.control import control_image_sha256
from ether_diffusion.control.images import as_picture
from ether_diffusion.durable_files import write_files
from ether_diffusion.pipelines.metadata import read_image_metadata
from ether_diffusion.pipelines.sampling import Picture
from ether_diffusion.training.plain_files import read_plain_file
from ether_diffusion.training.run_lock import guarded
from ether_diffusion.ui.facts import Facts
from ether_diffusion.ui.jobs import BASE_SUFFIX, SavedPicture
from ether_diffusion.ui.words import check_name, disk_explained

_FILE = re.compile(r"\d{8}-\d{9}-[0-9a-f]{6}(-i\d{2}|-i\d{2}-base|-c\d{3})\.png")
"""A picture by its id: its job (date, time to the millisecond, six random digits), then the image or cell."""
CONTROL_FOLDER, MAX_CONTROL_BYTES = "control-images", 64 * 2**20
STARRED, MAX_BOARDS = "Starred", 200
_DEPTH = 3  # folders below outputs: day, grid, pictures


class Boards(Facts):
    """Which pictures are on which board, by their ids."""

    name_of_file = "boards.json"
    boards: dict[str, list[str]] = Field(default_factory=dict)


class Outputs:
    """Pictures as <day>/<id>.png, and of grids <day>/<job>/pictures/<id>.png; other files are left alone.

    Each file is read once, and again when it has changed: there is no index to go stale.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[tuple[Path, int, int], SavedPicture] = {}
        self._lock = threading.Lock()

    def new_job(self) -> tuple[str, Path]:
        """Return the first part of the ids of a job's pictures, which sorts by time, and its day's folder."""
        now = datetime.now()
        job = f"{now:%Y%m%d-%H%M%S}{now.microsecond // 1000:03d}-{secrets.token_hex(3)}"
        return job, self.folder / f"{now:%Y-%m-%d}"

    def save(self, picture: Picture, folder: Path, picture_id: str, *, keep_metadata: bool) -> SavedPicture:
        """Write a picture as a PNG, which says how it was made unless that is not wanted."""
        data = picture.png() if keep_metadata else plain_png(picture.image)
        path = self.write(folder, f"{picture_id}.png", data)
        return SavedPicture(picture_id, path, picture.metadata if keep_metadata else None)

    def write(self, folder: Path, name: str, data: bytes) -> Path:
        """Write a file whole or not at all, and return its path."""
        with disk_explained(self.folder, "saving a picture"):
            folder.mkdir(parents=True, exist_ok=True)
            write_files(folder, {name: data})
        return folder / name

    def keep_control(self, image: Image.Image) -> Path:
        """Keep a control image under the hash that pictures name it by, and return where it lies."""
        picture = as_picture(image)
        path = self.folder / CONTROL_FOLDER / f"{control_image_sha256(picture)}.png"
        return path if path.exists() else self.write(path.parent, path.name, plain_png(picture))

    def find_control(self, sha256: str) -> Image.Image | None:
        """Return the control image of a hash; None where it was never kept, or is another by now."""
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            return None
        folder = self.folder / CONTROL_FOLDER
        with suppress(OSError, ValueError, Image.DecompressionBombError):
            data = read_plain_file(folder / f"{sha256}.png", inside=folder, max_bytes=MAX_CONTROL_BYTES)
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                picture = image.convert("RGB")
            return picture if control_image_sha256(picture) == sha256 else None
        return None

    def pictures(
        self, *, text: str = "", adapter: str = "", with_base: bool = True, board: str = ""
    ) -> list[SavedPicture]:
        """Return the pictures for which all of it holds, the newest first, each seed's own before the base's.

        All words of `text` stand in the prompts; `adapter` was in force, by name; they are on a `board`.
        """
        words, on_board = text.casefold().split(), set(self.boards().get(board, ()))

        def is_found(picture: SavedPicture) -> bool:
            said = picture.metadata
            if picture.id not in on_board if board else picture.is_base and not with_base:
                return False
            if said is None:
                return not words and not adapter
            prompt = f"{said.prompt or ''} {said.negative_prompt or ''}".casefold()
            is_used = not adapter or adapter in {use.name for use in said.adapters}
            return is_used and all(word in prompt for word in words)

        def order(picture: SavedPicture) -> tuple[str, bool]:
            return picture.id.removesuffix(BASE_SUFFIX), not picture.is_base

        with self._lock:
            self._known = {key: self._known.get(key) or _read(key[0]) for key in _files(self.folder, _DEPTH)}
            return sorted(filter(is_found, self._known.values()), key=order, reverse=True)

    def picture(self, picture_id: str) -> SavedPicture:
        """Return the picture of an id."""
        found = next((picture for picture in self.pictures() if picture.id == picture_id), None)
        if found is None:
            raise FileNotFoundError("this picture is no longer there: it was deleted; refresh the page")
        return found

    def delete(self, ids: Collection[str]) -> None:
        """Delete the files of pictures, and take them off every board."""
        with disk_explained(self.folder, "deleting the picture"):
            for picture in self.pictures():
                if picture.id in ids:
                    picture.path.unlink(missing_ok=True)
        for board, there in self.boards().items():
            if not there.isdisjoint(ids):
                self.put(board, ids, is_on=False)

    def boards(self) -> dict[str, set[str]]:
        """Return the ids on each board, by its name; a file that cannot be read is as if none was there."""
        found = Boards.find(self.folder) or Boards()
        return {name: set(ids) for name, ids in sorted(found.boards.items())}

    def is_starred(self, picture_id: str) -> bool:
        """Whether a picture is on the board of stars."""
        return picture_id in self.boards().get(STARRED, ())

    def put(self, board: str, ids: Collection[str], *, is_on: bool = True) -> None:
        """Put pictures on a board, which is made where there is none, or take them off; an empty one goes."""
        board = check_name(board)
        with disk_explained(self.folder, "keeping the board"), guarded(self.folder):
            known = Boards.read(self.folder) if (self.folder / Boards.name_of_file).exists() else Boards()
            there = {*known.boards.get(board, ())}
            boards = known.boards | {board: sorted(there | {*ids} if is_on else there - {*ids})}
            if len(boards) > MAX_BOARDS:
                raise ValueError(f"there are {MAX_BOARDS} boards already; empty one first")
            Boards(boards={name: on for name, on in boards.items() if on}).write(self.folder)

    def adapters(self) -> list[str]:
        """Return the names of all adapters that pictures were drawn with, sorted."""
        said = [picture.metadata for picture in self.pictures()]
        return sorted({use.name for each in said if each is not None for use in each.adapters})

    def write_zip(self, pictures: Sequence[SavedPicture], target: Path) -> Path:
        """Write pictures into one zip, by day; those deleted meanwhile are left out."""
        with disk_explained(target.parent, "writing the zip"):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as file:  # PNGs are compressed already
                    for picture in pictures:
                        with suppress(FileNotFoundError):
                            data = picture.path.read_bytes()
                            info = zipfile.ZipInfo(picture.path.relative_to(self.folder).as_posix())
                            info.external_attr = 0o644 << 16
                            file.writestr(info, data)
                    if not file.namelist():
                        raise ValueError("there is no picture to download; draw some, or widen the search")
            except BaseException:
                target.unlink(missing_ok=True)
                raise
        return target


def plain_png(image: Image.Image) -> bytes:
    """Return a picture as a PNG that says nothing of how it was made."""
    bare, buffer = Image.frombytes(image.mode, image.size, image.tobytes()), io.BytesIO()
    bare.save(buffer, format="PNG")
    return buffer.getvalue()


def _files(folder: Path, depth: int) -> Iterator[tuple[Path, int, int]]:
    """Yield the regular files of ours below a folder, with what changes when they do; links lead nowhere."""
    with suppress(OSError):  # deleted while we look, or not ours to read
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False) and depth > 0:
                yield from _files(Path(entry.path), depth - 1)
            elif _FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    yield Path(entry.path), status.st_mtime_ns, status.st_size


def _read(path: Path) -> SavedPicture:
    metadata = None
    with suppress(OSError, ValueError):  # changed by hand; the picture may still be looked at
        metadata = read_image_metadata(path)
    return SavedPicture(path.stem, path, metadata)

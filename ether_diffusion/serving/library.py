"""The adapters of a server: folders by name, read when they are first asked for; uploads and deletions."""

import io
import re
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ether_diffusion.adapters import read_adapter
from ether_diffusion.adapters.format import CONFIG_NAME, CONTROL_CONFIG_NAME, ENCODER_NAME, TENSORS_NAME
from ether_diffusion.adapters.models import TEXT_ENCODERS, shareable_name
from ether_diffusion.serving.engine import Engine
from ether_diffusion.wording import listed, printable

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
MAX_UPLOAD_BYTES = 2**28
_FILES = {CONTROL_CONFIG_NAME, ENCODER_NAME} | {
    f"{folder}{file}"
    for folder in ("", *(f"{part}/" for part in TEXT_ENCODERS))
    for file in (CONFIG_NAME, TENSORS_NAME)
}


class Library:
    """A folder of adapter folders, by whose names requests take them."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        """Look into the folder; nothing is read yet.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        check_folder(folder)
        self.folder, self.engine = folder, engine
        self.base_name = shareable_name(engine.base.name) or engine.base.name
        self._reading = threading.Lock()

    def names(self) -> list[str]:
        """Return the names of the adapters, sorted."""
        there = [path for path in self.folder.iterdir() if NAME.fullmatch(path.name)]
        return sorted(path.name for path in there if (path / CONFIG_NAME).is_file())

    def ready(self, name: str) -> None:
        """Give the engine an adapter that it does not have yet.

        Raises:
            KeyError: there is none of the name.
            ValueError: it cannot be used with the base.
        """
        with self._reading:
            if name not in self.engine.adapters:
                if not NAME.fullmatch(name) or not (self.folder / name / CONFIG_NAME).is_file():
                    raise KeyError(name)
                with _named(self.folder / name, name):
                    self.engine.add_adapter(name, read_adapter(self.folder / name))

    def put(self, name: str, data: bytes) -> None:
        """Add an adapter that comes as a zip of its folder's files.

        Raises:
            FileExistsError: there is one of the name.
            ValueError: the name cannot be used, or the zip holds no adapter for the base.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"{printable(name)} is no name; use up to 64 letters, digits and _.-")
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".upload-") as made:
            for file, content in _unpacked(data).items():
                (Path(made) / file).parent.mkdir(exist_ok=True)
                (Path(made) / file).write_bytes(content)
            with self._reading, _named(Path(made), name):
                if (self.folder / name).exists() or name == self.base_name:
                    raise FileExistsError(f"there is a model {name}; delete it first, or choose another name")
                self.engine.add_adapter(name, read_adapter(made))
                try:
                    shutil.copytree(made, self.folder / name)
                except OSError:
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                    self.engine.remove_adapter(name)
                    raise

    def delete(self, name: str) -> None:
        """Delete an adapter; requests that use it fail.

        Raises:
            KeyError: there is none of the name.
        """
        with self._reading:
            if name not in self.names():
                raise KeyError(name)
            shutil.rmtree(self.folder / name)
            if name in self.engine.adapters:
                self.engine.remove_adapter(name)


@contextmanager
def _named(folder: Path, name: str) -> Iterator[None]:
    """Say an adapter's name in what is refused, not where it lies."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder), name)) from None


def check_folder(folder: Path) -> None:
    """Refuse what is no folder.

    Raises:
        FileNotFoundError: as said.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; make it, or name one that holds adapters")


def _unpacked(data: bytes) -> dict[str, bytes]:
    """Return the files of an adapter in a zip, with or without a folder around them."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            members = [info for info in packed.infolist() if not info.is_dir()]
            around = {info.filename.partition("/")[0] + "/" for info in members}
            prefix = next(iter(around)) if len(around) == 1 and members[0].filename not in _FILES else ""
            found = {info.filename.removeprefix(prefix): info for info in members}
            wanted = {name: info for name, info in found.items() if name in _FILES}
            if sum(info.file_size for info in wanted.values()) > MAX_UPLOAD_BYTES:
                raise ValueError(f"the zip holds more than {MAX_UPLOAD_BYTES >> 20} MiB; an adapter is small")
            files = {}
            for name, info in wanted.items():
                with packed.open(info) as file:
                    files[name] = file.read(info.file_size + 1)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"the upload is no zip of an adapter's folder ({printable(error)})") from None
    if CONFIG_NAME not in files:
        what = listed(sorted(found)) or "nothing"
        raise ValueError(f"the zip has no {CONFIG_NAME} but {what}; zip an adapter's folder")
    return files

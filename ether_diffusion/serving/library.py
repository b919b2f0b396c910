"""The adapters of a server: folders by name, read when they are first asked for; uploads and deletions."""

import hashlib
import json
import math
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from ether_diffusion.adapters import read_adapter
from ether_diffusion.adapters.format import (
    CONFIG_NAME,
    CONTROL_CONFIG_NAME,
    ENCODER_NAME,
    PREFIX,
    TENSORS_NAME,
)
from ether_diffusion.adapters.models import TEXT_ENCODERS, shareable_name
from ether_diffusion.serving.engine import Engine
from ether_diffusion.training.plain_files import UnusableFileError
from ether_diffusion.training.zip_files import read_zip
from ether_diffusion.wording import printable

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
MAX_UPLOAD_BYTES = 2**28
SECONDS = 5.0
"""How old what is known of the folder may be."""
_LAST = (CONTROL_CONFIG_NAME, CONFIG_NAME)
"""What makes files an adapter."""
_HEAD_BYTES, _BATCH, _METADATA = 2**18, 256, b'{"__metadata__":'
_STAMP = ("size", "mtime", "ino", "created", "ETag", "etag", "LastModified", "updated", "last_modified")
"""What file systems call what changes with a file."""
_NAMES = {CONTROL_CONFIG_NAME, ENCODER_NAME, CONFIG_NAME, TENSORS_NAME}
_FILES = _NAMES | {f"{part}/{file}" for part in TEXT_ENCODERS for file in (CONFIG_NAME, TENSORS_NAME)}


_Stamp = dict[str, list[Any]]


class Library:
    """Folders of adapters in a folder, here or in an object store, by whose names requests take them.

    Several servers may share it: what one adds, replaces or deletes the others see within SECONDS.
    """

    def __init__(self, place: str, engine: Engine) -> None:
        """Look for the folder; nothing is read yet.

        Args:
            place: a path, or what fsspec opens: s3://bucket/adapters, gs://…

        Raises:
            ValueError: there is no such folder, or what reads it is not installed.
        """
        self.files, self.folder = open_place(place)
        self.engine = engine
        self.base_name = shareable_name(engine.base.name) or engine.base.name
        self._reading, self._listing = threading.RLock(), threading.Lock()
        self._read: dict[str, tuple[_Stamp, float]] = {}
        """The stamps of what the engine holds, and when they were last compared."""
        self._unfit: dict[str, tuple[_Stamp, bool]] = {}
        """The stamps of what cannot be used, and whether it could be read."""
        self._forms: dict[str, tuple[_Stamp, bytes]] = {}
        self._fits: dict[bytes, bool] = {}
        self._listed, self._until = list[str](), 0.0

    def names(self) -> list[str]:
        """Return the names of the adapters that can be drawn, sorted.

        One of each form is read whole, and of the others, once, the configuration and the tensors' names.
        """
        with self._listing:
            began = time.monotonic()
            if began >= self._until:
                found = self._stamps()
                new = [n for n, stamp in found.items() if n not in self._forms or self._forms[n][0] != stamp]
                for start in range(0, len(new), _BATCH):
                    batch = {name: found[name] for name in new[start : start + _BATCH]}
                    self._forms.update(self._look(batch))
                self._listed = sorted(name for name in found if self._can_be_drawn(name, found[name]))
                ended = time.monotonic()
                self._until = ended + SECONDS * (1 + 2 * (ended - began))  # it shall take little of the time
            return self._listed

    def ready(self, name: str) -> None:
        """Give the engine an adapter that it does not have yet, or not as it is now.

        Raises:
            KeyError: there is none of the name.
            ValueError: it cannot be used with the base.
        """
        if time.monotonic() - self._read.get(name, ({}, -math.inf))[1] < SECONDS:
            return
        with self._reading:
            stamp = self._stamps(name).get(name) if NAME.fullmatch(name) else None
            if stamp is None:
                self._forget(name)
                raise KeyError(name)
            if name not in self._read or self._read[name][0] != stamp:
                adapter = None
                try:
                    with self._local(name) as folder:
                        adapter = read_adapter(folder)
                        self.engine.add_adapter(name, adapter)
                except (ValueError, OSError):
                    self._unfit[name] = stamp, adapter is not None
                    raise
            self._read[name] = stamp, time.monotonic()

    def put(self, name: str, data: bytes) -> None:
        """Add an adapter that comes as a zip of its folder's files.

        Raises:
            FileExistsError: there is one of the name.
            ValueError: the name cannot be used, or the zip holds no adapter for the base.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"{printable(name)} is no name; use up to 64 letters, digits and _.-")
        files = _unpacked(data)
        with self._reading:
            if name == self.base_name or self._stamps(name):
                raise FileExistsError(f"there is a model {name}; delete it first, or choose another name")
            with tempfile.TemporaryDirectory() as made, _named(made, name):
                for file, content in files.items():
                    (Path(made) / file).parent.mkdir(exist_ok=True)
                    (Path(made) / file).write_bytes(content)
                self.engine.add_adapter(name, read_adapter(made))
            place = f"{self.folder}/{name}"
            try:
                for file in sorted(files, key=_LAST.__contains__):  # those last that make it one
                    self.files.makedirs(f"{place}/{file}".rpartition("/")[0], exist_ok=True)
                    self.files.pipe_file(f"{place}/{file}", files[file])
            except OSError:
                self._forget(name)
                with suppress(OSError):
                    self.files.rm(place, recursive=True)
                raise
            self._read[name] = self._stamps(name)[name], time.monotonic()
            self._until = 0.0

    def delete(self, name: str) -> None:
        """Delete an adapter; requests that use it fail.

        Raises:
            KeyError: there is none of the name.
        """
        with self._reading:
            if not NAME.fullmatch(name) or not self._stamps(name):
                raise KeyError(name)
            self.files.rm(f"{self.folder}/{name}", recursive=True)
            self._forget(name)
            self._until = 0.0

    def _forget(self, name: str) -> None:
        self._read.pop(name, None)
        if name in self.engine.adapters:
            self.engine.remove_adapter(name)

    def _stamps(self, name: str = "") -> dict[str, _Stamp]:
        """Return what changes with the files of an adapter, or of each, by name."""
        found: dict[str, _Stamp] = {}
        place = f"{self.folder}/{name}" if name else self.folder
        for path, info in self.files.find(place, maxdepth=1 if name else 2, detail=True).items():
            owner, _, file = path.removeprefix(f"{self.folder}/").partition("/")
            if file in _FILES and NAME.fullmatch(owner) and owner != self.base_name:
                found.setdefault(owner, {})[file] = [info.get(key) for key in _STAMP]
        return {owner: files for owner, files in found.items() if files.keys() & {*_LAST}}

    def _look(self, stamps: Mapping[str, _Stamp]) -> Iterator[tuple[str, tuple[_Stamp, bytes]]]:
        """Yield the form of each adapter, that all those have which can be drawn if one can."""
        configs, heads = (
            self.files.cat_ranges(
                [f"{self.folder}/{n}/{file}" for n in stamps], 0, _HEAD_BYTES, on_error="return"
            )
            for file in (CONFIG_NAME, TENSORS_NAME)
        )
        for (name, stamp), config, head in zip(stamps.items(), configs, heads, strict=True):
            is_alone = CONTROL_CONFIG_NAME in stamp or not isinstance(config, bytes)
            yield name, (stamp, name.encode() if is_alone else _form(config, head))

    def _can_be_drawn(self, name: str, stamp: _Stamp) -> bool:
        if name in self._unfit and self._unfit[name][0] == stamp:
            return False
        form = self._forms[name][1]
        if form not in self._fits:
            try:
                self.ready(name)
                self._fits[form] = True
            except (KeyError, ValueError, OSError):
                if self._unfit.get(name, (stamp, False))[1]:  # whole, and does not fit: nor do its like
                    self._fits[form] = False
                return False
        return self._fits[form]

    @contextmanager
    def _local(self, name: str) -> Iterator[Path]:
        """Yield a folder of this machine with an adapter's files; what is refused says the name instead."""
        place = f"{self.folder}/{name}"
        if isinstance(self.files, LocalFileSystem):
            with _named(place, name):
                yield Path(place)
            return
        with tempfile.TemporaryDirectory() as made, _named(made, name):
            for path in self.files.find(place, maxdepth=2):
                file = path.removeprefix(f"{place}/")
                if file in _FILES:
                    (Path(made) / file).parent.mkdir(exist_ok=True)
                    self.files.get_file(path, str(Path(made) / file))
            yield Path(made)


@contextmanager
def _named(place: str, name: str) -> Iterator[None]:
    """Say an adapter's name in what is refused, not where it lies."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(str(error).replace(place, name)) from None


def open_place(place: str) -> tuple[Any, str]:
    """Return the file system of a folder of adapters, and the folder's path in it.

    Raises:
        FileNotFoundError: it is a path, and no folder.
        ValueError: what reads it is not installed, or cannot reach it.
    """
    try:
        files, folder = url_to_fs(place)
        is_there = files.isdir(folder) if isinstance(files, LocalFileSystem) else files.exists(folder) or True
    except Exception as error:  # of any library of any store
        said = printable(" ".join(str(error).split()), 200)
        raise ValueError(f"{printable(place)} cannot be read ({type(error).__name__}: {said})") from None
    if not is_there:
        raise FileNotFoundError(f"{printable(place)} is no folder; make it, or name one that holds adapters")
    return files, folder.rstrip("/")


def _form(config: bytes, head: object) -> bytes:
    """Return what a configuration and the head of a file of tensors say but of one adapter alone."""
    found = head if isinstance(head, bytes) else b""
    length = int.from_bytes(found[:8], "little")
    if found.startswith(_METADATA, 8) and len(found) >= 8 + length:  # as safetensors writes it
        with suppress(ValueError, RecursionError):
            told, end = json.JSONDecoder().raw_decode(text := found[8 : 8 + length].decode(), len(_METADATA))
            found = json.dumps([text[end:], told.get(f"{PREFIX}base_fingerprint")]).encode()
    return hashlib.sha256(config + b"\0" + found).digest()


def _unpacked(data: bytes) -> dict[str, bytes]:
    """Return the files of an adapter in a zip, with or without a folder around them."""
    try:
        found = read_zip(data, lambda path: path.name in _NAMES)
    except UnusableFileError as reason:
        raise ValueError(f"the upload is no zip of an adapter's folder: it {reason}") from None
    around = {name.partition("/")[0] + "/" for name in found}
    prefix = next(iter(around)) if len(around) == 1 and not found.keys() & _FILES else ""
    files = {name.removeprefix(prefix): content for name, content in found.items()}
    if not files.keys() & {*_LAST}:
        raise ValueError(f"the zip has no {CONFIG_NAME}; zip an adapter's folder")
    return {name: content for name, content in files.items() if name in _FILES}

"""The adapters of a studio: one folder each, with a name for people in a small file of ours beside them."""

import secrets
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ether_diffusion.adapter_file.loading import Match
from ether_diffusion.adapter_file.wording import printable
from ether_diffusion.base import Base, load_base
from ether_diffusion.durable_files import write_files, write_folder
from ether_diffusion.export import EXPORT_NAME, export_lora
from ether_diffusion.ui.adapter_contents import (
    THUMBNAIL_NAME,
    Contents,
    download_files,
    read_contents,
    zip_bytes,
)
from ether_diffusion.ui.adapter_upload import read_upload
from ether_diffusion.ui.base_fit import BaseFit
from ether_diffusion.ui.display_name import NAME_FILE, Label, check_name, file_stem, read_label, write_label
from ether_diffusion.ui.shortages import disk_explained

_GONE = "this adapter is no longer in the library: it was deleted meanwhile; refresh the list"


@dataclass(frozen=True)
class Card:
    """What a library shows of an adapter.

    `name`, `base_name`, `trigger` and `why_not` are escaped for terminals and hold no invisible characters;
    a page escapes them for HTML as any text. `fits_base` is true where the adapter can be applied as it is;
    `why_not` says why otherwise. With `match` "other weights" it could be applied, to doubtful effect. A
    damaged adapter has no method and no hash. `num_bytes` are those of its files.
    """

    id: str
    name: str
    kind: Literal["subject", "control"]
    method: str
    base_name: str
    fits_base: bool
    why_not: str
    match: Match | None
    num_bytes: int
    trigger: str
    steps: int | None
    hash: str
    created: datetime
    thumbnail: Path | None
    num_parameters: int


class Library:
    """The adapters in a folder, for a base that is opened and need not be loaded.

    `temp` takes uploads while they are read, and the files that visitors fetch. Any number of servers may
    use one folder.
    """

    def __init__(self, root: Path, temp: Path, base: Base) -> None:
        self.root, self.temp = root, temp
        self._fit = BaseFit(base)
        self._known: dict[str, tuple[object, Card]] = {}
        self._lock = threading.Lock()

    def cards(self) -> list[Card]:
        """Return the cards of all adapters, the newest first; damaged ones say what is wrong."""
        cards = []
        for folder in self._folders().values():
            with suppress(FileNotFoundError):  # deleted while we look
                cards.append(self._card(folder))
        return sorted(cards, key=lambda card: (card.created, card.id), reverse=True)

    def card(self, adapter_id: str) -> Card:
        """Return the card of an adapter.

        Raises:
            FileNotFoundError: there is none of this id, or no longer.
        """
        return self._card(self.folder(adapter_id))

    def folder(self, adapter_id: str) -> Path:
        """Return the folder of an adapter, found among those that are there.

        Raises:
            FileNotFoundError: there is none of this id, or no longer.
        """
        found = self._folders().get(adapter_id)
        if found is None:
            raise FileNotFoundError(_GONE)
        return found

    def rename(self, adapter_id: str, name: str) -> Card:
        """Give an adapter another name; its folder and id stay.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: the name is empty or too long, or the disk is full.
        """
        folder = self.folder(adapter_id)
        checked = check_name(name)
        with disk_explained(folder, "renaming the adapter"):
            write_label(folder, Label(checked, self._card(folder).created))
        return self._card(folder)

    def delete(self, adapter_id: str) -> None:
        """Delete an adapter with its files.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: the folder cannot be written to.
        """
        folder = self.folder(adapter_id)
        aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.deleted")
        with disk_explained(folder, "deleting the adapter"):
            try:
                folder.rename(aside)
            except FileNotFoundError:
                raise FileNotFoundError(_GONE) from None
        shutil.rmtree(aside, ignore_errors=True)

    def import_upload(self, path: Path | Sequence[Path], *, name: str = "") -> Card:
        """Take an uploaded adapter: a zip, or its .safetensors with its .json (four files with control).

        It is read as strictly as everywhere, and written anew: nothing else that was uploaded is kept.

        Raises:
            ValueError, FileNotFoundError: it is no whole adapter, or the disk is full.
        """
        paths = [path] if isinstance(path, Path) else list(path)
        with disk_explained(self.root, "taking the adapter"):
            upload = read_upload(paths, self.temp)
            return self._add(upload.files, name or upload.name)

    def add_run_result(self, folder: Path, name: str) -> Card:
        """Copy the adapter that a training run ended with into the library.

        Raises:
            ValueError, FileNotFoundError: the folder holds no whole adapter, or the disk is full.
        """
        with disk_explained(self.root, "keeping the adapter"):
            return self._add(download_files(folder), name)

    def native_zip(self, adapter_id: str) -> Path:
        """Write an adapter as one zip, which `import_upload` and other studios read; return its path.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: it is damaged, or the disk is full.
        """
        folder = self.folder(adapter_id)
        stem = file_stem(read_label(folder).name, adapter_id)
        read_contents(folder)
        return self._offer(adapter_id, f"{stem}.zip", zip_bytes(download_files(folder), stem))

    def lora_file(self, adapter_id: str) -> Path:
        """Write an adapter as one LoRA file for other tools, exact on its base; return its path.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: it was trained on another base, LoRA files cannot say what it does, or the disk is
                full.
        """
        folder = self.folder(adapter_id)
        contents = read_contents(folder)
        if contents.encoder is not None:
            raise ValueError(
                "an adapter that follows a control image is more than a LoRA; download it as a zip"
            )
        if not (folder / EXPORT_NAME).is_file():
            with disk_explained(folder, "writing the LoRA file"):
                self._export(contents, folder)
        stem = file_stem(read_label(folder).name, adapter_id)
        return self._offer(adapter_id, f"{stem}.safetensors", (folder / EXPORT_NAME).read_bytes())

    def _export(self, contents: Contents, folder: Path) -> None:
        if contents.adapters.keys() == {"unet"}:
            with self._fit.adapted_unet(contents.adapters["unet"]) as unet:
                export_lora(contents.adapters, unet, folder)
        else:
            export_lora(contents.adapters, load_base(self._fit.base.folder), folder)

    def _add(self, files: dict[str, bytes], name: str) -> Card:
        checked = check_name(name)
        self.root.mkdir(parents=True, exist_ok=True)
        folder = self.root / f"a{secrets.token_hex(6)}"
        label = Label(checked, datetime.now(UTC))
        write_folder(folder, {**files, NAME_FILE: label.to_bytes()})
        try:
            read_contents(folder)
        except (ValueError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return self._card(folder)

    def _offer(self, adapter_id: str, name: str, data: bytes) -> Path:
        target = self.temp / "adapters" / adapter_id
        with disk_explained(self.temp, "preparing the download"):
            target.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_files(target, {name: data})
        return target / name

    def _folders(self) -> dict[str, Path]:
        if not self.root.is_dir():
            return {}
        return {
            path.name: path
            for path in self.root.iterdir()
            if path.is_dir() and not path.is_symlink() and path.name.isascii() and path.name.isidentifier()
        }

    def _card(self, folder: Path) -> Card:
        stamp = _stamp(folder)
        with self._lock:
            known = self._known.get(folder.name)
        if known is not None and known[0] == stamp:
            return known[1]
        card = self._read_card(folder)
        with self._lock:
            self._known[folder.name] = (stamp, card)
        return card

    def _read_card(self, folder: Path) -> Card:
        if not folder.is_dir():
            raise FileNotFoundError(_GONE)
        label = read_label(folder)
        contents, match, why_not = None, None, ""
        try:
            contents = read_contents(folder)
            fit = self._fit.fit(contents.adapters, contents.encoder)
            match, why_not = fit.match, fit.remark
        except (ValueError, OSError) as error:
            why_not = printable(str(error).replace(f"{folder}/", "").replace(str(folder), label.name), 500)
        thumbnail = folder / THUMBNAIL_NAME
        return Card(
            id=folder.name,
            name=label.name,
            kind="control" if contents is not None and contents.encoder is not None else "subject",
            method="" if contents is None else contents.method,
            base_name="" if contents is None else printable(contents.metadata.base_model or "unknown"),
            fits_base=match in ("same", "unknown"),
            why_not=why_not,
            match=match,
            num_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            trigger="" if contents is None else printable(contents.metadata.trigger or "", 300),
            steps=None if contents is None else contents.steps,
            hash="" if contents is None else contents.hash,
            created=label.created,
            thumbnail=thumbnail if thumbnail.is_file() else None,
            num_parameters=0 if contents is None else contents.num_parameters,
        )


def _stamp(folder: Path) -> object:
    """Return what changes when a file of a folder does."""
    with suppress(OSError):
        status = [(str(path), path.stat()) for path in sorted(folder.rglob("*"))]
        return [(name, each.st_mtime_ns, each.st_size) for name, each in status]
    return None

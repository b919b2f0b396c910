"""The adapters of a studio: one folder each, with a name for people in a small file of ours beside them."""

import secrets
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from ether_diffusion.adapters import Adapter, read_adapter
from ether_diffusion.adapters.export import export_lora
from ether_diffusion.adapters.format import EXPORT_NAME
from ether_diffusion.bases import Base, load_base
from ether_diffusion.durable_files import write_files, write_folder
from ether_diffusion.ui.adapter_contents import (
    download_files,
    zip_bytes,
)
from ether_diffusion.ui.adapter_upload import read_upload
from ether_diffusion.ui.base_fit import BaseFit
from ether_diffusion.ui.cards import GONE, Card, id_of, is_adapter, read_card, stamp_of
from ether_diffusion.ui.display_name import NAME_FILE, Label, check_name, file_stem, read_label, write_label
from ether_diffusion.ui.errors import disk_explained


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
        self._writing = threading.RLock()

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
            raise FileNotFoundError(GONE)
        return found

    def rename(self, adapter_id: str, name: str) -> Card:
        """Give an adapter another name; its folder and id stay.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: the name is empty or too long, or the disk is full.
        """
        folder = self.folder(adapter_id)
        checked = check_name(name)
        with self._writing, disk_explained(folder, "renaming the adapter"):
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
                raise FileNotFoundError(GONE) from None
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
        files = {**download_files(folder), NAME_FILE: read_label(folder).to_bytes()}
        return self._offer(adapter_id, f"{stem}.zip", zip_bytes(files, stem))

    def lora_file(self, adapter_id: str) -> Path:
        """Write an adapter as one LoRA file for other tools, exact on its base; return its path.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: it was trained on another base, LoRA files cannot say what it does, or the disk is
                full.
        """
        folder = self.folder(adapter_id)
        adapter = read_adapter(folder)
        if adapter.encoder is not None:
            raise ValueError(
                "an adapter that follows a control image is more than a LoRA; download it as a zip"
            )
        with self._writing, disk_explained(folder, "writing the LoRA file"):
            if not (folder / EXPORT_NAME).is_file():
                self._export(adapter, folder)
        stem = file_stem(read_label(folder).name, adapter_id)
        return self._offer(adapter_id, f"{stem}.safetensors", (folder / EXPORT_NAME).read_bytes())

    def _export(self, adapter: Adapter, folder: Path) -> None:
        if adapter.parts.keys() == {"unet"}:
            with self._fit.adapted_unet(adapter.first) as unet:
                export_lora(adapter, unet, folder)
        else:
            export_lora(adapter, load_base(self._fit.base.folder), folder)

    def _add(self, files: dict[str, bytes], name: str) -> Card:
        checked = check_name(name)
        self.root.mkdir(parents=True, exist_ok=True)
        folder = self.root / f"a{secrets.token_hex(6)}"
        label = Label(checked, datetime.now(UTC))
        write_folder(folder, {**files, NAME_FILE: label.to_bytes()})
        try:
            read_adapter(folder)
        except (ValueError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return self._card(folder)

    def _offer(self, adapter_id: str, name: str, data: bytes) -> Path:
        target = self.temp / "adapters" / adapter_id
        with self._writing, disk_explained(self.temp, "preparing the download"):
            target.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_files(target, {name: data})
        return target / name

    def _folders(self) -> dict[str, Path]:
        if not self.root.is_dir():
            return {}
        return {id_of(path): path for path in self.root.iterdir() if is_adapter(path)}

    def _card(self, folder: Path) -> Card:
        stamp = stamp_of(folder)
        with self._lock:
            known = self._known.get(folder.name)
        if known is not None and known[0] == stamp:
            return known[1]
        card = read_card(folder, self._fit)
        with self._lock:
            self._known[folder.name] = (stamp, card)
        return card

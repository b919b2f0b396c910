"""The adapters of a studio: one folder each, listed as cards, taken in, named, given out and deleted."""

import hashlib
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from safetensors import safe_open
from torch import nn

from ether_diffusion.adapters import Adapter, AdapterPart, read_adapter
from ether_diffusion.adapters.format import (
    CONFIG_NAME,
    CONTROL_CONFIG_NAME,
    EXPORT_NAME,
    TENSORS_NAME,
    content_hash,
)
from ether_diffusion.adapters.models import Fit, Match, check_fit
from ether_diffusion.bases import Base, Denoiser, load_base
from ether_diffusion.control.conditioning import check_encoder
from ether_diffusion.durable_files import write_files, write_folder
from ether_diffusion.export import export_lora
from ether_diffusion.ui.adapter_files import (
    LABEL_NAME,
    THUMBNAIL_NAME,
    Label,
    check_name,
    file_stem,
    files_in,
    files_of,
    read_label,
    read_upload,
    thumbnail,
    told,
    zip_bytes,
)
from ether_diffusion.ui.errors import disk_explained
from ether_diffusion.wording import printable

GONE = "this adapter is no longer in the library: it was deleted meanwhile; refresh the list"
logger = logging.getLogger(__name__)


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
    created: datetime
    num_bytes: int
    thumbnail: Path | None
    why_not: str
    match: Match | None = None
    method: str = ""
    base_name: str = ""
    trigger: str = ""
    steps: int | None = None
    hash: str = ""
    num_parameters: int = 0

    @property
    def fits_base(self) -> bool:
        """Whether the adapter can be applied to the studio's base as it is."""
        return self.match in ("same", "unknown")


class BaseFit:
    """Compares adapters with a base that is opened and not loaded."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._lock = threading.RLock()

    def fit(self, adapter: Adapter) -> Fit:
        """Say how the base compares with that of an adapter and its control encoder, if it has one.

        Of a text encoder's adapter, only whether the base has that text encoder is looked at.

        Raises:
            ValueError: they do not fit; the message says why.
        """
        lacking = [name for name in adapter.parts if not (self.base.folder / name).is_dir()]
        if lacking:
            raise ValueError(f"the adapter changes the {lacking[0]}, which {self.base.name} has not")
        if adapter.encoder is not None:
            with self._lock:
                check_encoder(self._skeleton, adapter.encoder)
        if "unet" not in adapter.parts:
            return Fit("unknown")
        with self.adapted_unet(adapter.parts["unet"]) as unet:
            return check_fit(unet, adapter.parts["unet"], "asked")

    @contextmanager
    def adapted_unet(self, adapter: AdapterPart) -> Iterator[Denoiser]:
        """Give the UNet with the weights that an adapter changes, as they are stored, and no others.

        One visitor has it at a time.
        """
        changed, variant = adapter.modules(), self.base.variant
        with self._lock, ExitStack() as stack:
            modules = {name: m for name, m in self._skeleton.named_modules() if name in changed}
            weights = {f"{name}.weight": m for name, m in modules.items() if isinstance(m, nn.Linear)}
            pattern = "*.safetensors" if variant is None else f"*.{variant}*.safetensors"
            for path in sorted((self.base.folder / self.base.denoiser).glob(pattern)):
                with safe_open(path, framework="pt") as file:
                    for name in weights.keys() & set(file.keys()):
                        stack.callback(setattr, weights[name], "weight", weights[name].weight)
                        weights[name].weight = nn.Parameter(file.get_tensor(name), requires_grad=False)
            yield self._skeleton

    @cached_property
    def _skeleton(self) -> Denoiser:
        unet = self.base.empty_denoiser()
        unet.register_to_config(_name_or_path=str(self.base.folder))
        return unet


class Library:
    """The adapters in a folder, for a base that is opened and need not be loaded.

    `temp` takes uploads while they are read, and the files that visitors fetch. Any number of servers may
    use one folder. Wherever an id is given: FileNotFoundError where there is no such adapter, or no longer.
    What writes raises ValueError where the disk is full or may not be written to.
    """

    def __init__(self, root: Path, temp: Path, base: Base) -> None:
        self.root, self.temp = root, temp
        self._fit = BaseFit(base)
        self._known: dict[str, tuple[object, Card]] = {}
        self._writing = threading.RLock()

    def cards(self) -> list[Card]:
        """Return the cards of all adapters, the newest first; damaged ones say what is wrong."""
        cards = []
        for folder in self._folders().values():
            with suppress(FileNotFoundError):  # deleted while we look
                cards.append(self._card(folder))
        return sorted(cards, key=lambda card: (card.created, card.id), reverse=True)

    def card(self, adapter_id: str) -> Card:
        """Return the card of an adapter."""
        return self._card(self.folder(adapter_id))

    def folder(self, adapter_id: str) -> Path:
        """Return the folder of an adapter, found among those that are there."""
        found = self._folders().get(adapter_id)
        if found is None:
            raise FileNotFoundError(GONE)
        return found

    def rename(self, adapter_id: str, name: str) -> Card:
        """Give an adapter another name, which may not be empty or too long; its folder and id stay."""
        folder, checked = self.folder(adapter_id), check_name(name)
        with self._writing, disk_explained(folder, "renaming the adapter"):
            label = Label(name=checked, created=self._card(folder).created)
            write_files(folder, {LABEL_NAME: label.to_bytes()})
        return self._card(folder)

    def delete(self, adapter_id: str) -> None:
        """Delete an adapter with its files."""
        folder = self.folder(adapter_id)
        aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.deleted")
        with disk_explained(folder, "deleting the adapter"):
            try:
                folder.rename(aside)
            except FileNotFoundError:
                raise FileNotFoundError(GONE) from None
        shutil.rmtree(aside, ignore_errors=True)

    def import_upload(self, paths: Sequence[Path]) -> Card:
        """Take an uploaded adapter: a zip, or its .safetensors with its .json (four files with control).

        It is read as strictly as everywhere, and written anew: nothing else that was uploaded is kept.

        Raises:
            ValueError: it is no whole adapter.
        """
        self.temp.mkdir(parents=True, exist_ok=True)
        with (
            disk_explained(self.root, "taking the adapter"),
            TemporaryDirectory(prefix="upload-", dir=self.temp) as staged,
        ):
            adapter, folder = read_upload(paths, Path(staged))
            name = paths[0].stem
            if (folder / LABEL_NAME).is_file():
                name = read_label(folder).name
            elif name.startswith((Path(TENSORS_NAME).stem, Path(CONFIG_NAME).stem)):
                name = adapter.metadata.trigger or "uploaded adapter"
            return self._add(files_of(adapter) | thumbnail(folder), printable(name)[:60])

    def add_run_result(self, folder: Path, name: str) -> Card:
        """Copy the adapter that a training run ended with into the library.

        Raises:
            ValueError, FileNotFoundError: the folder holds no whole adapter.
        """
        with disk_explained(self.root, "keeping the adapter"):
            return self._add(files_in(folder), name)

    def native_zip(self, adapter_id: str) -> Path:
        """Write an adapter that is whole as one zip, which studios read; return its path."""
        folder = self.folder(adapter_id)
        label = read_label(folder)
        stem = file_stem(label.name, adapter_id)
        read_adapter(folder)
        files = {**files_in(folder), LABEL_NAME: label.to_bytes()}
        return self._offer(adapter_id, f"{stem}.zip", zip_bytes(files, stem))

    def lora_file(self, adapter_id: str) -> Path:
        """Write an adapter as one LoRA file for other tools, exact on its base; return its path.

        Raises:
            ValueError: it was trained on another base, or LoRA files cannot say what it does.
        """
        folder = self.folder(adapter_id)
        adapter, exported = read_adapter(folder), folder / EXPORT_NAME
        if adapter.encoder is not None:
            raise ValueError("it follows a control image, and is more than a LoRA; download it as a zip")
        with self._writing, disk_explained(folder, "writing the LoRA file"):
            if not exported.is_file() and adapter.parts.keys() == {"unet"}:
                with self._fit.adapted_unet(adapter.first) as unet:
                    export_lora(adapter, unet, folder)
            elif not exported.is_file():
                export_lora(adapter, load_base(self._fit.base.folder), folder)
        name = f"{file_stem(read_label(folder).name, adapter_id)}.safetensors"
        return self._offer(adapter_id, name, exported.read_bytes())

    def _add(self, files: dict[str, bytes], name: str) -> Card:
        self.root.mkdir(parents=True, exist_ok=True)
        folder = self.root / f"a{secrets.token_hex(6)}"
        label = Label(name=check_name(name), created=datetime.now(UTC))
        write_folder(folder, {**files, LABEL_NAME: label.to_bytes()})
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
        return {_id_of(path): path for path in self.root.glob("*") if _is_adapter(path)}

    def _card(self, folder: Path) -> Card:
        """Return the card of a folder, read once until one of its files changes."""
        if not folder.is_dir():
            raise FileNotFoundError(GONE)
        stamp = None
        with suppress(OSError):
            status = [(path, path.stat()) for path in sorted(folder.rglob("*"))]
            stamp = [(path, each.st_mtime_ns, each.st_size) for path, each in status]
        known = self._known.get(folder.name)
        if known is not None and known[0] == stamp:
            return known[1]
        card = _read_card(folder, self._fit)
        self._known[folder.name] = (stamp, card)
        return card


def _read_card(folder: Path, base: BaseFit) -> Card:
    """Read the card of an adapter, damaged or not."""
    label, picture = read_label(folder), folder / THUMBNAIL_NAME
    card = Card(
        id=_id_of(folder),
        name=label.name,
        kind="control" if (folder / CONTROL_CONFIG_NAME).exists() else "subject",
        created=label.created,
        num_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        thumbnail=picture if picture.is_file() else None,
        why_not="it cannot be read; details are in the log",
    )
    try:
        adapter = read_adapter(folder)
        steps, encoder = adapter.metadata.training.get("steps"), adapter.encoder
        alone = "" if encoder is None else content_hash(encoder.state_dict())
        card = replace(
            card,
            method=adapter.method,
            base_name=printable(adapter.metadata.base_model or ""),
            trigger=printable(adapter.metadata.trigger or "", 300),
            steps=steps if isinstance(steps, int) and not isinstance(steps, bool) else None,
            hash=next(iter(adapter.hashes.values()), alone),
            num_parameters=adapter.num_parameters,
        )
        fit = base.fit(adapter)
        return replace(card, match=fit.match, why_not=fit.remark)
    except (ValueError, OSError) as error:
        return replace(card, why_not=told(error, folder, label.name))
    except Exception:  # whatever is wrong with one adapter, the others are listed
        logger.exception("the adapter in %s cannot be read", folder)
        return card


def _id_of(folder: Path) -> str:
    """Return the id of a folder: its name, or for one that a hand put there what stands for the name."""
    name = folder.name
    if name.isascii() and name.isidentifier() and len(name) <= 64:
        return name
    return f"x{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"


def _is_adapter(path: Path) -> bool:
    if path.name.startswith(".") or path.is_symlink() or not path.is_dir():
        return False
    return any((path / name).exists() for name in (CONFIG_NAME, TENSORS_NAME, CONTROL_CONFIG_NAME))

"""The adapters of a studio: one folder each, listed as cards, taken in, named, given out and deleted."""

import hashlib
import io
import logging
import os
import re
import secrets
import shutil
import threading
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from safetensors import safe_open
from torch import nn

from ether_diffusion.adapters import Adapter, AdapterPart, read_adapter
from ether_diffusion.adapters import format as named
from ether_diffusion.adapters.models import COMPONENTS, Fit, Match, check_fit
from ether_diffusion.adapters.save import folder_files
from ether_diffusion.bases import Base, Denoiser, load_base
from ether_diffusion.control.conditioning import check_encoder
from ether_diffusion.durable_files import write_files, write_folder
from ether_diffusion.export import export_lora
from ether_diffusion.mixing import Ingredient, mix_adapters
from ether_diffusion.training.plain_files import UnusableFileError, read_plain_file
from ether_diffusion.training.result import FINAL, SAMPLES_FOLDER
from ether_diffusion.ui.facts import Facts, Stamp, stamp_of
from ether_diffusion.ui.uploads import MAX_PHOTO_BYTES, read_sent, thumbnail_png
from ether_diffusion.ui.words import check_name, disk_explained
from ether_diffusion.wording import listed, printable

THUMBNAIL_NAME = "thumbnail.png"
MAX_SECONDS = 253e9  # since 1970, until the end of 9986
GONE = "this adapter is no longer in the library: it was deleted meanwhile; choose another"
_FILES = (named.CONFIG_NAME, named.TENSORS_NAME, named.CONTROL_CONFIG_NAME, named.ENCODER_NAME)
_NEEDED = (
    f"give a zip of its folder, or its {named.TENSORS_NAME} together with its {named.CONFIG_NAME} "
    f"(and {named.CONTROL_CONFIG_NAME} with {named.ENCODER_NAME} for control)"
)
logger = logging.getLogger(__name__)
Kind = Literal["subject", "control"]


@dataclass(frozen=True)
class Card:
    """What a library shows of an adapter.

    Its texts hold no invisible characters; a page escapes them for HTML. `why_not` says why it does not fit
    the base; with `match` "other weights" it could be applied, to doubtful effect. A damaged adapter has no
    method and no hash; `hash` is the first of the `hashes` of its parts, or that of an encoder alone.
    `num_bytes` are those of its files.
    """

    id: str
    name: str
    kind: Kind
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
    hashes: frozenset[str] = frozenset()
    encoder_hash: str = ""
    num_parameters: int = 0

    @property
    def fits_base(self) -> bool:
        """Whether the adapter can be applied to the studio's base as it is."""
        return self.match in ("same", "unknown")


class Label(Facts):
    """An adapter's name, whose invisible characters are escaped, and when it came."""

    name_of_file = "studio.json"
    name: str
    created: datetime


class Library:
    """The adapters in a folder that any number of servers may use, for a base that need not be loaded.

    `temp` takes uploads while they are read, and the files that visitors fetch. FileNotFoundError where there
    is no adapter of an id; ValueError where the disk is full or may not be written to.
    """

    def __init__(self, root: Path, temp: Path, base: Base) -> None:
        self.root, self.temp, self.base = root, temp, base
        self._known: dict[str, tuple[Stamp | None, Card]] = {}
        self._writing, self._fitting = threading.RLock(), threading.RLock()

    def use(self, base: Base) -> None:
        """Compare adapters with another base from now on."""
        with self._fitting:
            self.base, self._known = base, {}
            self.__dict__.pop("_skeleton", None)

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
        folders = self._folders()
        if adapter_id not in folders:
            raise FileNotFoundError(GONE)
        return folders[adapter_id]

    def rename(self, adapter_id: str, name: str) -> Card:
        """Give an adapter another name, which may not be empty or too long; its folder and id stay."""
        folder, checked = self.folder(adapter_id), check_name(name)
        with self._writing, disk_explained(folder, "renaming the adapter"):
            Label(name=checked, created=self._card(folder).created).write(folder)
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
        """Take an uploaded adapter, a zip or its files, which is written anew: nothing else of it is kept."""
        self.temp.mkdir(parents=True, exist_ok=True)
        explained = disk_explained(self.root, "taking the adapter")
        with explained, TemporaryDirectory(prefix="upload-", dir=self.temp) as staged:
            adapter, folder = _read_upload(paths, Path(staged))
            name = paths[0].stem
            if Label.find(folder):
                name = read_label(folder).name
            elif name.startswith((Path(named.TENSORS_NAME).stem, Path(named.CONFIG_NAME).stem)):
                name = adapter.metadata.trigger or "uploaded adapter"
            return self._add(folder_files(adapter) | thumbnail(folder), printable(name)[:60])

    def add_run_result(self, folder: Path, name: str) -> Card:
        """Copy the adapter that a training run ended with into the library."""
        with disk_explained(self.root, "keeping the adapter"):
            return self._add(_files_in(folder), name)

    def native_zip(self, adapter_id: str) -> Path:
        """Write an adapter that is whole as one zip, which studios read; return its path."""
        folder, data = self.folder(adapter_id), io.BytesIO()
        label = read_label(folder)
        stem = _file_stem(label.name, adapter_id)
        read_adapter(folder)
        with zipfile.ZipFile(data, "w") as archive:  # the same files give the same bytes
            for name, content in (_files_in(folder) | {label.name_of_file: label.data()}).items():
                archive.writestr(zipfile.ZipInfo(f"{stem}/{name}"), content, zipfile.ZIP_DEFLATED)
        return self._offer(adapter_id, f"{stem}.zip", data.getvalue())

    def lora_file(self, adapter_id: str) -> Path:
        """Write an adapter as one LoRA file for other tools, exact on its base; return its path."""
        folder = self.folder(adapter_id)
        adapter, exported = read_adapter(folder), folder / named.EXPORT_NAME
        if adapter.encoder is not None:
            raise ValueError("it follows a control image, and is more than a LoRA; download it as a zip")
        with self._writing, disk_explained(folder, "writing the LoRA file"):
            if not exported.is_file():
                with self._changed_by([adapter]) as models:
                    export_lora(adapter, models, folder)
        name = f"{_file_stem(read_label(folder).name, adapter_id)}.safetensors"
        return self._offer(adapter_id, name, exported.read_bytes())

    def mix(self, strengths: Mapping[str, float], name: str) -> Card:
        """Keep adapters, each at its strength, as one that draws what they draw together."""
        name = check_name(name)
        found = [Ingredient(self.card(i).name, read_adapter(self.folder(i)), s) for i, s in strengths.items()]
        with self._changed_by([each.adapter for each in found]) as models:
            mixed = mix_adapters(found, models)
        with disk_explained(self.root, "keeping the mix"):
            return self._add(folder_files(mixed), name)

    def _add(self, files: Mapping[str, bytes], name: str) -> Card:
        self.root.mkdir(parents=True, exist_ok=True)
        folder = self.root / f"a{secrets.token_hex(6)}"
        label = Label(name=check_name(name), created=datetime.now(UTC))
        write_folder(folder, {**files, label.name_of_file: label.data()})
        card = self._card(folder)
        if not card.hash:  # it cannot be read
            shutil.rmtree(folder, ignore_errors=True)
            raise ValueError(card.why_not)
        return card

    def _offer(self, adapter_id: str, name: str, data: bytes) -> Path:
        target = self.temp / "adapters" / adapter_id
        with self._writing, disk_explained(self.temp, "preparing the download"):
            target.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_files(target, {name: data})
        return target / name

    def _folders(self) -> dict[str, Path]:
        """Return the folders with adapters by id: its name, or what stands for one that a hand put there."""
        found = dict[str, Path]()
        for path in self.root.glob("*"):
            is_own = path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
            if is_own and any((path / name).exists() for name in _FILES[:3]):
                found[_id_of(path.name)] = path
        return found

    def _card(self, folder: Path) -> Card:
        """Return the card of a folder, read once until one of its files changes."""
        if not folder.is_dir():
            raise FileNotFoundError(GONE)
        stamp = None
        with suppress(OSError):
            stamp = stamp_of(folder)
        if folder.name not in self._known or self._known[folder.name][0] != stamp:
            self._known[folder.name] = (stamp, self._read_card(folder))
        return self._known[folder.name][1]

    def _read_card(self, folder: Path) -> Card:
        """Read the card of an adapter, damaged or not."""
        label, picture = read_label(folder), folder / THUMBNAIL_NAME
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        unread, thumb = "it cannot be read; details are in the log", picture if picture.is_file() else None
        kind: Kind = "control" if (folder / named.CONTROL_CONFIG_NAME).exists() else "subject"
        card = Card(_id_of(folder.name), label.name, kind, label.created, num_bytes, thumb, unread)
        try:
            adapter = read_adapter(folder)
            steps, encoder = adapter.metadata.training.get("steps"), adapter.encoder
            encoder_hash = "" if encoder is None else named.content_hash(encoder.state_dict())
            said, hashes = adapter.metadata, [*adapter.hashes.values()]
            card = replace(
                card, method=adapter.method, hash=next(iter(hashes), encoder_hash), hashes=frozenset(hashes),
                encoder_hash=encoder_hash, num_parameters=adapter.num_parameters,
                base_name=printable(said.base_model or ""), trigger=printable(said.trigger or "", 300),
                steps=steps if isinstance(steps, int) and not isinstance(steps, bool) else None,
            )  # fmt: skip
            fit = self._fit(adapter)
            return replace(card, match=fit.match, why_not=fit.remark)
        except (ValueError, OSError) as error:
            return replace(card, why_not=_told(error, folder, label.name))
        except Exception:  # whatever is wrong with one adapter, the others are listed
            logger.exception("the adapter in %s cannot be read", folder)
            return card

    def _fit(self, adapter: Adapter) -> Fit:
        """Say how the base compares with an adapter's; of a text encoder's, whether the base has one."""
        places = {"unet": self.base.denoiser}  # of the denoiser, whatever it is called
        lacking = [n for n in adapter.parts if not (self.base.folder / places.get(n, n)).is_dir()]
        if lacking:
            raise ValueError(f"the adapter changes the {lacking[0]}, which {self.base.name} has not")
        if adapter.encoder is not None:
            with self._fitting:
                check_encoder(self._skeleton, adapter.encoder)
        part = adapter.parts.get("unet")
        if part is None:
            return Fit("unknown")
        with self._adapted_unet([part]) as unet:
            return check_fit(unet, part, "asked")

    @contextmanager
    def _changed_by(self, adapters: Sequence[Adapter]) -> Iterator[Any]:
        """Give what adapters change: the UNet, with the weights in question alone, or all of the base."""
        if all(each.parts.keys() == {"unet"} for each in adapters):
            with self._adapted_unet(each.first for each in adapters) as unet:
                yield unet
        else:
            yield load_base(self.base.folder)

    @contextmanager
    def _adapted_unet(self, adapters: Iterable[AdapterPart]) -> Iterator[Denoiser]:
        """Give the UNet with the weights that adapters change, as stored; to one visitor at a time."""
        changed, variant = {name for each in adapters for name in each.modules()}, self.base.variant
        with self._fitting, ExitStack() as stack:
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


def read_label(folder: Path) -> Label:
    """Return the label of an adapter; one without is called as its folder, and as old as its files."""
    try:
        found = Label.read(folder)
        name, seconds = check_name(found.name), found.created.timestamp()
    except (ValueError, OverflowError):  # not there, or nobody's label
        dated = next((path for path in (folder / named.CONFIG_NAME, folder) if path.exists()), None)
        name, seconds = printable(folder.name), 0 if dated is None else dated.stat().st_mtime
    return Label(name=name, created=datetime.fromtimestamp(min(max(seconds, 0), MAX_SECONDS), UTC))


def thumbnail(folder: Path) -> dict[str, bytes]:
    """Return a thumbnail of an adapter, which for a run is of its first picture; none where there is none."""
    samples = folder / SAMPLES_FOLDER
    folders = [samples / FINAL, *sorted(samples.glob("step-*"), reverse=True)]
    drawn = next(filter(None, (sorted(each.glob("*.png")) for each in folders)), [])
    for path in (folder / THUMBNAIL_NAME, *drawn[:1]):
        with suppress(UnusableFileError):  # it is an ornament
            data = read_plain_file(path, inside=folder, max_bytes=MAX_PHOTO_BYTES)
            return {THUMBNAIL_NAME: thumbnail_png(data, path.suffix)}
    return {}


def _id_of(name: str) -> str:
    is_plain = name.isascii() and name.isidentifier() and len(name) <= 64
    return name if is_plain else f"x{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"


def _file_stem(name: str, otherwise: str) -> str:
    """Return the name of a download: the plain letters and digits of a name, or another word."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")[:40] or otherwise


def _files_in(folder: Path) -> dict[str, bytes]:
    """Return the files in a folder that make an adapter, with its card, LoRA file and thumbnail."""
    parts = ("", *(f"{name}/" for name in COMPONENTS))
    names = [f"{part}{name}" for part in parts for name in _FILES[:2]]
    names += [*_FILES[2:], named.CARD_NAME, named.EXPORT_NAME]
    found = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return found | thumbnail(folder)


def _read_upload(paths: Sequence[Path], staged: Path) -> tuple[Adapter, Path]:
    """Read an adapter that was sent, as a zip or as files, and say where in `staged` it lies."""
    if not paths:
        raise ValueError(f"nothing was uploaded; {_NEEDED}")
    files: dict[str, bytes] = {}
    for path in paths:
        try:
            sent = read_sent(path, lambda name: name.suffix in (".json", ".safetensors", ".png"))
            if files.keys() & sent.keys():
                raise UnusableFileError("was sent twice; send each file once")
            files |= sent
        except UnusableFileError as reason:
            raise ValueError(f"{printable(path.name)} {reason}") from None
    by_suffix = {Path(name).suffix: data for name, data in files.items()}
    is_pair = by_suffix.keys() == {".json", ".safetensors"} and files.keys() == {path.name for path in paths}
    if is_pair and len(files) == 2 and not files.keys() <= {*_FILES}:  # named by a browser
        files = {named.CONFIG_NAME: by_suffix[".json"], named.TENSORS_NAME: by_suffix[".safetensors"]}
    for name, data in files.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_bytes(data)
    configs = [staged / name for name in files if Path(name).name in (_FILES[0], _FILES[2])]
    held = {path.parent for path in configs or staged.rglob("*.safetensors")} or {staged}
    tops = sorted(folder for folder in held if not held & set(folder.parents))
    if len(tops) > 1 and configs:
        names = listed(top.relative_to(staged).as_posix() for top in tops)
        raise ValueError(f"the upload holds {len(tops)} adapters ({names}); upload them one by one")
    try:
        return read_adapter(tops[0]), tops[0]
    except FileNotFoundError:
        names = listed(path.name for path in paths)
        raise ValueError(f"{names} is no whole adapter; {_NEEDED}") from None
    except ValueError as error:
        raise ValueError(_told(error, staged, "the upload")) from None


def _told(error: Exception, folder: Path, name: str) -> str:
    """Return what is wrong with the files in a folder, without saying where that is."""
    return printable(str(error).replace(f"{folder}/", "").replace(str(folder), name), 1000)

"""The files of an adapter in a studio: what makes it, its label and thumbnail, and what a visitor sends."""

import io
import re
import unicodedata
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from ether_diffusion.adapters import Adapter, read_adapter
from ether_diffusion.adapters.card import model_card
from ether_diffusion.adapters.control_encoder import control_files
from ether_diffusion.adapters.format import (
    CARD_NAME,
    CONFIG_NAME,
    CONTROL_CONFIG_NAME,
    ENCODER_NAME,
    EXPORT_NAME,
    TENSORS_NAME,
)
from ether_diffusion.adapters.models import COMPONENTS
from ether_diffusion.adapters.save import adapter_files
from ether_diffusion.strict_json import StrictModel, read_json
from ether_diffusion.training.plain_files import UnusableFileError, read_plain_file
from ether_diffusion.training.result import FINAL, SAMPLES_FOLDER
from ether_diffusion.ui.uploads import MAX_PHOTO_BYTES, read_sent, thumbnail_png
from ether_diffusion.wording import listed, printable

LABEL_NAME, THUMBNAIL_NAME = "studio.json", "thumbnail.png"
MAX_CHARACTERS = 80
"""Of a name."""
MAX_SECONDS = 253e9
"""Since 1970, until the end of 9986."""
_NEEDED = (
    f"give a zip of its folder, or its {TENSORS_NAME} together with its {CONFIG_NAME} "
    f"(and {CONTROL_CONFIG_NAME} with {ENCODER_NAME} for control)"
)


class Label(StrictModel):
    """An adapter's name, with invisible characters escaped, and when it came."""

    name: str
    created: datetime

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        return self.model_dump_json().encode()


def check_name(name: str) -> str:
    """Return a name as it is kept: without outer spaces, with invisible characters escaped.

    Raises:
        ValueError: nothing is left of it, or it is too long.
    """
    plain = printable(" ".join(unicodedata.normalize("NFC", name).split()), 10 * MAX_CHARACTERS)
    if not plain:
        raise ValueError("the name is empty; type one")
    if len(plain) > MAX_CHARACTERS:
        raise ValueError(f"the name has {len(plain)} characters; use at most {MAX_CHARACTERS}")
    return plain


def read_label(folder: Path) -> Label:
    """Return the label of an adapter; one without is called as its folder, and as old as its files."""
    try:
        data = read_plain_file(folder / LABEL_NAME, inside=folder, max_bytes=4096)
        found = read_json(data, Label, LABEL_NAME)
        name, seconds = check_name(found.name), found.created.timestamp()
    except (OSError, ValueError, OverflowError):  # not there, or nobody's label
        dated = next((path for path in (folder / CONFIG_NAME, folder) if path.exists()), None)
        name, seconds = printable(folder.name), 0 if dated is None else dated.stat().st_mtime
    return Label(name=name, created=datetime.fromtimestamp(min(max(seconds, 0), MAX_SECONDS), UTC))


def file_stem(name: str, otherwise: str) -> str:
    """Return the name of a download: the plain letters and digits of a name, or another word."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")[:40] or otherwise


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the files in a folder that make an adapter, with its card, LoRA file and thumbnail."""
    parts = ("", *(f"{name}/" for name in COMPONENTS))
    names = [f"{part}{name}" for part in parts for name in (CONFIG_NAME, TENSORS_NAME)]
    names += [CONTROL_CONFIG_NAME, ENCODER_NAME, CARD_NAME, EXPORT_NAME]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()} | thumbnail(
        folder
    )


def files_of(adapter: Adapter) -> dict[str, bytes]:
    """Return the files of an adapter and its encoder as we write them, with a card of ours."""
    files: dict[str, bytes] = {}
    for component, part in adapter.parts.items():
        prefix = "" if component == "unet" else f"{component}/"
        files |= {f"{prefix}{name}": data for name, data in adapter_files(part).items()}
    unet = adapter.parts.get("unet")
    if adapter.encoder is not None:
        files |= control_files(adapter.encoder, None if unet is None else unet.tensors)
    if unet is not None:
        files[CARD_NAME] = model_card(unet, has_lora_export=False).encode()
    return files


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


def zip_bytes(files: Mapping[str, bytes], folder_name: str) -> bytes:
    """Return a zip of files in one folder; the same files give the same bytes."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(f"{folder_name}/{name}"), content, zipfile.ZIP_DEFLATED)
    return data.getvalue()


def read_upload(paths: Sequence[Path], staged: Path) -> tuple[Adapter, Path]:
    """Read an adapter that was sent, as a zip or as files; return it, and where in `staged` it lies.

    A browser may have numbered the files' names.

    Raises:
        ValueError: it is no whole adapter; the message says what was found.
    """
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
    is_loose = files.keys() == {path.name for path in paths}
    is_canonical = files.keys() <= {CONFIG_NAME, TENSORS_NAME, CONTROL_CONFIG_NAME, ENCODER_NAME}
    if is_loose and len(files) == 2 and by_suffix.keys() == {".json", ".safetensors"} and not is_canonical:
        files = {CONFIG_NAME: by_suffix[".json"], TENSORS_NAME: by_suffix[".safetensors"]}
    for name, data in files.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_bytes(data)
    configs = [staged / name for name in files if Path(name).name in (CONFIG_NAME, CONTROL_CONFIG_NAME)]
    held = {path.parent for path in configs or staged.rglob("*.safetensors")} or {staged}
    tops = sorted(folder for folder in held if not held & set(folder.parents))
    if len(tops) > 1 and configs:
        names = listed(top.relative_to(staged).as_posix() for top in tops)
        raise ValueError(f"the upload holds {len(tops)} adapters ({names}); upload them one by one")
    try:
        return read_adapter(tops[0]), tops[0]
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError):
            names = listed(path.name for path in paths)
            raise ValueError(f"{names} is no whole adapter; {_NEEDED}") from None
        raise ValueError(told(error, staged, "the upload")) from None


def told(error: Exception, folder: Path, name: str) -> str:
    """Return what is wrong with the files in a folder, without saying where that is."""
    return printable(str(error).replace(f"{folder}/", "").replace(str(folder), name), 1000)

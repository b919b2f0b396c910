"""What the studio shows of an adapter, and which files of its folder belong to it."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

from ether_diffusion.adapters import Adapter, read_adapter
from ether_diffusion.adapters.format import (
    CARD_NAME,
    CONFIG_NAME,
    CONTROL_CONFIG_NAME,
    ENCODER_NAME,
    EXPORT_NAME,
    TENSORS_NAME,
    content_hash,
)
from ether_diffusion.adapters.models import COMPONENTS
from ether_diffusion.training.plain_files import read_plain_file
from ether_diffusion.training.result import FINAL, SAMPLES_FOLDER
from ether_diffusion.ui.run_status import samples_by_step
from ether_diffusion.ui.thumbnails import thumbnail_png
from ether_diffusion.ui.uploads import MAX_PHOTO_BYTES

THUMBNAIL_NAME = "thumbnail.png"


def steps_of(adapter: Adapter) -> int | None:
    """Return the updates that an adapter was trained for, if it says so."""
    steps = adapter.metadata.training.get("steps")
    return steps if isinstance(steps, int) and not isinstance(steps, bool) else None


def hash_of(adapter: Adapter) -> str:
    """Return the content hash of the first part, as pictures name it; else that of the encoder."""
    return next(iter(adapter.hashes.values()), "") or content_hash(adapter.encoder.state_dict())  # type: ignore[union-attr]  # an adapter without parts has one


def file_names() -> list[str]:
    """Return the names of all files that make an adapter, relative to its folder."""
    parts = ["" if name == "unet" else f"{name}/" for name in ("unet", *COMPONENTS)]
    return [
        *(f"{part}{name}" for part in parts for name in (CONFIG_NAME, TENSORS_NAME)),
        CONTROL_CONFIG_NAME,
        ENCODER_NAME,
    ]


def download_files(folder: Path) -> dict[str, bytes]:
    """Return the files of an adapter that belong to it, with its card, LoRA file and thumbnail.

    The thumbnail of a run is its first picture.

    Raises:
        FileNotFoundError, ValueError: there is no whole adapter.
    """
    read_adapter(folder)
    names = [*file_names(), CARD_NAME, EXPORT_NAME, THUMBNAIL_NAME]
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if THUMBNAIL_NAME not in files:
        picture = _first_picture(folder)
        if picture is not None:
            files[THUMBNAIL_NAME] = thumbnail_bytes(picture)
    return files


def thumbnail_bytes(picture: Path) -> bytes:
    """Return a small PNG of a picture.

    Raises:
        ValueError: it is no picture that can be used.
    """
    data = read_plain_file(picture, inside=picture.parent, max_bytes=MAX_PHOTO_BYTES)
    return thumbnail_png(data, picture.suffix)


def zip_bytes(files: Mapping[str, bytes], folder_name: str) -> bytes:
    """Return a zip of files in one folder; the same files give the same bytes."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(f"{folder_name}/{name}"), content, zipfile.ZIP_DEFLATED)
    return data.getvalue()


def _first_picture(folder: Path) -> Path | None:
    final = sorted((folder / SAMPLES_FOLDER / FINAL).glob("*.png"))
    if final:
        return final[0]
    steps = list(samples_by_step(folder).values())
    return steps[-1][0] if steps else None

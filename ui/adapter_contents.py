"""What an adapter's folder holds, read strictly, and which of its files belong to it."""

import io
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ether_diffusion.adapters import Adapter, AdapterMetadata
from ether_diffusion.adapters.content_hash import content_hash
from ether_diffusion.adapters.export import EXPORT_NAME, Component, read_adapters
from ether_diffusion.adapters.parts import COMPONENTS
from ether_diffusion.adapters.source import CONFIG_NAME, TENSORS_NAME, find_source
from ether_diffusion.adapters.writer import CARD_NAME
from ether_diffusion.control import ControlEncoder
from ether_diffusion.control.reader import CONTROL_CONFIG_NAME, ENCODER_NAME, read_control_from
from ether_diffusion.training.result import FINAL
from ether_diffusion.training.samples import FOLDER as SAMPLES_FOLDER
from ether_diffusion.ui.run_log import samples_by_step
from ether_diffusion.ui.uploads import write_thumbnail

THUMBNAIL_NAME = "thumbnail.png"
_METHODS = {"ether": "ETHER", "ether_plus": "ETHER+"}


@dataclass(frozen=True)
class Contents:
    """The adapters of a folder by component, and the control encoder that belongs to them, if any."""

    adapters: Mapping[Component, Adapter]
    encoder: ControlEncoder | None

    @property
    def metadata(self) -> AdapterMetadata:
        """What the first adapter says of itself."""
        return next((each.metadata for each in self.adapters.values()), AdapterMetadata())

    @property
    def method(self) -> str:
        """The method's name for people."""
        found = [_METHODS[each.config.variant] for each in self.adapters.values()]
        return found[0] if found else "control encoder alone"

    @property
    def steps(self) -> int | None:
        """The updates that it was trained for, if it says so."""
        steps = self.metadata.training.get("steps")
        return steps if isinstance(steps, int) and not isinstance(steps, bool) else None

    @property
    def num_parameters(self) -> int:
        """Numbers in all adapters and the encoder."""
        own: int = sum(tensor.numel() for each in self.adapters.values() for tensor in each.tensors.values())
        control: Iterable[torch.Tensor] = () if self.encoder is None else self.encoder.parameters()
        return own + sum(parameter.numel() for parameter in control)

    @property
    def hash(self) -> str:
        """The content hash of the first adapter, as pictures name it; else that of the encoder."""
        for each in self.adapters.values():
            return content_hash(each.tensors)
        return "" if self.encoder is None else content_hash(self.encoder.state_dict())


def read_contents(folder: Path) -> Contents:
    """Read an adapter and, where there is one, its control encoder.

    Raises:
        FileNotFoundError: the folder holds neither.
        ValueError: something is damaged, or adapter and encoder do not belong together.
    """
    encoder, adapter_sha256 = None, None
    if (folder / CONTROL_CONFIG_NAME).exists():
        encoder, adapter_sha256 = read_control_from(find_source(folder, revision=None, local_files_only=True))
    if encoder is not None and adapter_sha256 is None and not (folder / CONFIG_NAME).exists():
        return Contents({}, encoder)
    adapters = read_adapters(folder)
    if encoder is not None and content_hash(adapters["unet"].tensors) != adapter_sha256:
        raise ValueError("adapter and control encoder were not saved together; fetch or save both again")
    return Contents(adapters, encoder)


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
    read_contents(folder)
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
    with TemporaryDirectory() as folder:
        path = Path(folder) / THUMBNAIL_NAME
        write_thumbnail(picture, path)
        return path.read_bytes()


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

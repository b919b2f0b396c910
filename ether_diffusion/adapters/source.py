"""Where an adapter comes from: a folder, or a model of the Hugging Face Hub. Sizes are checked first."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ether_diffusion.adapters.foreign import foreign_kind
from ether_diffusion.adapters.tensor_file import read_shapes
from ether_diffusion.wording import printable

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


@dataclass(frozen=True)
class Source:
    """A place that adapter files are read from: a local folder, or a Hub model where `folder` is None."""

    name: str
    folder: Path | None
    revision: str | None = None
    local_files_only: bool = False

    def read(self, subfolder: str | None, name: str, max_bytes: int) -> bytes | None:
        """Return a file's bytes, None where there is no such file.

        Raises:
            ValueError: it is not a regular file, or larger than `max_bytes`.
            FileNotFoundError: the Hub has no such model, or cannot be reached.
        """
        path = self._path(subfolder, name, max_bytes)
        if path is None or not path.exists():
            return None
        where = printable(path)
        if not path.is_file():
            raise ValueError(f"{where} is not a regular file; give a folder that holds an adapter")
        _check_size(where, path.stat().st_size, max_bytes)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)  # it may have grown since
        _check_size(where, len(data), max_bytes)
        return data

    def holds(self, subfolder: str | None, name: str) -> bool:
        """Say whether there is such a file, without fetching it."""
        if self.folder is not None:
            return (self.folder / (subfolder or "") / name).exists()
        if self.local_files_only:
            return False
        in_repository = "/".join(filter(None, (subfolder, name)))
        return bool(huggingface_hub.file_exists(self.name, in_repository, revision=self.revision))

    def _path(self, subfolder: str | None, name: str, max_bytes: int) -> Path | None:
        if self.folder is not None:
            return self.folder / (subfolder or "") / name
        fetch = partial(
            huggingface_hub.hf_hub_download,
            self.name,
            name,
            subfolder=subfolder,
            revision=self.revision,
            local_files_only=self.local_files_only,
        )
        try:
            if not self.local_files_only:
                planned = fetch(dry_run=True)
                assert isinstance(planned, huggingface_hub.DryRunFileInfo)
                _check_size(f"{printable(self.name)}/{name}", planned.file_size or 0, max_bytes)
            return Path(str(fetch()))
        except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            if isinstance(error, LocalEntryNotFoundError) and self.local_files_only:
                return None
            reason = printable(str(error).strip().partition("\n")[0], 200)
            raise FileNotFoundError(
                f"found no folder {printable(self.name)}, and the Hub did not give {name} of a model of that "
                f"name ({reason}); check the spelling, the connection and the access"
            ) from None


def find_source(path_or_hub_id: str | Path, *, revision: str | None, local_files_only: bool) -> Source:
    """Tell a folder from a Hub id; what exists on disk is taken from there.

    Raises:
        ValueError: it is a single file.
        FileNotFoundError: it is neither a folder nor a possible Hub id.
    """
    shown = printable(path_or_hub_id, 300)
    try:
        path = Path(path_or_hub_id)
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError):  # a NUL or a name too long for the file system
        exists, is_folder = False, False
    if is_folder and str(path_or_hub_id):  # Path("") is the working directory
        if revision is not None:
            raise ValueError(f"{shown} is a folder, which has no revisions; leave revision out")
        return Source(str(path), path)
    if exists and not is_folder:
        raise ValueError(
            f"{shown} is a file{_kind_of(path)}; give the folder that holds {CONFIG_NAME} and {TENSORS_NAME}"
        )
    if isinstance(path_or_hub_id, str) and path_or_hub_id.count("/") == 1:
        try:
            validate_repo_id(path_or_hub_id)
        except HFValidationError:
            pass
        else:
            local_files_only = local_files_only or huggingface_hub.is_offline_mode()
            return Source(path_or_hub_id, None, revision, local_files_only)
    shown = shown or "(an empty name)"
    raise FileNotFoundError(
        f"there is no folder {shown}; give an adapter's folder or a Hub id like name/adapter"
    )


def _check_size(where: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ValueError(f"{where} has {size} bytes; an adapter's has at most {max_bytes}")


def _kind_of(path: Path) -> str:
    kind = foreign_kind(read_shapes(path)) if path.is_file() and path.suffix == ".safetensors" else None
    return "" if kind is None else f" ({kind})"

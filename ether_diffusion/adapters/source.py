"""Where an adapter comes from, a folder or a model of the Hugging Face Hub, and what may be there instead."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ether_diffusion.adapters.format import CONFIG_NAME, EXPORT_NAME, PICKLE_NAME, TENSORS_NAME
from ether_diffusion.adapters.tensor_file import Shape, read_shapes
from ether_diffusion.wording import printable

DIFFUSERS_HINT, PEFT_HINT = "use pipe.load_lora_weights", "use peft.PeftModel.from_pretrained"
_KINDS = (
    # (parts of a tensor's name, what it is, the axis that is the rank, who reads it)
    (
        ("lora_down.", "lora.down.", "lora_A", "lora_linear_layer.down"),
        "a LoRA",
        0,
        DIFFUSERS_HINT,
    ),
    (("lora_up.", "lora.up.", "lora_B", "lora_linear_layer.up"), "a LoRA", 1, DIFFUSERS_HINT),
    (("hada_w1_", "hada_w2_"), "a LoHa", None, DIFFUSERS_HINT),
    (("lokr_w1", "lokr_w2"), "a LoKr", None, DIFFUSERS_HINT),
    (("oft_R", "oft_r", "oft_blocks", "oft_diag"), "an OFT adapter", None, PEFT_HINT),
    (("boft_R", "boft_s"), "a BOFT adapter", None, PEFT_HINT),
    (("hra_u",), "an HRA adapter", None, PEFT_HINT),
    (("ia3_l",), "an IA³ adapter", None, PEFT_HINT),
    (("delora_",), "a DeLoRA adapter", None, PEFT_HINT),
    (("full_weight", "full_bias"), "a full fine-tuning", None, PEFT_HINT),
)


def foreign_kind(shapes: Mapping[str, Shape]) -> str | None:
    """Say what kind of adapter tensors of these names and shapes are, and what to use; None if not known."""
    for parts, kind, rank_axis, hint in _KINDS:
        found = [shape for name, shape in shapes.items() if any(part in name for part in parts)]
        if found:
            ranks = sorted(
                {shape[rank_axis] for shape in found if rank_axis is not None and len(shape) > rank_axis}
            )
            shown = " to ".join(str(rank) for rank in dict.fromkeys(ranks[:1] + ranks[-1:]))
            rank = f" of rank{'s' if ranks[1:] else ''} {shown}" if ranks else ""
            return f"this is {kind}{rank}; {hint}"
    return None


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

    def refuse_missing(self, subfolder: str | None, name: str) -> NoReturn:
        """Raise what says that a file of an adapter is missing, and what else there is in its place."""
        place = printable("/".join(filter(None, (self.name, subfolder))), 300)
        kind = self._other_kind(subfolder)
        if kind is not None:
            raise ValueError(f"{place} holds no adapter that is read: {kind}")
        if self.folder is None and self.local_files_only:
            raise FileNotFoundError(f"{name} of {place} has not been downloaded; allow access to the Hub")
        raise FileNotFoundError(
            f"{place} has no {name}; give the folder of an ETHER adapter, as save_ether writes it"
        )

    def _other_kind(self, subfolder: str | None) -> str | None:
        if self.holds(subfolder, PICKLE_NAME):
            return f"{PICKLE_NAME} is a pickle, which can run code and is not read; ask for {TENSORS_NAME}"
        if self.folder is None:
            return f"this is a LoRA; {DIFFUSERS_HINT}" if self.holds(subfolder, EXPORT_NAME) else None
        paths = sorted((self.folder / (subfolder or "")).glob("*.safetensors"))[:8]
        kinds = (foreign_kind(read_shapes(path)) for path in paths if path.is_file())
        return next((kind for kind in kinds if kind is not None), None)

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

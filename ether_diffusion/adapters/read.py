"""Reading an adapter of any method, once: everything that can be checked without a model is checked here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ether_diffusion.adapters import tensor_file
from ether_diffusion.adapters.format import (
    CONFIG_NAME,
    CONTROL_CONFIG_NAME,
    ENCODER_NAME,
    EXPORT_NAME,
    PICKLE_NAME,
    TENSORS_NAME,
    Adapter,
    AdapterPart,
    Component,
    parse_metadata,
)
from ether_diffusion.adapters.methods import (
    check_layout,
    method_of,
    modules_of,
    parse_config,
    title_of,
    usable_values,
)
from ether_diffusion.adapters.models import COMPONENTS, TEXT_ENCODERS, plain_name
from ether_diffusion.adapters.tensor_file import PEFT_PREFIX, Shape, open_tensors, read_shapes
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.wording import listed, printable

if TYPE_CHECKING:
    from ether_diffusion.adapters.control_encoder import ControlEncoder

MAX_CONFIG_BYTES = 2**20
ON_THE_HUB = ("unet", *TEXT_ENCODERS[:2], "transformer_2")
"""The components that the Hub is asked for where nobody says which; a folder says what it holds."""
_DIFFUSERS, _PEFT = "use pipe.load_lora_weights", "use peft.PeftModel.from_pretrained"
_KINDS: tuple[tuple[tuple[str, ...], str, int | None, str], ...] = (
    # (parts of a tensor's name, what it is, the axis that is the rank, who reads it)
    (("lora_down.", "lora.down.", "lora_A", "lora_linear_layer.down"), "a LoRA", 0, _DIFFUSERS),
    (("lora_up.", "lora.up.", "lora_B", "lora_linear_layer.up"), "a LoRA", 1, _DIFFUSERS),
    (("hada_w1_", "hada_w2_"), "a LoHa", None, _DIFFUSERS),
    (("lokr_w1", "lokr_w2"), "a LoKr", None, _DIFFUSERS),
    (("oft_R", "oft_r", "oft_blocks", "oft_diag"), "an OFT adapter", None, _PEFT),
    (("boft_R", "boft_s"), "a BOFT adapter", None, _PEFT),
    (("hra_u",), "an HRA adapter", None, _PEFT),
    (("ia3_l",), "an IA³ adapter", None, _PEFT),
    (("delora_",), "a DeLoRA adapter", None, _PEFT),
    (("full_weight", "full_bias"), "a full fine-tuning", None, _PEFT),
)


def read_adapter(
    path_or_hub_id: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    components: Sequence[Component] | None = None,
    with_encoder: bool | None = None,
    only_ether: bool = False,
) -> Adapter:
    """Read an adapter of any method strictly, touching no model: PEFT's layout, and a control encoder's.

    Args:
        path_or_hub_id: a folder, or a model of the Hugging Face Hub; what exists on disk is taken from there.
        subfolder: where in it the adapter lies.
        revision: branch, tag or commit of the Hub model.
        local_files_only: do not ask the Hub, use what was downloaded before.
        components: which are looked for; None is all that a folder holds, the usual ones of the Hub.
        with_encoder: whether a control encoder is looked for; None is so in a folder, and not on the Hub.
        only_ether: refuse adapters of other methods, saying who reads them.

    Raises:
        FileNotFoundError: there is no such folder, model or file.
        ValueError: a file is not a whole, finite adapter of one method that is read; the message says what
            was found.
    """
    source = find_source(path_or_hub_id, revision=revision, local_files_only=local_files_only)
    is_folder = source.folder is not None
    place = source.shown(subfolder)
    encoder, adapter_sha256 = None, None
    if is_folder if with_encoder is None else with_encoder:
        encoder, adapter_sha256 = read_encoder(source, subfolder)
    if components is None:
        components = ("unet", *COMPONENTS) if is_folder else ON_THE_HUB
    parts = {}
    for component in components:
        inner = "/".join(filter(None, (subfolder, None if component == "unet" else component)))
        part = _read_part(source, inner or None, only_ether=only_ether)
        if part is not None:
            parts[component] = part
    if not parts and adapter_sha256 is not None:
        raise FileNotFoundError(
            f"{place} has no {CONFIG_NAME}, the adapter that its control encoder was trained with; fetch or "
            "save both again"
        )
    if not parts and encoder is None:
        source.refuse_missing(subfolder, CONFIG_NAME)
    adapter = Adapter(parts, encoder, place)
    if encoder is not None and parts and adapter.hashes.get("unet") != adapter_sha256:
        raise ValueError(
            f"{place} holds an adapter and a control encoder that were not saved together; fetch or save "
            "both again"
        )
    if len({method_of(part.config).title for part in parts.values()}) > 1:
        raise ValueError(f"{place} holds adapters of several methods; save one adapter a folder")
    return adapter


def _read_part(source: "Source", subfolder: str | None, *, only_ether: bool) -> AdapterPart | None:
    data = source.read(subfolder, CONFIG_NAME, MAX_CONFIG_BYTES)
    if data is None:
        return None
    place = source.shown(subfolder)
    config = parse_config(data, f"{place}/{CONFIG_NAME}", only_ether=only_ether)
    if isinstance(config, EtherConfig) and config.modules_to_save:
        raise ValueError(
            f"{place} also carries whole modules (modules_to_save={listed(config.modules_to_save)}), which "
            "are not vectors of ETHER; use peft.PeftModel.from_pretrained"
        )
    data = source.read(subfolder, TENSORS_NAME, tensor_file.MAX_FILE_BYTES)
    if data is None:
        source.refuse_missing(subfolder, TENSORS_NAME)
    file = open_tensors(data, f"{place}/{TENSORS_NAME}")
    names = {name: plain_name(name.removeprefix(PEFT_PREFIX)) for name in file.shapes}
    if len(set(names.values())) < len(names):
        raise ValueError(
            f"{file.where} holds tensors of one projection under two names; save the adapter again"
        )
    shapes = {names[name]: shape for name, shape in file.shapes.items()}
    if not modules_of(config, shapes)[0] and (kind := foreign_kind(shapes)) is not None:
        raise ValueError(f"{file.where} is no {title_of(config)} adapter: {kind}")
    modules = check_layout(config, shapes, file.where)
    if len({name.startswith(PEFT_PREFIX) for name in names}) > 1:
        raise ValueError(
            f"{file.where} holds tensors both with and without the prefix {PEFT_PREFIX}; keep one set"
        )
    tensors = usable_values(config, {names[n]: tensor for n, tensor in file.tensors().items()}, file.where)
    metadata = parse_metadata(file.metadata, file.where)
    base = metadata.base_fingerprint
    if base is not None and len(base.norms) != len(modules):
        raise ValueError(
            f"{file.where} holds {len(modules)} projections and its header speaks of {len(base.norms)}; "
            "it is not whole, fetch or save it again"
        )
    if any(name.removeprefix(PEFT_PREFIX) != plain for name, plain in names.items()):
        # once saved from beneath another adapter; the hash of its base was taken over the wrong names
        metadata = replace(metadata, base_fingerprint=None)
    if not isinstance(config, EtherConfig):
        metadata = replace(
            metadata,
            base_model=metadata.base_model or config.base_model_name_or_path,
            trigger=metadata.trigger or file.metadata.get("trigger"),
        )
    return AdapterPart(config, tensors, metadata)


def read_encoder(source: "Source", subfolder: str | None) -> "tuple[ControlEncoder | None, str | None]":
    """Read a control encoder, frozen, on the CPU, and the hash of its adapter; None where there is none."""
    data = source.read(subfolder, CONTROL_CONFIG_NAME, MAX_CONFIG_BYTES)
    if data is None:
        return None, None
    # diffusers' own, which takes seconds to import
    from ether_diffusion.adapters.control_encoder import parse_control_config, parse_encoder

    place = source.shown(subfolder)
    config, adapter_sha256 = parse_control_config(data, f"{place}/{CONTROL_CONFIG_NAME}")
    data = source.read(subfolder, ENCODER_NAME, tensor_file.MAX_FILE_BYTES)
    if data is None:
        raise FileNotFoundError(f"{place} has no {ENCODER_NAME}; fetch or save the adapter again")
    return parse_encoder(data, config, f"{place}/{ENCODER_NAME}"), adapter_sha256


def foreign_kind(shapes: Mapping[str, Shape]) -> str | None:
    """Say what kind of adapter tensors of these names and shapes are, and what to use; None if not known."""
    for words, kind, axis, hint in _KINDS:
        found = [shape for name, shape in shapes.items() if any(word in name for word in words)]
        if found:
            ranks = sorted({shape[axis] for shape in found if axis is not None and len(shape) > axis})
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

    def shown(self, subfolder: str | None) -> str:
        """Return the name of a place in it, for people."""
        return printable("/".join(filter(None, (self.name, subfolder))), 300)

    def read(self, subfolder: str | None, name: str, max_bytes: int) -> bytes | None:
        """Return a file's bytes, None where there is no such file."""
        if self.folder is None:
            path = self._fetched(subfolder, name, max_bytes)
        else:
            path = self.folder / (subfolder or "") / name
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
        place, kind = self.shown(subfolder), None
        if self.holds(subfolder, PICKLE_NAME):
            kind = f"{PICKLE_NAME} is a pickle, which can run code and is not read; ask for {TENSORS_NAME}"
        elif self.folder is not None:
            paths = sorted((self.folder / (subfolder or "")).glob("*.safetensors"))[:8]
            kind = next(filter(None, (foreign_kind(read_shapes(p)) for p in paths if p.is_file())), None)
        elif self.holds(subfolder, EXPORT_NAME):
            kind = f"this is a LoRA; {_DIFFUSERS}"
        if kind is not None:
            raise ValueError(f"{place} holds no adapter that is read: {kind}")
        if self.folder is None and self.local_files_only:
            raise FileNotFoundError(f"{name} of {place} has not been downloaded; allow access to the Hub")
        raise FileNotFoundError(
            f"{place} has no {name}; give the folder of an ETHER adapter, as save_ether writes it"
        )

    def _fetched(self, subfolder: str | None, name: str, max_bytes: int) -> Path | None:
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
            is_local = isinstance(error, LocalEntryNotFoundError)
            if self.local_files_only if is_local else isinstance(error, EntryNotFoundError):
                return None
            reason = printable(str(error).strip().partition("\n")[0], 200)
            raise FileNotFoundError(
                f"found no folder {printable(self.name)}, and the Hub did not give {name} of a model of that "
                f"name ({reason}); check the spelling, the connection and the access"
            ) from None


def find_source(path_or_hub_id: str | Path, *, revision: str | None, local_files_only: bool) -> Source:
    """Tell a folder from a Hub id; what exists on disk is taken from there."""
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
        is_tensors = path.is_file() and path.suffix == ".safetensors"
        kind = foreign_kind(read_shapes(path)) if is_tensors else None
        also = "" if kind is None else f" ({kind})"
        raise ValueError(
            f"{shown} is a file{also}; give the folder that holds {CONFIG_NAME} and {TENSORS_NAME}"
        )
    if isinstance(path_or_hub_id, str) and path_or_hub_id.count("/") == 1:
        try:
            validate_repo_id(path_or_hub_id)
        except HFValidationError:
            pass
        else:
            offline = local_files_only or huggingface_hub.is_offline_mode()
            return Source(path_or_hub_id, None, revision, offline)
    raise FileNotFoundError(
        f"there is no folder {shown or '(an empty name)'}; give an adapter's folder or a Hub id like "
        "name/adapter"
    )


def _check_size(where: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ValueError(f"{where} has {size} bytes; an adapter's has at most {max_bytes}")

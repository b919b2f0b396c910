"""Reading an adapter of any method, once: everything that can be checked without a model is checked here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ether_diffusion.adapters import format as names
from ether_diffusion.adapters import methods, tensor_file
from ether_diffusion.adapters.format import CONFIG_NAME, TENSORS_NAME, Adapter, AdapterPart, Component
from ether_diffusion.adapters.models import COMPONENTS, TEXT_ENCODERS, plain_name
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.wording import listed, printable

if TYPE_CHECKING:
    from ether_diffusion.adapters.control_encoder import ControlEncoder

MAX_CONFIG_BYTES = 2**20
ON_THE_HUB = ("unet", *TEXT_ENCODERS[:2], "transformer_2")
"""The components that the Hub is asked for where nobody says which; a folder says what it holds."""
_DIFFUSERS, _PEFT = "use pipe.load_lora_weights", "use peft.PeftModel.from_pretrained"
_FOREIGN = (
    ("a LoRA", "lora_down. lora.down. lora_up. lora.up. lora_A lora_B lora_linear_layer.", _DIFFUSERS),
    ("a LoHa", "hada_w1_ hada_w2_", _DIFFUSERS),
    ("a LoKr", "lokr_w1 lokr_w2", _DIFFUSERS),
    ("a BOFT adapter", "boft_R boft_s", _PEFT),
    ("an OFT adapter", "oft_R oft_r oft_blocks oft_diag", _PEFT),
    ("an HRA adapter", "hra_u", _PEFT),
    ("an IA³ adapter", "ia3_l", _PEFT),
    ("a DeLoRA adapter", "delora_", _PEFT),
    ("a full fine-tuning", "full_weight full_bias", _PEFT),
)
"""What tensors are, parts of their names, and who reads them."""


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
    is_folder, place = source.folder is not None, source.shown(subfolder)
    encoder, sha256 = None, None
    if is_folder if with_encoder is None else with_encoder:
        encoder, sha256 = read_encoder(source, subfolder)
    if components is None:
        components = ("unet", *COMPONENTS) if is_folder else ON_THE_HUB
    places = {c: "/".join(filter(None, (subfolder, "" if c == "unet" else c))) or None for c in components}
    found = {c: _read_part(source, inner, only_ether=only_ether) for c, inner in places.items()}
    adapter = Adapter({c: part for c, part in found.items() if part is not None}, encoder, place)
    if not adapter.parts and (encoder is None or sha256 is not None):
        source.refuse_missing(subfolder, CONFIG_NAME)
    if encoder is not None and adapter.parts and adapter.hashes.get("unet") != sha256:
        raise ValueError(f"{place} holds an adapter and an encoder that were not saved together")
    if len({methods.name_of(part.config) for part in adapter.parts.values()}) > 1:
        raise ValueError(f"{place} holds adapters of several methods; save one adapter a folder")
    return adapter


def _read_part(source: "Source", subfolder: str | None, *, only_ether: bool) -> AdapterPart | None:
    data = source.read(subfolder, CONFIG_NAME, MAX_CONFIG_BYTES)
    if data is None:
        return None
    config = methods.parse_config(data, f"{source.shown(subfolder)}/{CONFIG_NAME}", only_ether=only_ether)
    if isinstance(config, EtherConfig):
        check_no_modules(config, source.shown(subfolder))
    data = source.read(subfolder, TENSORS_NAME, tensor_file.MAX_FILE_BYTES)
    if data is None:
        source.refuse_missing(subfolder, TENSORS_NAME)
    where = f"{source.shown(subfolder)}/{TENSORS_NAME}"
    found, header = tensor_file.open_tensors(data, where)
    stems = {name: name.removeprefix(tensor_file.PEFT_PREFIX) for name in found}
    plain = {name: plain_name(stem) for name, stem in stems.items()}
    if len(set(plain.values())) < len(plain) or len({name == stem for name, stem in stems.items()}) > 1:
        raise ValueError(f"{where} names tensors both with and without a prefix; save the adapter again")
    tensors = {plain[name]: tensor for name, tensor in found.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    kind = None if methods.modules_of(config, shapes)[0] else foreign_kind(shapes)
    if kind is not None:
        raise ValueError(f"{where} is no {methods.title_of(config)} adapter: {kind}")
    modules, metadata = methods.check_layout(config, shapes, where), names.parse_metadata(header, where)
    base = metadata.base_fingerprint
    if base is not None and len(base.norms) != len(modules):
        raise ValueError(
            f"{where} holds {len(modules)} projections and its header speaks of {len(base.norms)}; "
            "it is not whole, fetch or save it again"
        )
    if any(stems[name] != plain[name] for name in plain):
        # once saved from beneath another adapter; the hash of its base was taken over the wrong names
        metadata = replace(metadata, base_fingerprint=None)
    if not isinstance(config, EtherConfig):
        base_model = metadata.base_model or config.base_model_name_or_path
        trigger = metadata.trigger or header.get("trigger")
        metadata = replace(metadata, base_model=base_model, trigger=trigger)
    return AdapterPart(config, methods.usable_values(config, tensors, where), metadata)


def check_no_modules(config: EtherConfig, where: str) -> None:
    """Refuse an adapter that also holds whole modules."""
    if config.modules_to_save:
        held = f"whole modules, too (modules_to_save={listed(config.modules_to_save)})"
        raise ValueError(f"{where} holds {held}, which are no vectors of ETHER; use PEFT's save_pretrained")


def read_encoder(source: "Source", subfolder: str | None) -> "tuple[ControlEncoder | None, str | None]":
    """Read a control encoder, frozen, on the CPU, and the hash of its adapter; None where there is none."""
    data = source.read(subfolder, names.CONTROL_CONFIG_NAME, MAX_CONFIG_BYTES)
    if data is None:
        return None, None
    # diffusers' own, which takes seconds to import
    from ether_diffusion.adapters.control_encoder import parse_control_config, parse_encoder

    place = source.shown(subfolder)
    config, sha256 = parse_control_config(data, f"{place}/{names.CONTROL_CONFIG_NAME}")
    data = source.read(subfolder, names.ENCODER_NAME, tensor_file.MAX_FILE_BYTES)
    if data is None:
        source.refuse_missing(subfolder, names.ENCODER_NAME)
    return parse_encoder(data, config, f"{place}/{names.ENCODER_NAME}"), sha256


def foreign_kind(found: Iterable[str]) -> str | None:
    """Say what kind of adapter tensors of these names are, and what to use; None if not known."""
    held = list(found)
    for kind, words, hint in _FOREIGN:
        if any(word in name for word in words.split() for name in held):
            return f"this is {kind}; {hint}"
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
        if self.holds(subfolder, names.PICKLE_NAME):
            kind = f"{names.PICKLE_NAME} is a pickle, which can run code; ask for {TENSORS_NAME}"
        elif self.folder is not None:
            paths = sorted((self.folder / (subfolder or "")).glob("*.safetensors"))[:8]
            kinds = (foreign_kind(tensor_file.read_names(path)) for path in paths if path.is_file())
            kind = next(filter(None, kinds), None)
        elif self.holds(subfolder, names.EXPORT_NAME):
            kind = f"this is a LoRA; {_DIFFUSERS}"
        if kind is not None:
            raise ValueError(f"{place} holds no adapter that is read: {kind}")
        if self.folder is None and self.local_files_only:
            raise FileNotFoundError(f"{name} of {place} has not been downloaded; allow access to the Hub")
        raise FileNotFoundError(f"{place} has no {name}; give the whole folder of an adapter")

    def _fetched(self, subfolder: str | None, name: str, max_bytes: int) -> Path | None:
        is_local = self.local_files_only
        where = {"subfolder": subfolder, "revision": self.revision, "local_files_only": is_local}
        fetch = partial(huggingface_hub.hf_hub_download, self.name, name, **where)
        try:
            if not is_local:
                planned = fetch(dry_run=True)
                assert isinstance(planned, huggingface_hub.DryRunFileInfo)
                _check_size(f"{printable(self.name)}/{name}", planned.file_size or 0, max_bytes)
            return Path(str(fetch()))
        except (EntryNotFoundError, OSError) as error:
            if (
                isinstance(error, EntryNotFoundError)
                and isinstance(error, LocalEntryNotFoundError) == is_local
            ):
                return None
            reason = printable(str(error).strip().partition("\n")[0], 200)
            raise FileNotFoundError(
                f"found no folder {printable(self.name)}, and the Hub did not give {name} of a model of that "
                f"name ({reason}); check the spelling, the connection and the access"
            ) from None


def find_source(path_or_hub_id: str | Path, *, revision: str | None, local_files_only: bool) -> Source:
    """Tell a folder from a Hub id; what exists on disk is taken from there."""
    shown = printable(path_or_hub_id, 300) or "(an empty name)"
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
        kind = foreign_kind(tensor_file.read_names(path)) if is_tensors else None
        raise ValueError(f"{shown} is a file{f' ({kind})' if kind else ''}; give the folder that holds it")
    if isinstance(path_or_hub_id, str) and path_or_hub_id.count("/") == 1:
        try:
            validate_repo_id(path_or_hub_id)
        except HFValidationError:
            pass
        else:
            offline = local_files_only or huggingface_hub.is_offline_mode()
            return Source(path_or_hub_id, None, revision, offline)
    raise FileNotFoundError(f"there is no folder {shown}; give a folder or a Hub id like name/adapter")


def _check_size(where: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ValueError(f"{where} has {size} bytes; an adapter's has at most {max_bytes}")

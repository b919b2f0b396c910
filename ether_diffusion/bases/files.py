"""The files of a base: found where they lie, and loaded part by part, with no weight missing."""

import inspect
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from ether_diffusion.bases.single_file import is_single_file, unpack_base
from ether_diffusion.tiny_world import resolve_base
from ether_diffusion.wording import listed, printable

logger = logging.getLogger(__name__)

_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.]+?))?"
    r"(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
"""As diffusers and transformers name the files of weights, older names of shards included."""


def find_variant(folder: Path, wanted: str | None = None) -> str | None:
    """Return the variant of the weights in a part's folder: the one wanted, else none, else the only one.

    Raises:
        ValueError: there are no weights, or those of several variants alone.
    """
    found = variants_of(path.name for path in folder.iterdir()) if folder.is_dir() else set()
    if wanted in found or None in found:
        return wanted if wanted in found else None
    if len(found) == 1:
        return found.pop()
    if found:
        raise ValueError(
            f"{folder} holds weights of the variants {listed(sorted(map(str, found)))} alone; leave the "
            "files of one there, or name it in training's --variant"
        )
    raise ValueError(f"{folder} holds no weights that diffusers reads; fetch or save the base again")


def check_variant(folder: Path, variant: str) -> None:
    """Refuse a variant that no part of a base has.

    Raises:
        ValueError: as said.
    """
    found = variants_of(path.name for path in folder.glob("*/*"))
    if variant not in found:
        known = listed([each or "none (plain files)" for each in sorted(found, key=str)])
        raise ValueError(
            f"{folder} holds no weights of the variant {printable(variant)} but of {known or 'none'}; "
            "name one that is there, or leave it out"
        )


def variants_of(names: Iterable[str]) -> set[str | None]:
    """Return the variants that files of these names are of, None among them for plain ones."""
    return {match["variant"] for name in names if (match := _FILE.fullmatch(name))}


def _safetensors(folder: Path, variant: str | None) -> list[Path]:
    """Return the files of a part's weights of a variant, in order."""
    found = [(path, _FILE.fullmatch(path.name)) for path in sorted(folder.glob("*.safetensors"))]
    return [path for path, match in found if match is not None and match["variant"] == variant]


def stored_dtype(folder: Path, variant: str | None = None) -> torch.dtype:
    """Return the dtype of the first floating-point tensor of a part's safetensors; float32 without any."""
    for path in _safetensors(folder, find_variant(folder, variant)):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                dtype = _FLOATS.get(file.get_slice(key).get_dtype())
                if dtype is not None:
                    return dtype
    return torch.float32


_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_part(
    kind: Any,
    folder: Path,
    subfolder: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> Any:
    """Load a model of diffusers or transformers, of whose weights none is missing; dtype None is as stored.

    Raises:
        ValueError: files are missing or damaged, or weights would be drawn at random.
    """
    place = folder / (subfolder or "")
    what = f"{subfolder or 'model'} in {folder}" if subfolder else f"{place.name} in {place.parent}"
    found = find_variant(place, variant)
    options: dict[str, Any] = {} if subfolder is None else {"subfolder": subfolder}
    if issubclass(kind, PreTrainedModel):  # its report then names keys of another shape
        options["ignore_mismatched_sizes"] = True
    if not any(place.glob("*.safetensors")):  # diffusers would look for one, and alarm of none
        options["use_safetensors"] = False
    try:
        options["dtype"] = dtype or stored_dtype(place, found)
        model, report = kind.from_pretrained(str(folder), variant=found, output_loading_info=True, **options)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"the {what} is damaged; fetch or save it again ({error})") from error
    lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if lacking:
        lacking -= _read_beneath_adapters(model, lacking, place, found)
    if lacking:
        raise ValueError(
            f"the {what} lacks weights of its class {kind.__name__}, which would be random numbers: "
            f"{listed(sorted(lacking), 3)}; fetch or save it again"
        )
    return model


def _read_beneath_adapters(model: nn.Module, lacking: set[str], place: Path, variant: str | None) -> set[str]:
    """Give a model its own weights that were saved beneath an adapter; return their names.

    PEFT wraps what it adapts, and `save_pretrained` names what it finds: X.base_layer.weight for X.weight.
    """
    read, adapters = set(), set()
    for path in _safetensors(place, variant):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                own = key.replace(".base_layer.", ".")
                if own != key and own in lacking:
                    dtype = next(model.parameters()).dtype
                    model.load_state_dict({own: file.get_tensor(key).to(dtype)}, strict=False, assign=True)
                    read.add(own)
                elif ".ether_" in key or ".lora_" in key:
                    adapters.add(key)
    if read:
        logger.warning(
            f"the model in {place} was saved with an adapter inside: its own weights are read, the adapter's "
            f"{len(adapters)} tensors are not, as their settings are not there; save adapters by save_ether"
        )
    return read


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON object of a base.

    Raises:
        ValueError: there is none.
    """
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder} has no {name}; name a whole Stable Diffusion pipeline")
    try:
        config = json.loads(path.read_bytes())  # diffusers writes -Infinity, which strict JSON has not
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch or save the base again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no JSON object; fetch or save the base again")
    return config


def find_folder(
    name: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of a base: a path as it is, the alias's, a hub id's download, or what a file holds.

    Raises:
        FileNotFoundError: a path that is not there.
        OSError: the Hub does not give it.
        ValueError: it is a single file that cannot be opened.
    """
    resolved = resolve_base(name)
    folder = Path(resolved)
    if folder.is_dir():
        return folder
    if is_single_file(folder):
        return unpack_base(folder)
    if folder.exists() or folder.is_absolute() or len(folder.parts) != 2 or resolved.startswith("."):
        raise FileNotFoundError(f"{resolved} is not the folder of a base model, nor a hub id like owner/name")
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    found = Path(DiffusionPipeline.download(resolved, variant=variant, **options))
    for lone in sorted(_lone_variants(found, resolved, revision)) if variant is None else ():
        DiffusionPipeline.download(resolved, variant=lone, **options)
    return found


def _lone_variants(folder: Path, repository: str, revision: str | None) -> set[str]:
    """Return the variants that the Hub has of parts without plain weights, which a download left out."""
    bare = {
        path.parent.name
        for path in folder.glob("*/config.json")
        if not variants_of(beside.name for beside in path.parent.iterdir())
    }
    try:
        files = get_cached_repo_tree(repository, revision=revision) if bare else []
    except CachedRepoTreeNotFoundError:  # whoever loads the part says what is missing
        return set()
    paths = [Path(file.path) for file in files]
    return {each for each in variants_of(path.name for path in paths if path.parent.name in bare) if each}


def find_part(
    name: str, files: Sequence[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Return the folder of one part of a base: a path as it is, or a hub id's download of the files named.

    Raises:
        FileNotFoundError: it is no folder, and the Hub does not give it.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(files), local_files_only=local_files_only
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"{name} is no folder, and the Hub does not give it; give a folder or a hub id ({reason})"
        ) from error


def load_pipeline(
    folder: Path,
    kind: Any = DiffusionPipeline,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    **given: Any,
) -> Any:
    """Load a whole pipeline from a folder; each part in dtype, or as it is stored.

    What is given takes the place of the folder's own; None leaves a part out.

    Raises:
        ValueError: it or a part is of a class that is not known, or weights are missing or damaged.
    """
    index = read_config(folder, "model_index.json")
    if kind is DiffusionPipeline and isinstance(index.get("_class_name"), str):
        kind = _known_class(diffusers, index["_class_name"], str(folder))
    taken = inspect.signature(kind.__init__).parameters
    given = absent_parts(folder, kind) | given
    for name, entry in index.items():
        model = None if name in given else _model_class(folder / name, entry)
        if model is not None and (name in taken or kind is DiffusionPipeline):
            given[name] = load_part(model, folder / name, dtype=dtype, variant=variant)
    try:
        return kind.from_pretrained(str(folder), **given)
    except ImportError as error:
        raise ValueError(f"the base in {folder} needs what is not installed: {error}") from None


def absent_parts(folder: Path, kind: Any) -> dict[str, Any]:
    """Return None for each part of a pipeline that a base lacks, of which diffusers wants to be told."""
    taken, index = inspect.signature(kind.__init__).parameters, read_config(folder, "model_index.json")
    return {name: None for name, entry in index.items() if entry == [None, None] and name in taken}


def _model_class(folder: Path, entry: object) -> type | None:
    """Return the class of a part that has weights, which model_index.json names with its library."""
    if not (folder.is_dir() and isinstance(entry, list) and len(entry) == 2):
        return None
    if not variants_of(path.name for path in folder.iterdir()) and not (folder / "config.json").is_file():
        return None
    library, name = entry
    home = {"diffusers": diffusers, "transformers": transformers}.get(library)
    home = home or getattr(diffusers.pipelines, library, None)  # as of safety checkers
    if home is None:
        return None  # code of its own, which diffusers finds
    kind = _known_class(home, name, f"the {folder.name} in {folder.parent}")
    return kind if issubclass(kind, ModelMixin | PreTrainedModel) else None


def _known_class(library: Any, name: str, what: str) -> type:
    kind = getattr(library, name, None)
    if not isinstance(kind, type):
        raise ValueError(
            f"{what} is of the class {printable(name)}, which the installed {library.__name__.split('.')[0]} "
            "does not know; use another base"
        )
    return kind

"""A whole base model, found where it lies and loaded part by part."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, UNet2DConditionModel
from huggingface_hub import get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from transformers import PreTrainedModel

from ether_diffusion.bases.parts import read_config
from ether_diffusion.bases.weights import load_part, variants_of
from ether_diffusion.tiny_world import resolve_base
from ether_diffusion.wording import printable

_SINGLE_FILES = (".safetensors", ".ckpt", ".gguf", ".bin", ".pt", ".pth")


def load_base(name: str | Path) -> DiffusionPipeline | UNet2DConditionModel:
    """Load a base from a folder, a hub id or the alias "tiny_world", each part in the dtype it is stored in.

    A folder may hold a whole pipeline, or a UNet by itself.

    Raises:
        FileNotFoundError: a path that is not there, or a folder that holds neither.
        OSError: the Hub does not give it.
        ValueError: its files are damaged, or do not fit together.
    """
    folder = find_folder(name)
    if (folder / "model_index.json").is_file():
        return load_pipeline(folder)
    is_model = (folder / "config.json").is_file()
    if is_model and read_config(folder, "config.json").get("_class_name") == UNet2DConditionModel.__name__:
        return load_part(UNet2DConditionModel, folder)
    raise FileNotFoundError(
        f"{folder} holds no model_index.json and no UNet's config.json; name a folder in diffusers' layout"
    )


def find_folder(
    name: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of a base: a path as it is, the alias's, or a hub id's download.

    Raises:
        FileNotFoundError: a path that is not there.
        OSError: the Hub does not give it.
        ValueError: it is a single file.
    """
    resolved = resolve_base(name)
    folder = Path(resolved)
    if folder.is_dir():
        return folder
    _check_single_file(folder, "StableDiffusionPipeline (of SDXL, StableDiffusionXLPipeline)")
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


def _check_single_file(path: Path, kind: str) -> None:
    """Refuse a checkpoint that is one file, as people download it, with what makes a folder of it.

    Raises:
        ValueError: as said.
    """
    if not (path.is_file() and path.suffix.lower() in _SINGLE_FILES):
        return
    if path.suffix.lower() == ".gguf":
        raise ValueError(
            f"{path} is a single file of quantized weights, which are not opened here; use the model's "
            "folder in diffusers' layout, or its hub id"
        )
    raise ValueError(
        f"{path} is a single file, and a folder in diffusers' layout is needed; make one with diffusers' "
        f"{kind}.from_single_file({str(path)!r}).save_pretrained('new_folder'), and name that folder"
    )


def find_part(
    name: str, files: Sequence[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Return the folder of one part of a base: a path as it is, or a hub id's download of the files named.

    Raises:
        FileNotFoundError: it is no folder, and the Hub does not give it.
        ValueError: it is a single file.
    """
    if Path(name).is_dir():
        return Path(name)
    _check_single_file(Path(name), "AutoencoderKL")
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
    for name, entry in index.items():
        model = None if name in given else _model_class(folder / name, entry)
        if model is not None and (name in taken or kind is DiffusionPipeline):
            given[name] = load_part(model, folder / name, dtype=dtype, variant=variant)
    try:
        return kind.from_pretrained(str(folder), **given)
    except ImportError as error:
        raise ValueError(f"the base in {folder} needs what is not installed: {error}") from None


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

"""A whole base model, loaded as it is stored."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ether_diffusion.adapter_file.strict_json import parse_json
from ether_diffusion.tiny_world import resolve_base


def load_base(name: str | Path) -> DiffusionPipeline | UNet2DConditionModel:
    """Load a base from a folder, a hub id or the alias "tiny_world", each part in the dtype it is stored in.

    A folder may hold a whole pipeline, or a UNet by itself.

    Raises:
        FileNotFoundError: a path that is not there, or a folder that holds neither.
        OSError: the Hub does not give it.
        ValueError: its files are damaged, or do not fit together.
    """
    folder = find_folder(name)
    try:
        return _load_folder(folder)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"the base in {folder} is damaged; fetch or save it again ({error})") from error


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
    """
    resolved = resolve_base(name)
    folder = Path(resolved)
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or len(folder.parts) != 2 or resolved.startswith("."):
        raise FileNotFoundError(f"{resolved} is not the folder of a base model, nor a hub id like owner/name")
    return Path(
        DiffusionPipeline.download(
            resolved, revision=revision, variant=variant, local_files_only=local_files_only
        )
    )


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


def _load_folder(folder: Path) -> DiffusionPipeline | UNet2DConditionModel:
    if (folder / "model_index.json").is_file():
        return DiffusionPipeline.from_pretrained(str(folder), dtype=_stored_dtypes(folder))
    if (folder / "config.json").is_file():
        config = parse_json((folder / "config.json").read_bytes(), f"{folder}/config.json")
        if isinstance(config, dict) and config.get("_class_name") == UNet2DConditionModel.__name__:
            return UNet2DConditionModel.from_pretrained(str(folder), dtype=stored_dtype(folder))
    raise FileNotFoundError(
        f"{folder} holds no model_index.json and no UNet's config.json; name a folder in diffusers' layout"
    )


def _stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    return {part.name: stored_dtype(part) for part in sorted(folder.iterdir()) if part.is_dir()}


def stored_dtype(folder: Path, variant: str | None = None) -> torch.dtype:
    """Return the dtype of the first floating-point tensor in a folder's safetensors; float32 without any."""
    pattern = "*.safetensors" if variant is None else f"*.{variant}*.safetensors"
    for path in sorted(folder.glob(pattern)):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                dtype = _FLOATS.get(file.get_slice(key).get_dtype())
                if dtype is not None:
                    return dtype
    return torch.float32


_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

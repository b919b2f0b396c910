"""Tiny World: a small, real Stable Diffusion pipeline that is shipped with this package."""

from pathlib import Path

ALIAS = "tiny_world"
WEIGHTS_FOLDER = Path(__file__).with_name("weights")
CONTROL_ADAPTER_FOLDER = Path(__file__).with_name("control_adapter")
FOX_ADAPTER_FOLDER = Path(__file__).with_name("fox_adapter")


def tiny_world_path() -> Path:
    """Return the folder of the shipped pipeline, in diffusers' layout."""
    needed = "install a wheel that carries the weights, or train them with python -m recipes.tiny_world"
    return _found(WEIGHTS_FOLDER, "model_index.json", needed)


def control_adapter_path() -> Path:
    """Return the folder of the shipped adapter that fills silhouettes, made by `make demo-control`."""
    return _found(CONTROL_ADAPTER_FOLDER, "control_config.json", "train one with make demo-control")


def fox_adapter_path() -> Path:
    """Return the folder of the shipped adapter that has learned the fox from its six photos."""
    needed = "train one with python -m recipes.tiny_world.studio_examples"
    return _found(FOX_ADAPTER_FOLDER, "adapter_config.json", needed)


def _found(folder: Path, file: str, needed: str) -> Path:
    if not (folder / file).is_file():
        raise FileNotFoundError(f"{folder} has no {file}; {needed}")
    return folder


def resolve_base(name_or_path: str | Path) -> str:
    """Map the alias "tiny_world" to the shipped pipeline's folder; give back anything else as it is."""
    return str(tiny_world_path()) if str(name_or_path) == ALIAS else str(name_or_path)

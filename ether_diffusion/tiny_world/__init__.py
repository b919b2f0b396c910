"""Tiny World: a small, real Stable Diffusion pipeline that is shipped with this package."""

from pathlib import Path

ALIAS = "tiny_world"
WEIGHTS_FOLDER = Path(__file__).with_name("weights")
CONTROL_ADAPTER_FOLDER = Path(__file__).with_name("control_adapter")


def tiny_world_path() -> Path:
    """Return the folder of the shipped pipeline, in diffusers' layout.

    Raises:
        FileNotFoundError: this copy of the package carries no weights.
    """
    if not (WEIGHTS_FOLDER / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{WEIGHTS_FOLDER} has no model_index.json; install a wheel that carries the weights, "
            "or train them with python -m recipes.tiny_world and export them there"
        )
    return WEIGHTS_FOLDER


def control_adapter_path() -> Path:
    """Return the folder of the shipped adapter that fills silhouettes, made by `make demo-control`.

    Raises:
        FileNotFoundError: this copy of the package carries none.
    """
    if not (CONTROL_ADAPTER_FOLDER / "control_config.json").is_file():
        raise FileNotFoundError(
            f"{CONTROL_ADAPTER_FOLDER} has no control_config.json; train one with make demo-control"
        )
    return CONTROL_ADAPTER_FOLDER


def resolve_base(name_or_path: str | Path) -> str:
    """Map the alias "tiny_world" to the shipped pipeline's folder; give back anything else as it is."""
    return str(tiny_world_path()) if str(name_or_path) == ALIAS else str(name_or_path)

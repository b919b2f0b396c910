"""Tiny World: small, real pipelines that are shipped with this package, two of Stable Diffusion, one of 3."""

from collections.abc import Mapping
from pathlib import Path

ALIAS, SECOND_ALIAS, FLOW_ALIAS = "tiny_world", "tiny_world_2", "tiny_world_flow"
WEIGHTS_FOLDER = Path(__file__).with_name("weights")
SECOND_FOLDER = Path(__file__).with_name("second_weights")
FLOW_FOLDER = Path(__file__).with_name("flow_weights")
CONTROL_ADAPTER_FOLDER = Path(__file__).with_name("control_adapter")
FOX_ADAPTER_FOLDER = Path(__file__).with_name("fox_adapter")
EMBEDDED: Mapping[str, Path] = {
    ALIAS: WEIGHTS_FOLDER, SECOND_ALIAS: SECOND_FOLDER, FLOW_ALIAS: FLOW_FOLDER
}  # fmt: skip
"""The folders of the shipped pipelines by the names that stand for them as bases."""
GUIDANCE_SCALE = 3.0
"""What all are drawn with."""


def tiny_world_path(name: str = ALIAS) -> Path:
    """Return the folder of a shipped pipeline, in diffusers' layout."""
    needed = "install a wheel that carries the weights, or train them with python -m recipes.tiny_world"
    return _found(EMBEDDED[name], "model_index.json", needed)


def world_of(name: str | None) -> int:
    """Return whose concepts a shipped pipeline draws: 2, which has more, of "tiny_world_2"; 1 of others."""
    return 2 if name == SECOND_ALIAS else 1


def control_adapter_path() -> Path:
    """Return the folder of the shipped adapter that fills silhouettes, made for "tiny_world_2"."""
    return _found(CONTROL_ADAPTER_FOLDER, "control_config.json", "train one with make demo-control")


def fox_adapter_path() -> Path:
    """Return the folder of the shipped adapter of "tiny_world_2" that learned the fox from its six photos."""
    needed = "train one with python -m recipes.tiny_world.studio_examples"
    return _found(FOX_ADAPTER_FOLDER, "adapter_config.json", needed)


def _found(folder: Path, file: str, needed: str) -> Path:
    if not (folder / file).is_file():
        raise FileNotFoundError(f"{folder} has no {file}; {needed}")
    return folder


def resolve_base(name_or_path: str | Path) -> str:
    """Map the name of a shipped pipeline to its folder; give back anything else as it is."""
    name = str(name_or_path)
    return str(tiny_world_path(name)) if name in EMBEDDED else name


def embedded_name(path: Path) -> str | None:
    """Return the name of the shipped pipeline that a path is of, or None."""
    path = path.resolve()
    return next((name for name, folder in EMBEDDED.items() if path.is_relative_to(folder.resolve())), None)

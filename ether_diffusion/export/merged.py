"""Write a base model with an adapter merged into it, as a folder that needs no adapter."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion import reflections
from ether_diffusion.adapters.format import Adapter
from ether_diffusion.export.factors import adapted_weights, changed_parts, lora_factors, read_ether

Weights = dict[nn.Parameter, Tensor]
"""What each parameter is replaced by."""


def export_merged(
    adapter: Adapter | str | Path,
    base: DiffusionPipeline | ModelMixin,
    folder: str | Path,
    *,
    scale: float = 1.0,
    rebake: bool = False,
) -> Path:
    """Write `base` with W + scale (W' - W) in place of W to a new folder in diffusers' layout.

    Every weight keeps its dtype, and `base` itself is left as it was.

    Raises:
        FileExistsError: the folder is there and not empty.
        ValueError: the scale is not finite, or the adapter does not fit the base, or was trained on other
            weights and `rebake` is not set.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} is not a finite number; 1 is as trained and 0 is the base")
    folder = Path(folder)
    check_new_folder(folder)
    adapter = read_ether(adapter)
    weights: Weights = {}
    for component, changed in changed_parts(base, adapter).items():
        part, model = adapter.parts[component], changed.model
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(f"the base's {component} carries adapters; unload them, or merge them first")
        own = adapted_weights(part, model, rebake=rebake)
        for name, sides in part.projections().items():
            update = (*lora_factors(own[name], *sides), scale)
            weights[model.get_parameter(f"{name}.weight")] = reflections.merged_weight(own[name], [update])
    _save_aside(base, weights, folder)
    return folder


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that a model must not be written to."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already and not empty; name a new folder")


def _save_aside(base: DiffusionPipeline | ModelMixin, weights: Weights, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        with _replaced(weights):
            base.save_pretrained(temporary)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _replaced(weights: Weights) -> Iterator[None]:
    before = {parameter: parameter.data for parameter in weights}
    try:
        for parameter, weight in weights.items():
            parameter.data = weight
        yield
    finally:
        for parameter, weight in before.items():
            parameter.data = weight

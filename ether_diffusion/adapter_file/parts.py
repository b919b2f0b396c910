"""The parts of a pipeline that may carry adapters, and where in a folder those lie."""

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ether_diffusion.adapter_file.models import bare_model

DENOISERS = ("unet", "transformer", "prior")
"""The component of a pipeline whose adapter lies in the folder itself: the first of these that it has."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""The components whose adapters lie in subfolders of their name."""


class Pipeline(Protocol):
    """A diffusers pipeline, as far as adapters are concerned."""

    @property
    def components(self) -> dict[str, object]:
        """The parts of the pipeline by name."""


@dataclass(frozen=True)
class Part:
    """A model of a pipeline, and the subfolder that its adapter lies in."""

    name: str
    subfolder: str | None
    model: nn.Module


def find_parts(pipeline_or_model: Pipeline | nn.Module, subfolder: str | None) -> list[Part]:
    """Return the models that may carry adapters, the denoiser first.

    Raises:
        ValueError: neither a module nor a pipeline, or a pipeline without such models.
    """
    if isinstance(pipeline_or_model, nn.Module):
        return [Part(type(bare_model(pipeline_or_model)).__name__, subfolder, pipeline_or_model)]
    if not hasattr(pipeline_or_model, "components"):
        raise ValueError(
            f"{type(pipeline_or_model).__name__} is neither a torch module nor a diffusers pipeline; "
            "give one of them"
        )
    components = pipeline_or_model.components
    denoisers = [name for name in DENOISERS if isinstance(components.get(name), nn.Module)][:1]
    wanted = denoisers + [name for name in TEXT_ENCODERS if name in components]
    parts = []
    for name in wanted:
        model = components[name]
        if isinstance(model, nn.Module):
            inner = None if name in denoisers else name
            parts.append(Part(name, "/".join(filter(None, (subfolder, inner))) or None, model))
    if not parts:
        raise ValueError(
            f"{type(pipeline_or_model).__name__} has none of {', '.join(DENOISERS + TEXT_ENCODERS)}; "
            "give the model itself"
        )
    return parts

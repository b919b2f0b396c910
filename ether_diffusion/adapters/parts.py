"""The parts of a pipeline that may carry adapters, and where in a folder those lie."""

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ether_diffusion.adapters.models import bare_model

DENOISERS = ("unet", "transformer", "prior")
"""The component of a pipeline whose adapter lies in the folder itself: the first of these that it has."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
COMPONENTS = (
    *TEXT_ENCODERS,
    *("transformer", "transformer_2", "transformer_ref", "prior", "decoder", "connectors"),
    *("text_conditioner", "controlnet", "motion_adapter", "image_encoder", "vae"),
)
"""The subfolders that are known for a component's adapter, where no pipeline says what it has."""


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
    """Return the models that may carry adapters, the denoiser first, then text encoders, then all others.

    The denoiser's adapter lies in the folder itself, every other in the subfolder of its component's name.

    Raises:
        ValueError: neither a module nor a pipeline, or a pipeline with neither denoiser nor text encoder.
    """
    if isinstance(pipeline_or_model, nn.Module):
        return [Part(type(bare_model(pipeline_or_model)).__name__, subfolder, pipeline_or_model)]
    if not hasattr(pipeline_or_model, "components"):
        raise ValueError(
            f"{type(pipeline_or_model).__name__} is neither a torch module nor a diffusers pipeline; "
            "give one of them"
        )
    components = {
        name: model for name, model in pipeline_or_model.components.items() if isinstance(model, nn.Module)
    }
    denoisers = [name for name in DENOISERS if name in components][:1]
    first = denoisers + [name for name in TEXT_ENCODERS if name in components]
    if not first:
        raise ValueError(
            f"{type(pipeline_or_model).__name__} has none of {', '.join(DENOISERS + TEXT_ENCODERS)}; "
            "give the model itself"
        )
    parts: dict[nn.Module, Part] = {}
    for name in dict.fromkeys([*first, *components]):
        inner = None if name in denoisers else name
        place = "/".join(filter(None, (subfolder, inner))) or None
        # a model may stand under two names, and is one part
        parts.setdefault(bare_model(components[name]), Part(name, place, components[name]))
    return list(parts.values())

"""Models and pipelines as adapters see them: without wrappers, with their own weights, part by part."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.adapters.format import BaseFingerprint, fingerprint
from ether_diffusion.tiny_world import ALIAS, WEIGHTS_FOLDER
from ether_diffusion.tuner import EtherLinear
from ether_diffusion.tuner.other_layers import adapters_of

DENOISERS = ("unet", "transformer", "prior")
"""The component of a pipeline whose adapter lies in the folder itself: the first of these that it has."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
COMPONENTS = (
    *TEXT_ENCODERS,
    *("transformer", "transformer_2", "transformer_ref", "prior", "decoder", "connectors"),
    *("text_conditioner", "controlnet", "motion_adapter", "image_encoder", "vae"),
)
"""The subfolders that are known for a component's adapter, where no pipeline says what it has."""

_ORIGIN = "_name_or_path"
_WRAPPERS = frozenset({"base_layer", "_orig_mod"})
"""What an adapter of another method on top, and torch.compile of a single block, put into names."""


class Pipeline(Protocol):
    """A diffusers pipeline, as far as adapters are concerned."""

    @property
    def components(self) -> dict[str, object]:
        """The parts of the pipeline by name."""


@dataclass(frozen=True)
class Part:
    """A model of a pipeline, and the component of an adapter that it takes: "unet" for every denoiser."""

    name: str
    component: str
    model: nn.Module


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model whose module names an adapter's tensors use: without PeftModel and torch.compile."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def plain_name(name: str) -> str:
    """Return the name that a module has in the model by itself, as files speak of it."""
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def names_here(model: nn.Module) -> dict[str, str]:
    """Return the names that modules have in the bare model as it is by their plain names; the outermost's."""
    names: dict[str, str] = {}
    for name, _ in bare_model(model).named_modules():
        names.setdefault(plain_name(name), name)
    return names


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the bare model by plain name; of several of one name, the outermost."""
    root = bare_model(model)
    return {plain: root.get_submodule(name) for plain, name in names_here(root).items()}


def configs_of(model: nn.Module) -> dict[str, PeftConfig]:
    """Return PEFT's configurations of the adapters that a model carries, by name."""
    return cast(dict[str, PeftConfig], getattr(bare_model(model), "peft_config", {}))


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, BaseTunerLayer]:
    """Return the layers of a model that carry an adapter of any method, by their sorted plain names."""
    found = {
        plain_name(name): module
        for name, module in bare_model(model).named_modules()
        if isinstance(module, BaseTunerLayer) and adapter_name in adapters_of(module)
    }
    return dict(sorted(found.items()))


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return an adapter's tensors by their plain names in the model, as its file names them."""
    state: dict[str, Tensor] = get_peft_model_state_dict(
        bare_model(model),
        adapter_name=adapter_name,
        save_embedding_layers=False,  # else PEFT asks the Hub
    )
    return {plain_name(name): tensor for name, tensor in sorted(state.items())}


def base_fingerprint(model: nn.Module, names: list[str]) -> BaseFingerprint | None:
    """Return the fingerprint of the named modules' own weights, merged or not; None on the meta device."""
    modules = plain_modules(model)
    return fingerprint({name: _pristine_weight(modules[name]) for name in names})


def base_layer(module: nn.Module) -> nn.Module:
    """Return the frozen layer under adapters of any method, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _pristine_weight(module: nn.Module) -> Tensor:
    while isinstance(module, BaseTunerLayer):
        if isinstance(module, EtherLinear) and module.pristine_weight is not None:
            return module.pristine_weight
        module = cast(nn.Module, module.base_layer)
    return cast(Tensor, module.weight)


def name_of_base(owner: object) -> str | None:
    """Return what a pipeline or a model was loaded from, as `shareable_name`; None where it does not say."""
    root = bare_model(owner) if isinstance(owner, nn.Module) else owner
    config = getattr(root, "config", None)
    if isinstance(config, Mapping):
        return shareable_name(config.get(_ORIGIN))
    return shareable_name(getattr(config, _ORIGIN, None))


def shareable_name(origin: object) -> str | None:
    """Return a hub id as it is, the embedded base's alias, and of any other folder its name alone.

    Adapters are shared, and the path to somebody's home is nobody's business.
    """
    if not isinstance(origin, (str, Path)) or not str(origin):
        return None
    folder = Path(origin)
    if folder.is_absolute() or folder.exists():
        folder = folder.resolve()
        return ALIAS if folder.is_relative_to(WEIGHTS_FOLDER.resolve()) else folder.name or None
    return str(origin)


def find_parts(pipeline_or_model: Pipeline | nn.Module) -> list[Part]:
    """Return the models that may carry adapters, the denoiser first, then text encoders, then all others.

    Raises:
        ValueError: neither a module nor a pipeline, or a pipeline with neither denoiser nor text encoder.
    """
    if isinstance(pipeline_or_model, nn.Module):
        return [Part(type(bare_model(pipeline_or_model)).__name__, "unet", pipeline_or_model)]
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
        # a model may stand under two names, and is one part
        component = "unet" if name in denoisers else name
        parts.setdefault(bare_model(components[name]), Part(name, component, components[name]))
    return list(parts.values())

"""The parts of a pipeline that an adapter may change, and the own weights of each that it does change."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.adapter_file import Adapter, fingerprint, read_adapter
from ether_diffusion.adapter_file.reader import read_from
from ether_diffusion.adapter_file.source import find_source

logger = logging.getLogger(__name__)

Component = Literal["unet", "text_encoder", "text_encoder_2"]
Adapters = Mapping[Component, Adapter]
"""One adapter by the component that it changes; in a folder, the UNet's lies on top, others in subfolders."""


def read_adapters(adapter: Adapter | Adapters | str | Path) -> dict[Component, Adapter]:
    """Return the adapters of every component: those in a folder, or those given; one by itself is the UNet's.

    Raises:
        FileNotFoundError, ValueError: as `read_adapter`.
    """
    if isinstance(adapter, Adapter):
        return {"unet": adapter}
    if isinstance(adapter, Mapping):
        if not adapter:
            raise ValueError("no adapter was given; give at least one component's")
        return dict(adapter)
    source = find_source(adapter, revision=None, local_files_only=False)
    found: dict[Component, Adapter] = {}
    for component in get_args(Component):
        part = read_from(source, None if component == "unet" else component)
        if part is not None:
            found[component] = part
    return found or {"unet": read_adapter(adapter)}  # which says what is missing


def component_of(base: DiffusionPipeline | nn.Module, component: Component) -> nn.Module:
    """Return a component of a pipeline, its transformer for a UNet; a model given by itself is the UNet.

    Raises:
        ValueError: the base has no such component.
    """
    model = getattr(base, component, None) if isinstance(base, DiffusionPipeline) else base
    if model is None and component == "unet":
        model = getattr(base, "transformer", None)
    if not isinstance(model, nn.Module) or (model is base and component != "unet"):
        raise ValueError(
            f"the adapter changes the {component}, and {type(base).__name__} has none; give a pipeline"
        )
    return model


def adapted_weights(adapter: Adapter, model: nn.Module, *, rebake: bool) -> dict[str, Tensor]:
    """Return the base's own weight of every module that an adapter changes, by module name.

    Raises:
        ValueError: a module is missing or has another shape, the fingerprint tells another architecture, or
            other weights and `rebake` is not set.
    """
    modules = dict(model.named_modules())
    weights = {name: _own_weight(name, modules.get(name)) for name in adapter.projections()}
    for name, sides in adapter.projections().items():
        for side, width in zip(sides, reversed(weights[name].shape), strict=True):
            if side is not None and side.u.numel() != width:
                raise ValueError(
                    f"the adapter's {name} is {side.u.numel()} wide and the base's {width}; "
                    f"use a base of the architecture it was trained on{_named(adapter)}"
                )
    trained_on, found = adapter.metadata.base_fingerprint, fingerprint(weights)
    if trained_on is None:
        logger.warning("the adapter names no base weights; it is applied to this base as it is")
    elif found is not None:
        match = trained_on.compare(found)
        if match == "other architecture":
            raise ValueError(f"the base is of another architecture than the one trained on{_named(adapter)}")
        if match == "other weights" and not rebake:
            raise ValueError(
                f"the base's weights ({found.id}) are not those trained on ({trained_on.id}{_named(adapter)})"
                "; use that base, or set rebake (--rebake) to apply the same reflections to this one"
            )
    return weights


def _own_weight(name: str, module: nn.Module | None) -> Tensor:
    if isinstance(module, BaseTunerLayer):
        if module.merged:
            raise ValueError(f"an adapter is merged into {name} of the base; unmerge it first")
        module = module.get_base_layer()
    if isinstance(module, nn.Linear) and module.weight.is_meta:
        raise ValueError(f"{name} of the base has no weights, it is on the meta device; load them first")
    if not isinstance(module, nn.Linear):
        found = "has no such module" if module is None else f"has a {type(module).__name__} there"
        raise ValueError(f"the adapter changes the Linear {name}, but the base {found}; use another base")
    weight: Tensor = module.weight.detach()
    return weight


def _named(adapter: Adapter) -> str:
    name = adapter.metadata.base_model
    return "" if name is None else f", {name}"

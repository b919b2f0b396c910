"""The parts of a pipeline that an adapter may change, and the own weights of each that it does change."""

import logging
from collections.abc import Iterable
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.adapters.fingerprint import fingerprint
from ether_diffusion.adapters.format import Adapter, AdapterPart, Component
from ether_diffusion.adapters.models import DENOISERS, plain_modules
from ether_diffusion.adapters.read import read_adapter
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.wording import listed

logger = logging.getLogger(__name__)

_BY_THEMSELVES = ("transformer_2", "transformer_ref")
"""Those whose LoRA diffusers takes from a file that names its only component "transformer"."""


def read_ether(adapter: Adapter | str | Path) -> Adapter:
    """Return an adapter of ETHER: the one given, or that of a folder or a model of the Hub.

    Raises:
        FileNotFoundError, ValueError: there is none that is whole, or it is of another method.
    """
    if not isinstance(adapter, Adapter):
        return read_adapter(adapter, only_ether=True, with_encoder=False)
    if not adapter.parts or not isinstance(adapter.config, EtherConfig):
        raise ValueError(f"{adapter.name} is of the method {adapter.method}; what is exported is of ETHER")
    return adapter


def component_of(base: DiffusionPipeline | nn.Module, component: Component) -> nn.Module:
    """Return a component of a pipeline; a model given by itself is the denoiser.

    Raises:
        ValueError: the base has no such component.
    """
    name = denoiser_name(base) if component == "unet" else component
    model = getattr(base, name, None) if isinstance(base, DiffusionPipeline) else base
    if not isinstance(model, nn.Module) or (model is base and component != "unet"):
        raise ValueError(
            f"the adapter changes the {component}, and {type(base).__name__} has none; give a pipeline"
        )
    return model


def denoiser_name(base: DiffusionPipeline | nn.Module) -> Component:
    """Return what a pipeline calls its denoiser; of a model, the prefix by which it loads a LoRA."""
    if isinstance(base, DiffusionPipeline):
        return next((name for name in DENOISERS if isinstance(getattr(base, name, None), nn.Module)), "unet")
    return "unet" if isinstance(base, UNet2DConditionLoadersMixin) else "transformer"


def check_readable(base: DiffusionPipeline | nn.Module, components: Iterable[Component]) -> None:
    """Check that diffusers reads a LoRA of these components from one file.

    Raises:
        ValueError: it would pass over one.
    """
    loadable = {"unet", *getattr(base, "_lora_loadable_modules", ())} - set(_BY_THEMSELVES)
    unread = [component for component in components if component not in loadable]
    if unread:
        raise ValueError(
            f"diffusers reads no LoRA of {listed(unread)} from a file of {type(base).__name__}; share this "
            f"adapter in its own format, or merged, or export one by itself: read_adapter(…, "
            f"subfolder={unread[0]!r}) onto that model"
        )


def adapted_weights(adapter: AdapterPart, model: nn.Module, *, rebake: bool) -> dict[str, Tensor]:
    """Return the base's own weight of every module that an adapter changes, by module name.

    Raises:
        ValueError: a module is missing or has another shape, the fingerprint tells another architecture, or
            other weights and `rebake` is not set.
    """
    modules = plain_modules(model)
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


def _named(adapter: AdapterPart) -> str:
    name = adapter.metadata.base_model
    return "" if name is None else f", {name}"

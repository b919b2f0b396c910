"""Models as adapters see them: without the wrappers of PEFT and torch.compile, and their own weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.adapters.fingerprint import BaseFingerprint, fingerprint
from ether_diffusion.tiny_world import ALIAS, WEIGHTS_FOLDER
from ether_diffusion.tuner import EtherConfig, EtherLayer, EtherLinear
from ether_diffusion.wording import listed

_ORIGIN = "_name_or_path"
_WRAPPERS = frozenset({"base_layer", "_orig_mod"})
"""What an adapter of another method on top, and torch.compile of a single block, put into names."""


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


def ether_layers(model: nn.Module, adapter_name: str) -> dict[str, EtherLinear]:
    """Return the layers of a model that carry an adapter, by their sorted plain names."""
    found = {
        plain_name(name): module
        for name, module in bare_model(model).named_modules()
        if isinstance(module, EtherLinear) and adapter_name in module.r
    }
    return dict(sorted(found.items()))


def adapter_config(model: nn.Module, adapter_name: str) -> EtherConfig:
    """Return the configuration of an adapter that a model carries.

    Raises:
        ValueError: the model carries no ETHER adapter of that name.
    """
    if not ether_layers(model, adapter_name):
        carried = sorted({name for m in model.modules() if isinstance(m, EtherLayer) for name in m.r})
        raise ValueError(
            f"{type(model).__name__} carries no ETHER adapter named {adapter_name!r}; "
            f"it has {listed(carried) or 'none'}"
        )
    return cast(dict[str, EtherConfig], bare_model(model).peft_config)[adapter_name]


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

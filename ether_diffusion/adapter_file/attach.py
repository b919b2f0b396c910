"""Attaching an adapter to a model and taking its values out again, whole or not at all."""

import re
import warnings
from dataclasses import replace
from typing import cast

import torch
from peft import PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.adapter_file.adapter import Adapter, AdapterMetadata
from ether_diffusion.adapter_file.fingerprint import BaseFingerprint, fingerprint
from ether_diffusion.adapter_file.reader import is_plain
from ether_diffusion.adapter_file.rollback import active_state, restore_active
from ether_diffusion.adapter_file.wording import listed
from ether_diffusion.tuner import EtherConfig, EtherLayer, EtherLinear
from ether_diffusion.tuner.config import ATTENTION


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model whose module names an adapter's tensors use: without PeftModel and torch.compile."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def ether_layers(model: nn.Module, adapter_name: str) -> dict[str, EtherLinear]:
    """Return the layers of a model that carry an adapter, by their sorted names in the bare model."""
    found = {
        name: module
        for name, module in bare_model(model).named_modules()
        if isinstance(module, EtherLinear) and adapter_name in module.r
    }
    return dict(sorted(found.items()))


def adapter_config(model: nn.Module, adapter_name: str) -> EtherConfig:
    """Return the configuration of an adapter that a model carries."""
    return cast(dict[str, EtherConfig], bare_model(model).peft_config)[adapter_name]


def base_fingerprint(model: nn.Module, names: list[str]) -> BaseFingerprint | None:
    """Return the fingerprint of the named modules' own weights, merged or not; None on the meta device."""
    modules = dict(bare_model(model).named_modules())
    return fingerprint({name: _pristine_weight(modules[name]) for name in names})


def detach_adapter(
    model: nn.Module, adapter_name: str, *, metadata: AdapterMetadata | None = None
) -> Adapter:
    """Return a copy of an adapter that a model carries, with the fingerprint of its base.

    Raises:
        ValueError: the model carries no ETHER adapter of that name, or it holds whole modules too.
    """
    layers = ether_layers(model, adapter_name)
    if not layers:
        carried = sorted({name for m in model.modules() if isinstance(m, EtherLayer) for name in m.r})
        raise ValueError(
            f"{type(model).__name__} carries no ETHER adapter named {adapter_name!r}; "
            f"it has {listed(carried) or 'none'}"
        )
    config = adapter_config(model, adapter_name)
    if config.modules_to_save:
        raise ValueError(
            f"the adapter {adapter_name!r} also trains whole modules (modules_to_save="
            f"{listed(config.modules_to_save)}), which are not vectors of ETHER; use save_pretrained"
        )
    tensors = {
        f"{name}.{vector}": getattr(layer, vector)[adapter_name].detach().to("cpu", copy=True)
        for name, layer in layers.items()
        for vector in layer.adapter_layer_names
        if adapter_name in getattr(layer, vector)
    }
    metadata = metadata or AdapterMetadata()
    metadata = replace(metadata, base_fingerprint=base_fingerprint(model, list(layers)))
    # as PEFT's save_pretrained: a loaded adapter is for use until the caller says that it is to be trained
    return Adapter(_with_inference_mode(config, True), tensors, metadata)


def check_fits(model: nn.Module, adapter: Adapter, adapter_name: str, base: str) -> None:
    """Check an adapter against a model without touching it.

    Raises:
        ValueError: the name is taken or cannot be one, or the adapter's modules are not those of the model;
            all problems of the first kind found are listed.
    """
    root = bare_model(model)
    _check_name(root, adapter_name)
    modules = dict(root.named_modules())
    projections = adapter.projections()
    absent = [name for name in projections if name not in modules]
    if absent:
        raise ValueError(
            f"the adapter was made for another model: {len(absent)} of its {len(projections)} projections "
            f"are not in {base} ({listed(absent)}); load the base it names"
        )
    unadapted = sorted(_plain_targets(root, adapter.config) - projections.keys())
    if unadapted:
        raise ValueError(
            f"the adapter lacks {len(unadapted)} projections that its configuration targets in {base} "
            f"({listed(unadapted)}); it is not whole, or made for another model"
        )
    wrong = []
    for name, sides in projections.items():
        base_layer = _base_layer(modules[name])
        if isinstance(base_layer, nn.Linear):
            for label, side, width in zip(
                ("input", "output"), sides, (base_layer.in_features, base_layer.out_features), strict=True
            ):
                if side is not None and side.u.numel() != width:
                    wrong.append(
                        f"{name} ({label} side) has {width} in {base} and {side.u.numel()} in the adapter"
                    )
    if wrong:
        raise ValueError(f"the adapter was made for another model: the width of {listed(wrong, 3)}")
    merged = {name for m in root.modules() if isinstance(m, BaseTunerLayer) for name in m.merged_adapters}
    if merged:
        raise ValueError(
            f"{listed(sorted(merged))} is merged into {base}; unmerge (unfuse) before loading another"
        )


def attach_adapter(
    model: nn.Module, adapter: Adapter, adapter_name: str, *, activate: bool, trainable: bool = False
) -> None:
    """Add an adapter to a model that `check_fits` found fitting.

    Wrap it in `unchanged_on_failure`: this function stops where it fails.
    """
    root = bare_model(model)
    config = _with_inference_mode(_exact_config(root, adapter), not trainable)
    state = active_state(root)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # PEFT says so whenever a model gets its second adapter
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        peft_model = getattr(model, "_orig_mod", model)
        if isinstance(peft_model, PeftModel):
            peft_model.base_model.peft_config[adapter_name] = config
            peft_model.base_model.inject_adapter(root, adapter_name)
        else:
            inject_adapter_in_model(config, root, adapter_name)
    result = set_peft_model_state_dict(root, adapter.tensors, adapter_name)
    assert not result.unexpected_keys, result.unexpected_keys
    layers = ether_layers(root, adapter_name)
    assert set(layers) == set(adapter.projections())
    for layer in layers.values():
        layer.train(layer.base_layer.training)  # a new module is in training mode: dropout would be on
    if isinstance(getattr(root, "_hf_peft_config_loaded", None), bool):
        root.__dict__["_hf_peft_config_loaded"] = True
    if not activate:
        restore_active(root, state)
    elif isinstance(peft_model, PeftModel):
        peft_model.set_adapter(adapter_name, inference_mode=not trainable)


def _check_name(root: nn.Module, adapter_name: str) -> None:
    if not adapter_name or not re.fullmatch(r"[^.\x00-\x1f\x7f]{1,100}", adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} cannot name an adapter; use 1 to 100 characters, no dots"
        )
    if adapter_name in getattr(root, "peft_config", {}):
        raise ValueError(
            f"the model already has an adapter named {adapter_name!r}; choose another adapter_name "
            "or delete it first"
        )
    # PEFT finds an adapter's parameters by this name between dots
    if any(adapter_name in name.split(".") for name, _ in root.named_modules()):
        raise ValueError(
            f"adapter_name={adapter_name!r} is also the name of a part of the model; choose another"
        )


def _plain_targets(root: nn.Module, config: EtherConfig) -> set[str]:
    """Return the Linear modules that the configuration names; none where it uses a regex.

    A stranger's regex is never evaluated; then the number of norms in the fingerprint says what is whole.
    """
    targets, excluded = config.target_modules, config.exclude_modules or set()
    if isinstance(targets, str) or isinstance(excluded, str) or config.layers_to_transform is not None:
        return set()
    named = {
        name for name, module in root.named_modules() if name and isinstance(_base_layer(module), nn.Linear)
    }
    inside = {name for name in named if name.endswith(".base_layer")}

    def matches(name: str, wanted: set[str]) -> bool:
        return any(f".{name}".endswith(f".{suffix}") for suffix in wanted)

    return {
        n for n in named - inside if matches(n, set(targets or ATTENTION)) and not matches(n, set(excluded))
    }


def _exact_config(root: nn.Module, adapter: Adapter) -> EtherConfig:
    """Return a configuration that targets the adapter's modules in this model, those and no others."""
    config = adapter.config
    names = list(adapter.projections())
    blocks = {key.rpartition(".")[0]: len(tensor) for key, tensor in adapter.tensors.items()}
    if not all(map(is_plain, config.num_blocks_pattern)):
        # (^…) because PEFT puts an optional prefix before a pattern
        exact = {f"(^{re.escape(name)})": n for name, n in blocks.items() if n != config.num_blocks}
        config = replace(config, num_blocks_pattern=exact)
    if _plain_targets(root, config) == set(names):
        return replace(config)
    return replace(
        config,
        target_modules="|".join(map(re.escape, names)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _with_inference_mode(config: EtherConfig, inference_mode: bool) -> EtherConfig:
    return replace(config, inference_mode=inference_mode)  # type: ignore[call-arg]  # a field of PeftConfig


def _base_layer(module: nn.Module) -> nn.Module:
    return module.base_linear if isinstance(module, EtherLayer) else module


def _pristine_weight(module: nn.Module) -> Tensor:
    pristine = module.pristine_weight if isinstance(module, EtherLinear) else None
    return cast(Tensor, _base_layer(module).weight) if pristine is None else pristine

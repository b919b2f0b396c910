"""Attaching an adapter to a model and taking its values out again, whole or not at all."""

import re
import warnings
from dataclasses import replace

import torch
from peft import PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn

from ether_diffusion.adapters.adapter import Adapter, AdapterMetadata
from ether_diffusion.adapters.fit import plain_targets
from ether_diffusion.adapters.models import (
    adapter_config,
    bare_model,
    base_fingerprint,
    ether_layers,
    names_here,
)
from ether_diffusion.adapters.reader import is_plain
from ether_diffusion.adapters.rollback import active_state, restore_active
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.wording import listed


def detach_adapter(
    model: nn.Module, adapter_name: str, *, metadata: AdapterMetadata | None = None
) -> Adapter:
    """Return a copy of an adapter that a model carries, with the fingerprint of its base.

    Raises:
        ValueError: the model carries no ETHER adapter of that name, or it holds whole modules too.
    """
    config = adapter_config(model, adapter_name)
    layers = ether_layers(model, adapter_name)
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


def attach_adapter(
    model: nn.Module, adapter: Adapter, adapter_name: str, *, activate: bool, trainable: bool = False
) -> None:
    """Add an adapter to a model that `check_targets` and `check_widths` found fitting.

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
    names = {layer: name for name, layer in root.named_modules()}
    places = {name: names[layer] for name, layer in ether_layers(root, adapter_name).items()}
    tensors = {
        f"{places[module]}.{vector}": adapter.tensors[f"{module}.{vector}"]
        for module, vector in (key.rsplit(".", 1) for key in adapter.tensors)
    }
    result = set_peft_model_state_dict(root, tensors, adapter_name)
    assert not result.unexpected_keys, result.unexpected_keys
    layers = ether_layers(root, adapter_name)
    assert set(layers) == set(adapter.projections())
    for layer in layers.values():
        layer.train(layer.base_layer.training)  # a new module is in training mode: dropout would be on
    if hasattr(root, "_hf_peft_config_loaded"):
        root.__dict__["_hf_peft_config_loaded"] = True
    if not activate:
        restore_active(root, state)
    elif isinstance(peft_model, PeftModel):
        peft_model.set_adapter(adapter_name, inference_mode=not trainable)


def _exact_config(root: nn.Module, adapter: Adapter) -> EtherConfig:
    """Return a configuration that targets the adapter's modules in this model, those and no others."""
    config = adapter.config
    here, names = names_here(root), adapter.projections().keys()
    blocks = {here[key.rpartition(".")[0]]: len(tensor) for key, tensor in adapter.tensors.items()}
    is_safe = all(map(is_plain, config.num_blocks_pattern))
    if not is_safe or any(n != config.blocks_of(name) for name, n in blocks.items()):
        # (^…) because PEFT puts an optional prefix before a pattern
        exact = {f"(^{re.escape(name)})": n for name, n in blocks.items() if n != config.num_blocks}
        config = replace(config, num_blocks_pattern=exact)
    if plain_targets(root, config) == names:
        return replace(config)
    return replace(
        config,
        target_modules="|".join(re.escape(here[name]) for name in names),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _with_inference_mode(config: EtherConfig, inference_mode: bool) -> EtherConfig:
    return replace(config, inference_mode=inference_mode)  # type: ignore[call-arg]  # a field of PeftConfig

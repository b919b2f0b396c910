"""load_ether, load_any and attach: adapters into models that they fit, whole or not at all."""

import copy
import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from peft import IA3Config, PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ether_diffusion.adapters import models
from ether_diffusion.adapters.format import CONFIG_NAME, Adapter, AdapterPart
from ether_diffusion.adapters.methods import is_plain, quiet
from ether_diffusion.adapters.models import Match, Part, Pipeline, bare_model, find_parts, tuner_layers
from ether_diffusion.adapters.read import read_adapter
from ether_diffusion.tuner import EtherConfig, EtherLayer
from ether_diffusion.tuner.other_layers import adapters_of, put_in_force
from ether_diffusion.wording import listed, printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What loading did.

    Attributes:
        num_projections: modules that carry the adapter now.
        base_match: whether the base is the one it was trained on; "unknown" where the file does not say.
        components: projections by component of the pipeline, or by class for a bare model.
    """

    adapter_name: str
    num_projections: int
    base_match: Match
    components: Mapping[str, int]


class Attaching(TypedDict, total=False):
    """How an adapter is added to a model; see `load_ether`."""

    adapter_name: str
    require_same_base: bool
    activate: bool
    trainable: bool


class Reading(TypedDict, total=False):
    """Where an adapter is read from; see `load_ether`."""

    subfolder: str | None
    revision: str | None
    local_files_only: bool


class Loading(Attaching, Reading, total=False):
    """How an adapter is read and added; see `load_ether`."""


def load_ether(
    pipeline_or_model: Pipeline | nn.Module, path_or_hub_id: str | Path, **how: Unpack[Loading]
) -> LoadReport:
    """Load an adapter of ETHER into a diffusers pipeline or a model, whole or not at all.

    Of a pipeline, the UNet (or transformer) takes the adapter in the folder itself, and every other component
    that in the subfolder of its name. Everything is checked before a model is touched, and a model is
    as before if anything fails. The new adapter alone is then active, as with PEFT and diffusers; use
    `set_adapters` to combine several.

    Args:
        path_or_hub_id: a folder, or a model of the Hugging Face Hub; what exists on disk is taken from there.
        adapter_name: what it is called in the models ("default").
        subfolder: where in the folder or the model of the Hub the adapter lies.
        revision: branch, tag or commit of the Hub model.
        local_files_only: do not ask the Hub, use what was downloaded before (False).
        require_same_base: refuse other base weights of the same architecture, instead of warning (False).
        activate: False leaves the adapters active that were (True).
        trainable: True gives the adapter gradients, to train it further (False).

    Raises:
        FileNotFoundError: there is no such folder, model or file.
        ValueError: the file is not a whole ETHER adapter, or not one of this model.
    """
    return load_any(pipeline_or_model, path_or_hub_id, only_ether=True, **how)


def load_any(
    pipeline_or_model: Pipeline | nn.Module,
    adapter: str | Path | Adapter,
    *,
    only_ether: bool = False,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    **how: Unpack[Attaching],
) -> LoadReport:
    """Load an adapter of any method that training saves, as `load_ether` loads those of ETHER.

    These are ETHER, ETHER+, LoRA, OFT, BOFT, HRA, DeLoRA and IA³ of inputs, on Linears. Adapters of
    several methods work in one model in any order, but for HRA, past whose product no other would be heard.
    It may have been read before.

    Raises:
        FileNotFoundError: there is no such folder, model or file.
        ValueError: the file is not a whole adapter of such a method, or not one of this model.
    """
    where: Reading = {"subfolder": subfolder, "revision": revision, "local_files_only": local_files_only}
    found = read_for(pipeline_or_model, adapter, only_ether=only_ether, **where)
    return attach(pipeline_or_model, found, **how)


def read_for(
    pipeline_or_model: Pipeline | nn.Module,
    adapter: str | Path | Adapter,
    *,
    only_ether: bool = False,
    with_encoder: bool = False,
    **where: Unpack[Reading],
) -> Adapter:
    """Read what a pipeline or a model takes of an adapter, unless it was read; see `read_adapter`."""
    if isinstance(adapter, Adapter):
        return adapter
    components = [part.component for part in find_parts(pipeline_or_model)]
    folder = Path(adapter, where.get("subfolder") or "")
    try:
        held = {name for name in models.COMPONENTS if (folder / name / CONFIG_NAME).exists()}
    except (OSError, ValueError):  # a name that no folder can have, which reading refuses
        held = set()
    unused = listed(sorted(held - set(components)))
    if unused and not isinstance(pipeline_or_model, nn.Module):
        raise ValueError(f"{printable(folder)} holds an adapter of {unused}, which this pipeline lacks")
    if unused:
        told = f"{printable(folder)} also holds an adapter of {unused}, which is not loaded"
        warnings.warn(told, stacklevel=3)
    return read_adapter(
        adapter, components=components, with_encoder=with_encoder, only_ether=only_ether, **where
    )


def attach(
    pipeline_or_model: Pipeline | nn.Module,
    adapter: Adapter,
    *,
    adapter_name: str = "default",
    require_same_base: bool = False,
    activate: bool = True,
    trainable: bool = False,
) -> LoadReport:
    """Add an adapter that was read to the models that it changes, all of them or none; see `load_ether`."""
    parts = {part.component: part for part in find_parts(pipeline_or_model)}
    lacking = listed(name for name in adapter.parts if name not in parts)
    if lacking or not adapter.parts:
        what = f"an adapter of {lacking}, which this pipeline lacks" if lacking else "nothing to attach"
        raise ValueError(f"{adapter.name} holds {what}; load it into the pipeline it was made for")
    found = [(parts[name], part) for name, part in adapter.parts.items()]
    fits = [models.check_fit(part.model, own, adapter_name) for part, own in found]
    match = max((fit.match for fit in fits), key=("same", "unknown", "other weights").index)  # the worst
    remark = "; ".join(filter(None, (fit.remark for fit in fits)))
    if require_same_base and match != "same":
        why = remark or "the adapter carries no fingerprint of its base"
        raise ValueError(f"{why}; load that base, or leave out require_same_base")
    if remark:
        warnings.warn(f"{remark}, so results may differ", stacklevel=3)
    before = [_State(bare_model(part.model)) for part, _ in found]
    try:
        for (part, own), state in zip(found, before, strict=True):
            _attach_part(part, own, adapter_name, state, activate=activate, trainable=trainable)
    except BaseException:
        for state in before:
            remove_adapter(state.root, [adapter_name])
            state.restore()
        raise
    components = {part.name: len(own.modules()) for part, own in found}
    count = sum(components.values())
    by_shape = "; it carries no fingerprint, so its base was checked by shape only"
    logger.info("loaded %s into %d projections%s", adapter.name, count, by_shape * (match == "unknown"))
    return LoadReport(adapter_name, count, match, components)


class _State:
    """What a model's adapters were before: which are in force, what takes gradients, PEFT's flags."""

    def __init__(self, root: nn.Module) -> None:
        self.root, layers = root, tuner_layers(root)
        self.active = {layer: list(layer.active_adapters) for layer in layers}
        self.disabled = {layer: layer._disable_adapters for layer in layers}
        self.gradients = {p: p.requires_grad for p in root.parameters()}
        bases = {p for layer in layers for p in layer.get_base_layer().parameters()}
        self.of_adapters = {p for layer in layers for p in layer.parameters()} - bases
        self.is_loaded = root.__dict__.get("_hf_peft_config_loaded")

    def restore(self, *, is_frozen: bool = False) -> None:
        """Put back what was; on layers of ETHER that are new since then, those in force anywhere.

        With `is_frozen` the base stays as adding an adapter leaves it: without gradients.
        """
        elsewhere = next((names for layer, names in self.active.items() if isinstance(layer, EtherLayer)), [])
        for layer in tuner_layers(self.root):
            if isinstance(layer, EtherLayer):
                layer.set_adapter(self.active.get(layer, elsewhere))
            elif layer in self.active:
                put_in_force(layer, self.active[layer])
                layer._disable_adapters = self.disabled[layer]
            else:
                put_in_force(layer, [])
        for parameter, flag in self.gradients.items():
            if parameter in self.of_adapters or not is_frozen:
                parameter.requires_grad_(flag)
        if self.is_loaded is not None:
            self.root.__dict__["_hf_peft_config_loaded"] = self.is_loaded


def _attach_part(
    part: Part, own: AdapterPart, adapter_name: str, before: _State, *, activate: bool, trainable: bool
) -> None:
    """Add an adapter to a model that `check_fit` found fitting; it stops where it fails."""
    root, config = before.root, _exact_config(before.root, own)
    config.inference_mode = not trainable
    with quiet(), torch.random.fork_rng(devices=[]):
        peft_model = getattr(part.model, "_orig_mod", part.model)
        if isinstance(peft_model, PeftModel):
            peft_model.base_model.peft_config[adapter_name] = config
            peft_model.base_model.inject_adapter(root, adapter_name)
        else:
            inject_adapter_in_model(config, root, adapter_name)
        layers = models.layers_with(root, adapter_name)
        assert layers.keys() == own.modules().keys()
        names = {layer: name for name, layer in root.named_modules()}
        tensors = {
            f"{names[layers[module]]}.{end}": own.tensors[f"{module}.{end}"]
            for module, ends in own.modules().items()
            for end in ends
        }
        result = set_peft_model_state_dict(root, tensors, adapter_name)
    assert not result.unexpected_keys, result.unexpected_keys
    for layer in layers.values():
        layer.train(layer.get_base_layer().training)  # a new module is in training mode: dropout would be on
    if activate:
        for layer in tuner_layers(root):
            put_in_force(layer, [adapter_name], trainable=trainable)
    else:
        before.restore(is_frozen=True)
    if activate and isinstance(config, EtherConfig) and isinstance(peft_model, PeftModel):
        peft_model.set_adapter(adapter_name, inference_mode=not trainable)
    if hasattr(root, "_hf_peft_config_loaded"):
        root.__dict__["_hf_peft_config_loaded"] = True


def _exact_config(root: nn.Module, own: AdapterPart) -> PeftConfig:
    """Return a configuration that targets the adapter's modules in this model, those and no others."""
    config, modules = copy.copy(own.config), own.modules()
    names = {module: name for name, module in root.named_modules()}
    here = {plain: names[module] for plain, module in models.plain_modules(root).items()}
    if isinstance(config, EtherConfig):
        blocks = {here[name]: next(iter(shapes.values()))[0] for name, shapes in modules.items()}
        is_safe = all(map(is_plain, config.num_blocks_pattern))
        if not is_safe or any(n != config.blocks_of(name) for name, n in blocks.items()):
            # (^…) because PEFT puts an optional prefix before a pattern
            exact = {f"(^{re.escape(name)})": n for name, n in blocks.items() if n != config.num_blocks}
            config.num_blocks_pattern = exact
    if models.plain_targets(root, config) != modules.keys():
        config.target_modules = "|".join(re.escape(here[name]) for name in modules)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    if isinstance(config, IA3Config):  # of whose tensors those of inputs alone are read
        config.feedforward_modules = config.target_modules
    return config


def remove_adapter(model: nn.Module, names: Iterable[str]) -> None:
    """Take adapters of any method off a model; layers that hold none after are the base's own again."""
    root = bare_model(model)
    for layer in tuner_layers(root):
        for name in set(names).intersection(adapters_of(layer)):
            # PEFT would put another one in force, which nobody asked for
            rest = [active for active in layer.active_adapters if active != name]
            if not isinstance(layer, EtherLayer):
                put_in_force(layer, rest)
            elif name in layer.active_adapters:
                layer.set_adapter(rest)
            layer.delete_adapter(name)
    for module in list(root.modules()):
        for child_name, child in list(module.named_children()):
            while isinstance(child, BaseTunerLayer) and not adapters_of(child):
                child = child.base_layer  # under a LoRA may lie an ETHER
                setattr(module, child_name, child)
    configs: dict[str, PeftConfig] = root.__dict__.get("peft_config", {})
    for name in names:
        configs.pop(name, None)
    if not configs and "peft_config" in root.__dict__:  # else PEFT takes the next adapter for a second one
        del root.__dict__["peft_config"]
        if hasattr(root, "_hf_peft_config_loaded"):
            root.__dict__["_hf_peft_config_loaded"] = False

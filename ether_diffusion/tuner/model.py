"""EtherModel: which modules of a model are adapted, checked before any is touched."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ether_diffusion.tuner.config import TARGET_PRESETS, EtherConfig, matches_module
from ether_diffusion.tuner.contexts import mixed_adapters
from ether_diffusion.tuner.fused_projections import follow_fusing
from ether_diffusion.tuner.layer import EtherLayer
from ether_diffusion.tuner.linear import EtherLinear
from ether_diffusion.tuner.other_layers import reads_weight
from ether_diffusion.tuner.quantized import is_plain, is_quantized


class EtherModel(BaseTuner):
    """Attaches ETHER adapters to the Linear modules that an EtherConfig names."""

    prefix = "ether_"
    tuner_layer_cls = EtherLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: EtherConfig, model_config: dict[str, Any]) -> EtherConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = set(TARGET_PRESETS["attention"])
        return peft_config

    def _prepare_model(self, peft_config: EtherConfig, model: nn.Module) -> None:
        """Check every target before the first is replaced, so that a refusal leaves the model as it was."""
        config = _maybe_include_all_linear_layers(peft_config, model)
        targets = _targets(config, model)
        problems = [
            p for name, module in targets.items() if (p := _problem(config, name, module)) is not None
        ]
        if problems:
            others = f" (nor do {len(problems) - 1} other modules fit)" if problems[1:] else ""
            raise ValueError(f"{problems[0]}{others}")
        if targets:
            _warn_of_unmatched(config, model, list(targets))

    def _create_and_replace(
        self,
        peft_config: EtherConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        problem = _problem(peft_config, current_key, target)
        if problem is not None:
            raise ValueError(problem)
        num_blocks = peft_config.blocks_of(current_key)
        follow_fusing(parent)
        while isinstance(target, BaseTunerLayer) and not isinstance(target, EtherLinear):
            # it calls what is under it, and ETHER goes there, as where ETHER came first
            parent, target_name, target = target, "base_layer", target.base_layer
        if isinstance(target, EtherLinear):
            target.update_layer(adapter_name, peft_config, num_blocks)
            return
        assert isinstance(target, nn.Linear)
        layer = EtherLinear(target, adapter_name, config=peft_config, num_blocks=num_blocks)
        layer.train(target.training)  # or dropout would be on in a model that is in use
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put a layer in the place of another; PEFT's own would move vectors to where W lies offloaded."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave an adapter in float32, or give it the base's dtype, where PEFT is asked not to widen that."""
        if autocast_adapter_dtype:
            return
        for layer in self.model.modules():
            if isinstance(layer, EtherLinear) and (dtype := layer.base_linear.weight.dtype).itemsize > 1:
                for held in layer.adapter_layer_names:
                    if adapter_name in (vectors := getattr(layer, held)):
                        vectors[adapter_name].data = vectors[adapter_name].data.to(dtype)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Name a vector by the module that it adapts, also where a LoRA lies on top of that."""
        return _plain(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: EtherConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        plain = {_plain(key): tensor for key, tensor in state_dict.items()}
        mapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, plain
        )
        return mapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Give each sample its own adapter where a PeftModel is called with adapter_names=[...].

        Raises:
            ValueError: the model is in training mode, or a name is unknown.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "adapter_names gives no gradients; call eval() before, or train one adapter alone"
            )
        copies = [kwargs.get(argument) or 1 for argument in ("num_beams", "num_return_sequences")]
        names = [name for name in names for _ in range(max(copies))]
        with ExitStack() as stack:
            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):  # modules_to_save
                    hook = partial(_with_names, names=names)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            ours = [None if name == "__base__" else name for name in names]
            stack.enter_context(mixed_adapters(self.model, ours, repeats=False))
            yield


def _plain(key: str) -> str:
    return key.replace(f".base_layer.{EtherModel.prefix}", f".{EtherModel.prefix}")


def _with_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}


def _targets(config: EtherConfig, model: nn.Module) -> dict[str, nn.Module]:
    adapted = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    )
    result = {}
    for name, module in model.named_modules():
        found = name and not name.startswith(adapted) and check_target_module_exists(config, name)
        if found and not isinstance(found, _ExcludedModule):
            result[name] = module
    return result


def _problem(config: EtherConfig, name: str, module: nn.Module) -> str | None:
    """Say in one sentence why a module cannot be adapted, or return None."""
    base = module
    while isinstance(base, BaseTunerLayer):
        if reads_weight(base):
            return f"{name} carries a {type(base).__name__}, which reads its weight past ETHER; unload it"
        base = base.base_layer
    if not isinstance(base, nn.Linear) or not (is_plain(base) or is_quantized(base)):
        return (
            f"{name} is a {_describe(base)}; ETHER adapts torch.nn.Linear, also quantized by bitsandbytes or "
            "torchao: load the base otherwise or leave this module out with exclude_modules"
        )
    num_blocks = config.blocks_of(name)
    for side, width, wanted in (
        ("in_features", base.in_features, config.has_input_side),
        ("out_features", base.out_features, config.has_output_side),
    ):
        if wanted and width % num_blocks:
            fitting = ", ".join(str(n) for n in range(1, min(width, 64) + 1) if width % n == 0)
            return f"num_blocks={num_blocks} does not divide {side}={width} of {name}; use one of {fitting}"
        if wanted and width == num_blocks:
            return (
                f"num_blocks={num_blocks} leaves blocks of one number in {side}={width} of {name}, where a "
                "reflection has nothing to learn; use fewer there (num_blocks_pattern), or exclude_modules"
            )
    return None


def _describe(module: nn.Module) -> str:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    weight = getattr(module, "weight", None)
    return kind if weight is None else f"{kind} with {weight.dtype} weights"


def _warn_of_unmatched(config: EtherConfig, model: nn.Module, adapted: list[str]) -> None:
    unmatched = [
        pattern
        for pattern in config.num_blocks_pattern
        if not any(matches_module(pattern, name) for name in adapted)
    ]
    if isinstance(config.target_modules, (set, list)):
        names = [name for name, _ in model.named_modules()]  # those excluded too: they are spelt right
        unmatched += [
            target
            for target in sorted(config.target_modules)
            if not any(name == target or name.endswith(f".{target}") for name in names)
        ]
    if unmatched:
        warnings.warn(f"no adapted module matches {', '.join(unmatched)}; check the spelling", stacklevel=2)

"""Putting a model back as it was when something fails while adapters are attached to it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from ether_diffusion.tuner import EtherLayer

_FLAGS = ("peft_config", "_hf_peft_config_loaded")


class ActiveState(NamedTuple):
    """Which adapters are in force on each layer, and which parameters of adapters take gradients."""

    adapters: dict[EtherLayer, list[str]]
    requires_grad: dict[nn.Parameter, bool]


def active_state(model: nn.Module) -> ActiveState:
    """Remember what `restore_active` puts back."""
    layers = [module for module in model.modules() if isinstance(module, EtherLayer)]
    parameters = (
        p for layer in layers for name in layer.adapter_layer_names for p in getattr(layer, name).values()
    )
    return ActiveState(
        {layer: list(layer.active_adapters) for layer in layers}, {p: p.requires_grad for p in parameters}
    )


def restore_active(model: nn.Module, state: ActiveState) -> None:
    """Put back which adapters are active; on layers that are new since then, those that were anywhere."""
    elsewhere = next(iter(state.adapters.values()), [])
    for module in model.modules():
        if isinstance(module, EtherLayer):
            module.set_adapter(state.adapters.get(module, elsewhere))
    for parameter, flag in state.requires_grad.items():
        parameter.requires_grad_(flag)


@contextmanager
def unchanged_on_failure(models: Sequence[nn.Module], adapter_name: str) -> Iterator[None]:
    """Attach `adapter_name` to all models inside, or leave every one of them as it was."""
    snapshots = [_Snapshot(model) for model in models]
    try:
        yield
    except BaseException:
        for snapshot in snapshots:
            snapshot.restore(adapter_name)
        raise


class _Snapshot:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.children = {module: dict(module._modules) for module in model.modules()}
        self.requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self.active = active_state(model)
        self.flags = {name: model.__dict__[name] for name in _FLAGS if name in model.__dict__}
        self.configs = dict(getattr(model, "peft_config", {}))

    def restore(self, adapter_name: str) -> None:
        for module, children in self.children.items():
            if isinstance(module, EtherLayer):
                for attribute in (*module.adapter_layer_names, *module.other_param_names):
                    if adapter_name in getattr(module, attribute):
                        del getattr(module, attribute)[adapter_name]
            elif module._modules != children:
                module._modules.clear()
                module._modules.update(children)
        restore_active(self.model, self.active)
        for parameter, flag in self.requires_grad.items():
            parameter.requires_grad_(flag)
        for name in _FLAGS:
            self.model.__dict__.pop(name, None)
        self.model.__dict__.update(self.flags)
        if "peft_config" in self.flags:  # the dictionary is shared with PeftModel, so it keeps its identity
            self.flags["peft_config"].clear()
            self.flags["peft_config"].update(self.configs)

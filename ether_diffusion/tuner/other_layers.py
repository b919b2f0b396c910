"""Layers of other methods of PEFT: which adapters they hold, and how strongly these work."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from peft.tuners.boft import BOFTLayer
from peft.tuners.delora import DeloraLayer
from peft.tuners.hra import HRALayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ether_diffusion.tuner.layer import EtherLayer


def adapters_of(layer: BaseTunerLayer) -> list[str]:
    """Return the names of the adapters that a layer of any method holds, in the order of loading."""
    if isinstance(layer, EtherLayer):
        return list(layer.r)
    return list(
        dict.fromkeys(name for held in layer.adapter_layer_names for name in getattr(layer, held, {}))
    )


def other_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """Return the layers of a model that are of another method than ETHER."""
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, EtherLayer)]


def reads_weight(layer: nn.Module) -> bool:
    """Return whether a layer of PEFT multiplies by the base's weight itself, past any adapter beneath it."""
    method = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
    return method in ("hra", "shira", "supertuning") or getattr(layer, "miss_fn", None) == "bat"


def put_in_force(layer: BaseTunerLayer, names: Sequence[str], *, trainable: bool = False) -> None:
    """Let adapters by these names work in a layer of any method, and no others; none is the base."""
    layer.set_adapter(list(names), inference_mode=not trainable)
    if isinstance(layer, BOFTLayer | HRALayer):  # without adapters they differ from the base in the last bit
        layer._disable_adapters = set(names).isdisjoint(adapters_of(layer))


def strength_of(layer: BaseTunerLayer, name: str) -> float:
    """Return how strongly an adapter works in a layer: 0 where it is not in force."""
    if layer.disable_adapters or name not in layer.active_adapters:
        return 0.0
    if isinstance(layer, LoraLayer):
        own = _own_scaling(layer, name)
        return float(layer.scaling[name]) / own if own else 1.0
    return 1.0


def check_strengths(model: nn.Module, strengths: Mapping[str, float]) -> None:
    """Check strengths of adapters against what their methods can do; those of ETHER can do all.

    Raises:
        ValueError: a method has no strength, and it is neither 0 nor 1.
    """
    for layer in other_layers(model):
        if isinstance(layer, LoraLayer | DeloraLayer):
            continue
        for name in adapters_of(layer):
            if strengths.get(name, 1.0) not in (0.0, 1.0):
                method = layer.adapter_layer_names[0].partition("_")[0].upper()  # as in oft_R
                raise ValueError(
                    f"{name} is an adapter of {method}, which has no strengths between or beyond; found "
                    f"{strengths[name]:g}, use 1 as trained or 0 the base"
                )


@contextmanager
def chosen_others(layers: Sequence[BaseTunerLayer], strengths: Mapping[str, float]) -> Iterator[None]:
    """Run with these adapters of other methods and no others, where `check_strengths` found nothing.

    A strength multiplies W' - W: of LoRA its scaling, of DeLoRA its λ, which are put back exactly.
    """
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_chosen(layer, strengths))
        yield


@contextmanager
def _chosen(layer: BaseTunerLayer, strengths: Mapping[str, float]) -> Iterator[None]:
    here = {name: strengths[name] for name in adapters_of(layer) if strengths.get(name)}
    disabled, active = layer._disable_adapters, layer._active_adapter
    try:
        layer._disable_adapters, layer._active_adapter = not here, list(here)
        with _scaled(layer, here):
            yield
    finally:
        layer._disable_adapters, layer._active_adapter = disabled, active


@contextmanager
def _scaled(layer: BaseTunerLayer, strengths: Mapping[str, float]) -> Iterator[None]:
    if isinstance(layer, LoraLayer):
        before = dict(layer.scaling)
        layer.scaling.update({name: s * _own_scaling(layer, name) for name, s in strengths.items()})
        try:
            yield
        finally:
            layer.scaling.update(before)
    elif isinstance(layer, DeloraLayer):
        values = {name: layer.delora_lambda[name].data for name in strengths}
        try:
            for name, value in values.items():
                layer.delora_lambda[name].data = value if strengths[name] == 1 else value * strengths[name]
            yield
        finally:
            for name, value in values.items():
                layer.delora_lambda[name].data = value
    else:
        yield


def _own_scaling(layer: LoraLayer, name: str) -> float:
    rank = float(layer.r[name])
    return float(layer.lora_alpha[name]) / (rank**0.5 if layer.use_rslora.get(name, False) else rank)

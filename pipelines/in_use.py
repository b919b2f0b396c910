"""Which adapters are in force in a pipeline, of ETHER or another method, and what others cannot do."""

from collections.abc import Mapping, Sequence

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from ether_diffusion.adapters.format import content_hash
from ether_diffusion.adapters.load import remove_adapter
from ether_diffusion.adapters.models import Part, Pipeline, adapter_tensors, find_parts
from ether_diffusion.pipelines.metadata import AdapterUse
from ether_diffusion.tuner import EtherLayer
from ether_diffusion.tuner.other_layers import adapters_of, other_layers, put_in_force, strength_of
from ether_diffusion.wording import listed


def loaded_adapters(pipeline: Pipeline) -> dict[str, list[Part]]:
    """Return the adapters of a pipeline by name, of any method, each with the parts that carry it."""
    carrying: dict[str, list[Part]] = {}
    for part in find_parts(pipeline):
        names = {name: None for layer in _layers(part) for name in adapters_of(layer)}  # in loading order
        for name in names:
            carrying.setdefault(name, []).append(part)
    return carrying


def is_fused(pipeline: Pipeline) -> bool:
    """Say whether adapters are merged into the weights of a pipeline."""
    return any(layer.merged for part in find_parts(pipeline) for layer in _layers(part))


def adapters_in_use(pipeline: Pipeline, *, scale: float = 1.0) -> tuple[AdapterUse, ...]:
    """Return the adapters in force, merged ones included; `scale` multiplies the strengths of the others."""
    uses = []
    for name, parts in loaded_adapters(pipeline).items():
        strengths = {
            _strength(layer, name, scale)
            for part in parts
            for layer in _layers(part)
            if name in adapters_of(layer)
        }
        if strengths != {0.0}:
            strength = strengths.pop() if len(strengths) == 1 else None
            uses.append(AdapterUse(name, strength, _hashes(name, parts)))
    return tuple(uses)


def use_of(pipeline: Pipeline, strengths: Mapping[str, float]) -> tuple[AdapterUse, ...]:
    """Return adapters of a pipeline as if they were in force with these strengths."""
    loaded = loaded_adapters(pipeline)
    return tuple(
        AdapterUse(name, strength, _hashes(name, loaded[name]))
        for name, strength in strengths.items()
        if strength
    )


def of_other_methods(pipeline: Pipeline) -> dict[str, list[Part]]:
    """Return the adapters of a pipeline that are not of ETHER by name, with the parts that carry them."""
    found: dict[str, list[Part]] = {}
    for part in find_parts(pipeline):
        for name in {name: None for layer in other_layers(part.model) for name in adapters_of(layer)}:
            found.setdefault(name, []).append(part)
    return found


def set_others(pipeline: Pipeline, names: Sequence[str], weights: Sequence[float]) -> bool:
    """Activate adapters by name that diffusers cannot weigh, and say whether they are such.

    Raises:
        ValueError: one of them is to have a strength other than 1.
    """
    others = of_other_methods(pipeline)
    layers = _other_layers(pipeline, [name for name in names if name in others])
    if all(isinstance(layer, LoraLayer) for layer in layers):
        return False  # diffusers weighs these, as it does ETHER's
    strange = [name for name in names if name not in others]
    if strange:
        raise ValueError(
            f"{listed(strange)} is of another method than the rest, or unknown; set one at a time"
        )
    if any(weight != 1 for weight in weights):
        raise ValueError(
            f"{listed(names)} has no strength that could be set for all calls; leave the weights out, or "
            f"choose for a call with adapters={{{names[0]!r}: 1.0}}, or {{}} for the base"
        )
    for layer in layers:
        put_in_force(layer, names)
    return True


def check_scale(pipeline: Pipeline, scale: float) -> None:
    """Check that the scale of a call reaches every adapter.

    Raises:
        ValueError: one is of a method that diffusers cannot scale.
    """
    others = list(of_other_methods(pipeline))
    if scale != 1.0 and not all(isinstance(layer, LoraLayer) for layer in _other_layers(pipeline, others)):
        raise ValueError(
            f"cross_attention_kwargs' scale does not reach {listed(others)}; leave it out, or choose a "
            "strength with adapters="
        )


def check_fusible(pipeline: Pipeline, names: Sequence[str]) -> None:
    """Check that adapters can be merged into the weights and these be put back, bit for bit.

    Raises:
        ValueError: one is not of ETHER, and PEFT would subtract what it added.
    """
    others = [name for name in names if name in of_other_methods(pipeline)]
    if others:
        raise ValueError(
            f"{listed(others)} is not of ETHER, and the base's weights would not come back bit for bit; draw "
            "with it as it is"
        )


def remove_others(pipeline: Pipeline, names: Sequence[str]) -> None:
    """Take those adapters of these names that are not of ETHER out of a pipeline."""
    for name, parts in of_other_methods(pipeline).items():
        if name in names:
            for part in parts:
                remove_adapter(part.model, [name])


def _strength(layer: BaseTunerLayer, name: str, scale: float) -> float:
    if not isinstance(layer, EtherLayer):
        return 1.0 if name in layer.merged_adapters else strength_of(layer, name) * scale
    if layer.merged:
        return layer.scale(name) if name in layer.merged_adapters else 0.0
    return 0.0 if layer.disable_adapters else layer.active_scales().get(name, 0.0) * scale


def _layers(part: Part) -> Sequence[BaseTunerLayer]:
    return [module for module in part.model.modules() if isinstance(module, BaseTunerLayer)]


def _hashes(name: str, parts: Sequence[Part]) -> dict[str, str]:
    tensors = {part.name: adapter_tensors(part.model, name) for part in parts}
    # sequential offloading keeps the values elsewhere
    there = {part: found for part, found in tensors.items() if not any(t.is_meta for t in found.values())}
    return {part: content_hash(found) for part, found in there.items()}


def _other_layers(pipeline: Pipeline, names: Sequence[str]) -> list[BaseTunerLayer]:
    others = of_other_methods(pipeline)
    models = {id(part.model): part.model for name in names for part in others[name]}
    return [layer for model in models.values() for layer in other_layers(model)]

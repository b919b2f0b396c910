"""Which adapters are in force in a pipeline, of ETHER or another method, and how strongly."""

from collections.abc import Mapping, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer

from ether_diffusion.adapters.format import content_hash
from ether_diffusion.adapters.load import adapter_tensors
from ether_diffusion.adapters.models import Part, Pipeline, find_parts
from ether_diffusion.pipelines.metadata import AdapterUse
from ether_diffusion.tuner import EtherLayer
from ether_diffusion.tuner.other_layers import adapters_of, other_layers, strength_of


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

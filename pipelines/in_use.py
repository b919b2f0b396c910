"""Which ETHER adapters are in force in a pipeline, and how strongly."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ether_diffusion.adapter_file.content_hash import content_hash
from ether_diffusion.adapter_file.models import ether_layers
from ether_diffusion.adapter_file.parts import Part, Pipeline, find_parts
from ether_diffusion.pipelines.metadata import AdapterUse
from ether_diffusion.tuner import EtherLayer


def loaded_adapters(pipeline: Pipeline) -> dict[str, list[Part]]:
    """Return the ETHER adapters of a pipeline by name, each with the parts that carry it."""
    carrying: dict[str, list[Part]] = {}
    for part in find_parts(pipeline, None):
        names = {name: None for layer in _layers(part) for name in layer.r}  # in the order of loading
        for name in names:
            carrying.setdefault(name, []).append(part)
    return carrying


def is_fused(pipeline: Pipeline) -> bool:
    """Say whether adapters are merged into the weights of a pipeline."""
    return any(layer.merged for part in find_parts(pipeline, None) for layer in _layers(part))


def adapters_in_use(pipeline: Pipeline, *, scale: float = 1.0) -> tuple[AdapterUse, ...]:
    """Return the adapters in force, merged ones included; `scale` multiplies the strengths of the others."""
    uses = []
    for name, parts in loaded_adapters(pipeline).items():
        strengths = {
            _strength(layer, name, scale) for part in parts for layer in _layers(part) if name in layer.r
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


def _strength(layer: EtherLayer, name: str, scale: float) -> float:
    if layer.merged:
        return layer.scale(name) if name in layer.merged_adapters else 0.0
    return 0.0 if layer.disable_adapters else layer.active_scales().get(name, 0.0) * scale


def _layers(part: Part) -> Sequence[EtherLayer]:
    return [module for module in part.model.modules() if isinstance(module, EtherLayer)]


def _hashes(name: str, parts: Sequence[Part]) -> dict[str, str]:
    tensors = {part.name: _tensors(part, name) for part in parts}
    # sequential offloading keeps the values elsewhere
    there = {part: found for part, found in tensors.items() if not any(t.is_meta for t in found.values())}
    return {part: content_hash(found) for part, found in there.items()}


def _tensors(part: Part, adapter_name: str) -> dict[str, Tensor]:
    return {
        f"{name}.{vector}": getattr(layer, vector)[adapter_name]
        for name, layer in ether_layers(part.model, adapter_name).items()
        for vector in layer.adapter_layer_names
        if adapter_name in getattr(layer, vector)
    }

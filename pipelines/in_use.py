"""The adapters of a pipeline, of ETHER or another method: which are in force, and which a call chooses."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from ether_diffusion.adapters.format import content_hash
from ether_diffusion.adapters.models import Part, Pipeline, adapter_tensors, find_parts
from ether_diffusion.pipelines.metadata import AdapterUse
from ether_diffusion.tuner import EtherLayer, chosen_adapters, mixed_adapters
from ether_diffusion.tuner.other_layers import (
    adapters_of,
    check_strengths,
    other_layers,
    put_in_force,
    strength_of,
)
from ether_diffusion.wording import listed, printable

Strengths = Mapping[str, float]
"""Adapters by name with the strength of each; {} is the base."""
Choice = Strengths | Sequence[str | Strengths | None]
"""For all pictures of a call, or for each of its prompts: a name is at strength 1, None is the base."""


def loaded_adapters(pipeline: Pipeline) -> dict[str, list[Part]]:
    """Return the adapters of a pipeline by name, of any method, each with the parts that carry it."""
    carrying: dict[str, list[Part]] = {}
    for part in find_parts(pipeline):
        names = {name: None for layer in _layers(part) for name in adapters_of(layer)}  # in loading order
        for name in names:
            carrying.setdefault(name, []).append(part)
    return carrying


def of_other_methods(pipeline: Pipeline) -> dict[str, list[BaseTunerLayer]]:
    """Return the adapters of a pipeline that are not of ETHER by name, with the layers beside them."""
    found: dict[str, list[BaseTunerLayer]] = {}
    for part in find_parts(pipeline):
        layers = other_layers(part.model)
        for name in {name: None for layer in layers for name in adapters_of(layer)}:
            found.setdefault(name, []).extend(layers)
    return found


def is_fused(pipeline: Pipeline) -> bool:
    """Say whether adapters are merged into the weights of a pipeline."""
    return any(layer.merged for part in find_parts(pipeline) for layer in _layers(part))


def adapters_in_use(pipeline: Pipeline, *, scale: float = 1.0) -> tuple[AdapterUse, ...]:
    """Return the adapters in force, merged ones included; `scale` multiplies the strengths of the others."""
    uses = []
    for name, parts in loaded_adapters(pipeline).items():
        layers = [layer for part in parts for layer in _layers(part) if name in adapters_of(layer)]
        strengths = {_strength(layer, name, scale) for layer in layers}
        if strengths != {0.0}:
            strength = strengths.pop() if len(strengths) == 1 else None
            uses.append(AdapterUse(name, strength, _hashes(name, parts)))
    return tuple(uses)


def use_of(pipeline: Pipeline, strengths: Strengths) -> tuple[AdapterUse, ...]:
    """Return adapters of a pipeline as if they were in force with these strengths."""
    loaded = loaded_adapters(pipeline)
    chosen = [(name, strength) for name, strength in strengths.items() if strength]
    return tuple(AdapterUse(name, strength, _hashes(name, loaded[name])) for name, strength in chosen)


def set_others(pipeline: Pipeline, names: Sequence[str], weights: Sequence[float]) -> bool:
    """Activate adapters by name that diffusers cannot weigh, and say whether they are such."""
    others = of_other_methods(pipeline)
    layers = [layer for name in names for layer in others.get(name, ())]
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


def check_choice(pipeline: Pipeline, choice: Choice, num_prompts: int) -> Strengths | list[Strengths]:
    """Return a choice as strengths, for all pictures or a list by prompt."""
    if isinstance(choice, str):
        raise ValueError(f"adapters={choice!r} is text; give strengths, as adapters={{{choice!r}: 1.0}}")
    each = [
        {one: 1.0} if isinstance(one, str) else {name: float(s) for name, s in (one or {}).items()}
        for one in ([choice] if isinstance(choice, Mapping) else choice)
    ]
    loaded = loaded_adapters(pipeline)
    for name, strength in (pair for one in each for pair in one.items()):
        if name not in loaded:
            raise ValueError(
                f"no adapter named {printable(name)} is loaded; there is {listed(loaded) or 'none'}: "
                "load it with load_ether_weights"
            )
        if not math.isfinite(strength):
            raise ValueError(f"the strength of {printable(name)} is {strength}; use a finite number")
    for part in find_parts(pipeline):
        for one in each:
            check_strengths(part.model, one)
    if is_fused(pipeline):
        raise ValueError("adapters are fused into the base; call unfuse before choosing adapters for a call")
    if isinstance(choice, Mapping):
        return each[0]
    if len(each) != num_prompts:
        raise ValueError(f"found {len(each)} adapters for {num_prompts} prompts; give one per prompt")
    unmixed = {name: None for one in each for name in one} & of_other_methods(pipeline).keys()
    if unmixed:
        raise ValueError(
            f"{listed(unmixed)} is not of ETHER, whose adapters alone differ by prompt in a batch; choose it "
            "for a whole call"
        )
    several = next((one for one in each if len(one) > 1), None)
    if several is not None:
        raise ValueError(
            f"found {listed(several)} for one prompt; among adapters by prompt each takes at most one"
        )
    return list(each)


@contextmanager
def chosen_for_call(
    pipeline: Pipeline, choice: Strengths | Sequence[Strengths], num_images_per_prompt: int
) -> Iterator[None]:
    """Put a checked choice in force on all parts of a pipeline, and take it back after, whatever happens."""
    with ExitStack() as stack:
        for part in find_parts(pipeline):
            names = {name for layer in _layers(part) for name in adapters_of(layer)}
            if isinstance(choice, Mapping):
                here = {name: strength for name, strength in choice.items() if name in names}
                stack.enter_context(chosen_adapters(part.model, here))
            elif any(isinstance(layer, EtherLayer) for layer in _layers(part)):
                # the text encoders see each prompt once, the denoiser once for each of its pictures
                repeats = 1 if part.name.startswith("text_encoder") else num_images_per_prompt
                pairs = [next(iter(one.items()), ("", 0.0)) for one in choice for _ in range(repeats)]
                rows = [name if name in names else None for name, _ in pairs]
                stack.enter_context(chosen_adapters(part.model, {}))
                stack.enter_context(mixed_adapters(part.model, rows, scales=[s for _, s in pairs]))
        yield


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

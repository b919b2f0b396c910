"""Base or adapters for one call: what may be chosen, put in force for the call and taken back after."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer

from ether_diffusion.adapters.models import Part, Pipeline, find_parts
from ether_diffusion.pipelines.in_use import is_fused, loaded_adapters, of_other_methods
from ether_diffusion.tuner import EtherLayer, chosen_adapters, mixed_adapters
from ether_diffusion.tuner.other_layers import adapters_of, check_strengths
from ether_diffusion.wording import listed, printable

Strengths = Mapping[str, float]
"""Adapters by name with the strength of each; {} is the base."""
Choice = Strengths | Sequence[str | Strengths | None]
"""For all pictures of a call, or for each of its prompts: a name is at strength 1, None is the base."""


def check_choice(pipeline: Pipeline, choice: Choice, num_prompts: int) -> Strengths | list[Strengths]:
    """Return a choice as strengths, for all pictures or a list by prompt.

    Raises:
        ValueError: a name is unknown, a strength is not finite, adapters are fused, or it is not one per
            prompt.
    """
    if isinstance(choice, str):
        raise ValueError(f"adapters={choice!r} is text; give strengths, as adapters={{{choice!r}: 1.0}}")
    each = [_strengths(one) for one in ([choice] if isinstance(choice, Mapping) else choice)]
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
    several = [one for one in each if len(one) > 1]
    others = of_other_methods(pipeline)
    unmixed = list(dict.fromkeys(name for one in each for name in one if name in others))
    if unmixed:
        raise ValueError(
            f"{listed(unmixed)} is not of ETHER, whose adapters alone differ by prompt in a batch; choose it "
            "for a whole call"
        )
    if several:
        raise ValueError(
            f"found {listed(several[0])} for one prompt; among adapters by prompt each takes at most one"
        )
    return each


@contextmanager
def chosen_for_call(
    pipeline: Pipeline, choice: Strengths | Sequence[Strengths], num_images_per_prompt: int
) -> Iterator[None]:
    """Put a checked choice in force on all parts of a pipeline, and take it back after, whatever happens."""
    with ExitStack() as stack:
        for part in find_parts(pipeline):
            layers = [module for module in part.model.modules() if isinstance(module, BaseTunerLayer)]
            known = {name for layer in layers if isinstance(layer, EtherLayer) for name in layer.r}
            if isinstance(choice, Mapping):
                every = {name for layer in layers for name in adapters_of(layer)}
                here = {name: strength for name, strength in choice.items() if name in every}
                stack.enter_context(chosen_adapters(part.model, here))
            elif known:
                _mix(stack, part, known, choice, num_images_per_prompt)
        yield


def _mix(
    stack: ExitStack, part: Part, known: set[str], choice: Sequence[Strengths], num_images_per_prompt: int
) -> None:
    # the text encoders see each prompt once, the denoiser once for each of its pictures
    repeats = 1 if part.name.startswith("text_encoder") else num_images_per_prompt
    pairs = [next(iter(one.items()), ("", 0.0)) for one in choice for _ in range(repeats)]
    names = [name if name in known else None for name, _ in pairs]
    stack.enter_context(chosen_adapters(part.model, {}))
    stack.enter_context(mixed_adapters(part.model, names, scales=[strength for _, strength in pairs]))


def _strengths(one: str | Strengths | None) -> Strengths:
    if isinstance(one, str):
        return {one: 1.0}
    return {name: float(strength) for name, strength in (one or {}).items()}

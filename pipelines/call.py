"""One call of a pipeline: its arguments by name, how many pictures it makes, and the seed of each."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ether_diffusion.pipelines.seeds import expand_seeds, make_generators, seeds_of


@dataclass(frozen=True)
class Call:
    """Arguments as a diffusers pipeline takes them, with the defaults of its signature beside them."""

    arguments: Mapping[str, Any]
    defaults: Mapping[str, Any]
    num_prompts: int
    images_per_prompt: int
    seeds: Sequence[int | None]

    @property
    def scale(self) -> float:
        """What the call multiplies the strengths of all active adapters by."""
        return float((self.arguments.get("cross_attention_kwargs") or {}).get("scale", 1.0))


def bind_call(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    keywords: Mapping[str, Any],
    *,
    seed: int | Sequence[int] | None,
) -> Call:
    """Bind the arguments of a call of `function`, with a generator for each picture.

    Raises:
        ValueError: both a seed and a generator are given, or the seeds are not one per picture.
    """
    signature = inspect.signature(function)
    bound = signature.bind(*arguments, **keywords)
    bound.apply_defaults()
    values = dict(bound.arguments)
    values |= values.pop("kwargs", {})
    num_prompts, images_per_prompt = num_prompts_of(values), values["num_images_per_prompt"] or 1
    seeds: list[int | None]
    if values["generator"] is None:
        drawn = expand_seeds(seed, num_prompts * images_per_prompt)
        seeds, values["generator"] = [*drawn], make_generators(drawn)
    elif seed is not None:
        raise ValueError("found both seed and generator; give one of them")
    else:
        seeds = seeds_of(values["generator"], num_prompts * images_per_prompt)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    return Call(values, defaults, num_prompts, images_per_prompt, seeds)


def num_prompts_of(arguments: Mapping[str, Any]) -> int:
    """Return how many prompts, or rows of embeddings, a call has."""
    prompt, embeddings = arguments.get("prompt"), arguments.get("prompt_embeds")
    if prompt is not None:
        return 1 if isinstance(prompt, str) else len(prompt)
    return 1 if embeddings is None else len(embeddings)

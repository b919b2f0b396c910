"""One call of a pipeline: its arguments by name, the seed of each picture, and what each says of itself."""

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn

import ether_diffusion
from ether_diffusion.adapters.format import Fact, is_fact
from ether_diffusion.adapters.models import (
    Pipeline,
    bare_model,
    base_fingerprint,
    name_of_base,
    plain_targets,
)
from ether_diffusion.pipelines.metadata import AdapterUse, ImageMetadata
from ether_diffusion.tuner import EtherConfig

MAX_SEED = 2**63 - 1
OnStep = Callable[[int, int, Tensor], None]
"""Hears how many of how many steps of a picture are done, and its latents (b, c, h, w); it may raise."""
_RECORDED = {"prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "height", "width"}
_IRRELEVANT = {"num_images_per_prompt", "output_type", "return_dict", "generator"}


class StepWatcher:
    """A `callback_on_step_end` of diffusers' that changes nothing, so that pictures do not name it."""

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step

    def __call__(
        self, pipeline: Any, step: int, timestep: object, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Tell of a step; the pipeline goes on with its own tensors."""
        self._on_step(step + 1, pipeline.num_timesteps, tensors["latents"])
        return {}


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

    def describe(self, pipeline: Pipeline, *, fingerprint: str | None) -> ImageMetadata:
        """Return what all pictures of the call have in common; `describe_picture` fills in the rest."""
        arguments = self.arguments
        further = {
            name: value
            for name, value in arguments.items()
            if name not in _RECORDED | _IRRELEVANT
            and not isinstance(value, StepWatcher)
            and not _same(value, self.defaults.get(name))
        }
        has_own_steps = arguments.get("timesteps") is not None or arguments.get("sigmas") is not None
        scheduler = pipeline.components["scheduler"]
        return ImageMetadata(
            prompt=None,
            negative_prompt=None,
            seed=None,
            steps=None if has_own_steps else int(arguments["num_inference_steps"]),
            guidance_scale=float(arguments["guidance_scale"]),
            width=1,
            height=1,
            pipeline=type(pipeline).__name__,
            scheduler=type(scheduler).__name__,
            scheduler_config=scheduler_settings(scheduler),
            base=name_of_base(pipeline),
            base_fingerprint=fingerprint,
            options={name: value for name, value in further.items() if is_fact(value)},
            unrecorded=tuple(name for name, value in further.items() if not is_fact(value)),
            versions=library_versions(),
        )

    def describe_picture(
        self, common: ImageMetadata, index: int, image: Image.Image, adapters: tuple[AdapterUse, ...]
    ) -> ImageMetadata:
        """Return the metadata of picture `index`."""

        def of_row(prompts: str | Sequence[str] | None) -> str | None:
            if prompts is None or isinstance(prompts, str):
                return prompts
            return prompts[index // self.images_per_prompt]

        return replace(
            common,
            prompt=of_row(self.arguments.get("prompt")),
            negative_prompt=of_row(self.arguments.get("negative_prompt")),
            seed=self.seeds[index],
            width=image.width,
            height=image.height,
            adapters=adapters,
        )


def bind_call(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    keywords: Mapping[str, Any],
    *,
    seed: int | Sequence[int] | None,
) -> Call:
    """Bind the arguments of a call of `function`, with a generator for each picture.

    Generators are on the CPU, whose draws are the same on every machine.
    """
    signature = inspect.signature(function)
    bound = signature.bind(*arguments, **keywords)
    bound.apply_defaults()
    values = dict(bound.arguments)
    values |= values.pop("kwargs", {})
    num_prompts, images_per_prompt = num_prompts_of(values), values["num_images_per_prompt"] or 1
    num_images, given, seeds = num_prompts * images_per_prompt, values["generator"], list[int | None]()
    if given is None:
        drawn = _expand_seeds(seed, num_images)
        seeds += drawn
        values["generator"] = [torch.Generator("cpu").manual_seed(one) for one in drawn]
    elif seed is not None:
        raise ValueError("found both seed and generator; give one of them")
    else:
        generators = [given] if isinstance(given, torch.Generator) else list(given)
        told = len(generators) == num_images
        seeds += map(_fresh_seed, generators) if told else [None] * num_images
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    return Call(values, defaults, num_prompts, images_per_prompt, seeds)


def num_prompts_of(arguments: Mapping[str, Any]) -> int:
    """Return how many prompts, or rows of embeddings, a call has."""
    prompt, embeddings = arguments.get("prompt"), arguments.get("prompt_embeds")
    if prompt is not None:
        return 1 if isinstance(prompt, str) else len(prompt)
    return 1 if embeddings is None else len(embeddings)


def library_versions() -> dict[str, str]:
    """Return the versions that decide on the pixels of a picture, by library."""
    return {
        "ether_diffusion": ether_diffusion.__version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
    }


def scheduler_settings(scheduler: Any) -> dict[str, Fact]:
    """Return what differs from the defaults in a scheduler's configuration."""
    parameters = inspect.signature(type(scheduler).__init__).parameters
    settings: dict[str, Fact] = {}
    for name, parameter in parameters.items():
        value = scheduler.config.get(name, parameter.default)
        if name != "self" and not _same(value, parameter.default):
            settings[name] = value if is_fact(value) else str(value)
    return settings


def fingerprint_of(unet: nn.Module) -> str | None:
    """Return the short name of a UNet's own weights, those of its attention projections."""
    names = sorted(plain_targets(bare_model(unet), EtherConfig()))
    found = base_fingerprint(unet, names) if names else None
    return None if found is None else found.id


def _same(value: object, default: object) -> bool:
    return value is default or (is_fact(value) and value == default)


def _expand_seeds(seed: int | Sequence[int] | None, num_images: int) -> list[int]:
    """Return a seed per picture: seed, seed + 1, …, or those given; None draws the first from torch's own."""
    if seed is None:
        seed = int(torch.randint(2**32, ()))
    first = 0 if isinstance(seed, Sequence) else operator.index(seed)
    given = seed if isinstance(seed, Sequence) else range(first, first + num_images)
    seeds = [operator.index(value) for value in given]
    if len(seeds) != num_images:
        raise ValueError(f"found {len(seeds)} seeds for {num_images} pictures; give one per picture, or one")
    wrong = [value for value in seeds if not 0 <= value <= MAX_SEED]
    if wrong:
        raise ValueError(f"a seed is a whole number from 0 to 2^63 - 1; found {wrong[0]}")
    return seeds


def _fresh_seed(generator: torch.Generator) -> int | None:
    """Return the seed that a caller's generator stands for; None where a seed does not say it all."""
    seed = generator.initial_seed()
    if generator.device.type != "cpu" or not 0 <= seed <= MAX_SEED:
        return None
    is_fresh = torch.equal(torch.Generator("cpu").manual_seed(seed).get_state(), generator.get_state())
    return seed if is_fresh else None

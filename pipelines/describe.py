"""From the arguments of a call to the metadata of each of its pictures."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import nn

import ether_diffusion
from ether_diffusion.adapters.adapter import Fact
from ether_diffusion.adapters.fit import plain_targets
from ether_diffusion.adapters.models import bare_model, base_fingerprint, name_of_base
from ether_diffusion.adapters.parts import Pipeline
from ether_diffusion.pipelines.call import Call
from ether_diffusion.pipelines.metadata import AdapterUse, ImageMetadata, recordable
from ether_diffusion.pipelines.watching import StepWatcher
from ether_diffusion.tuner import EtherConfig

_RECORDED = {"prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "height", "width"}
_IRRELEVANT = {"num_images_per_prompt", "output_type", "return_dict", "generator"}


def describe_call(pipeline: Pipeline, call: Call, *, fingerprint: str | None) -> ImageMetadata:
    """Return what all pictures of a call have in common; `describe_picture` fills in the rest."""
    arguments = call.arguments
    further = {
        name: value
        for name, value in arguments.items()
        if name not in _RECORDED | _IRRELEVANT
        and not isinstance(value, StepWatcher)
        and not _same(value, call.defaults.get(name))
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
        options={name: value for name, value in further.items() if recordable(value)},
        unrecorded=tuple(name for name, value in further.items() if not recordable(value)),
        versions=library_versions(),
    )


def describe_picture(
    common: ImageMetadata, call: Call, index: int, image: Image.Image, adapters: tuple[AdapterUse, ...]
) -> ImageMetadata:
    """Return the metadata of picture `index` of a call."""
    row = index // call.images_per_prompt
    return replace(
        common,
        prompt=_of_row(call.arguments.get("prompt"), row),
        negative_prompt=_of_row(call.arguments.get("negative_prompt"), row),
        seed=call.seeds[index],
        width=image.width,
        height=image.height,
        adapters=adapters,
    )


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
            settings[name] = value if recordable(value) else str(value)
    return settings


def fingerprint_of(unet: nn.Module) -> str | None:
    """Return the short name of a UNet's own weights, those of its attention projections."""
    names = sorted(plain_targets(bare_model(unet), EtherConfig()))
    found = base_fingerprint(unet, names) if names else None
    return None if found is None else found.id


def _of_row(prompts: str | Sequence[str] | None, row: int) -> str | None:
    return prompts if prompts is None or isinstance(prompts, str) else prompts[row]


def _same(value: object, default: object) -> bool:
    return value is default or (recordable(value) and value == default)

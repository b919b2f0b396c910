"""The loss of an adapter on true pictures of its subject in new scenes, and how far it leaves the base.

Both are means over fixed noise and timesteps, the same for every adapter: they tell adapters apart that
scores of a few drawn pictures do not.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

from ether_diffusion.metrics.scores import other_tiny_prompts
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.pictures import draw_scenes
from ether_diffusion.tiny_world.subjects import unseen_prompts, unseen_scenes
from ether_diffusion.training.methods import adapters_off
from research.base import load_base, side_of

TIMESTEPS = 8
"""Of each picture, in the middles of so many equal parts of all timesteps."""
BATCH = 32


class Questions(NamedTuple):
    """What a UNet is asked, and what it should answer: all rows of one picture after another."""

    noisy: Tensor
    timesteps: Tensor
    embeddings: Tensor
    targets: Tensor


def scene_scores(pipeline: StableDiffusionPipeline, subject: str) -> dict[str, float]:
    """Return the loss on a subject's new scenes, and the mean square change of predictions of others."""
    mine, others = new_scenes(subject), other_pictures()
    with adapters_off([pipeline.unet]):
        before = _answers(pipeline, others)
    return {
        "scene_loss": F.mse_loss(_answers(pipeline, mine), mine.targets).item(),
        "prediction_drift": F.mse_loss(_answers(pipeline, others), before).item(),
    }


@torch.no_grad()
def _answers(pipeline: StableDiffusionPipeline, asked: Questions) -> Tensor:
    rows = [torch.split(each, BATCH) for each in asked[:3]]
    return torch.cat([pipeline.unet(*part).sample for part in zip(*rows, strict=True)])


@cache
@torch.no_grad()
def new_scenes(subject: str) -> Questions:
    """Return true pictures of a subject where no photo has it, with their prompts."""
    concept, base = find_concept(subject), load_base()
    encoded = base.vae.encode(draw_scenes(unseen_scenes(concept), size=side_of(base))).latent_dist.mode()
    return _noised(base, encoded * base.vae.config.scaling_factor, unseen_prompts(concept))


@cache
@torch.no_grad()
def other_pictures() -> Questions:
    """Return pictures that the base draws of what it knows, with their prompts."""
    base, prompts = load_base(), other_tiny_prompts()
    generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    how = {"num_inference_steps": 15, "guidance_scale": 3.0, "output_type": "latent"}
    return _noised(base, base(list(prompts), generator=generators, **how).images, prompts)


def _noised(base: StableDiffusionPipeline, latents: Tensor, prompts: tuple[str, ...]) -> Questions:
    schedule = DDPMScheduler.from_config(base.scheduler.config)
    number = schedule.config.num_train_timesteps
    timesteps = torch.tensor([int((part + 0.5) * number / TIMESTEPS) for part in range(TIMESTEPS)])
    timesteps, latents = timesteps.repeat(len(latents)), latents.repeat_interleave(TIMESTEPS, 0)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    tokens = base.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
    embeddings = base.text_encoder(tokens.input_ids)[0].repeat_interleave(TIMESTEPS, 0)
    targets = schedule.get_velocity(latents, noise, timesteps)
    return Questions(schedule.add_noise(latents, noise, timesteps), timesteps, embeddings, targets)

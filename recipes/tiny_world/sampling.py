"""Sampling latents from prompt states, for sheets and scores."""

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel


@torch.no_grad()
def sample_latents(
    unet: UNet2DConditionModel,
    scheduler: DPMSolverMultistepScheduler,
    *,
    noise: torch.Tensor,
    prompt_states: torch.Tensor,
    empty_states: torch.Tensor,
    num_steps: int = 20,
    guidance_scale: float = 3.0,
) -> torch.Tensor:
    """Denoise noise (b, 4, h, w) with guidance; states are (b, tokens, width) and (1, tokens, width)."""
    scheduler.set_timesteps(num_steps)
    states = torch.cat((empty_states.expand_as(prompt_states), prompt_states))
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(torch.cat((latents, latents)), timestep)
        unguided, guided = unet(scaled, timestep, states).sample.float().chunk(2)
        latents = scheduler.step(
            unguided + guidance_scale * (guided - unguided), timestep, latents
        ).prev_sample
    result: torch.Tensor = latents
    return result

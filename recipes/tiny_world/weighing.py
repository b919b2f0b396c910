"""The weights stage: how often each concept is drawn, by how hard its pictures still are for the UNet."""

import torch

from recipes.tiny_world.unet import CachedLatents, UNetObjective

SAMPLES = 16
"""Latents of each concept that are tried, each at its own timestep."""
BOUNDS = (0.5, 3.0)


@torch.no_grad()
def weigh_concepts(
    data: CachedLatents, objective: UNetObjective, num_concepts: int, device: torch.device
) -> torch.Tensor:
    """Return a weight (num_concepts) for each concept: its loss over the mean's, squared, within BOUNDS.

    All concepts get the same noise and timesteps, so that only their pictures differ.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((SAMPLES, 4, 16, 16), generator=generator).to(device)
    # The noisier half is where shapes are decided.
    timesteps = torch.linspace(400, 950, SAMPLES).long().to(device)
    objective.to(device).eval()
    losses = []
    for label in range(num_concepts):
        indices = (data.labels == label).nonzero().flatten()[:SAMPLES]
        latents = data.latents[indices].float().to(device) * data.scale
        count = len(indices)
        tried = objective.losses(
            latents, noise[:count], timesteps[:count], data.input_ids[indices].to(device)
        )
        losses.append(tried.mean())
    found = torch.stack(losses).cpu()
    return (found / found.mean()).square().clamp(*BOUNDS)

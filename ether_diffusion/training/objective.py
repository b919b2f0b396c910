"""The denoising objective: noise, timesteps, what the UNet should say, and what each sample weighs."""

from collections import Counter
from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from ether_diffusion.training.randomness import stream


def draw_noise(
    shape: torch.Size, visits: Sequence[int], is_frozen_prior: Tensor, *, seed: int, offset: float = 0.0
) -> Tensor:
    """Return noise (b, c, h, w): each row a function of the seed and its visit, whatever the batch.

    The second row of a visit is its class image and gets noise of its own; where it is a frozen prior it is
    the same picture under another prompt, and gets the same. `offset` adds that share of noise that is
    constant over the picture (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    rows = []
    for visit, kind in _kinds(visits, is_frozen_prior):
        generator = stream(seed, "noise", visit, kind)
        row = torch.randn(shape[1:], generator=generator)
        if offset:
            row = row + offset * torch.randn((shape[1], 1, 1), generator=generator)
        rows.append(row)
    return torch.stack(rows)


def draw_timesteps(
    visits: Sequence[int], is_frozen_prior: Tensor, *, seed: int, num_train_timesteps: int
) -> Tensor:
    """Return timesteps (b,), uniform from 0 to below num_train_timesteps, each a function of its visit."""
    drawn = [
        torch.randint(num_train_timesteps, (), generator=stream(seed, "timestep", visit, kind))
        for visit, kind in _kinds(visits, is_frozen_prior)
    ]
    return torch.stack(drawn)


def target_of(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the UNet should predict: the noise, or the velocity (Salimans and Ho 2022, eq. 12)."""
    if scheduler.config.prediction_type == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(latents, noise, timesteps)
        return velocity
    return noise


def min_snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Return the weights (b,) of Min-SNR (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    min(SNR, gamma) / SNR for noise prediction, min(SNR, gamma) / (SNR + 1) for velocity.
    """
    snr: Tensor = compute_snr(scheduler, timesteps)
    clipped = snr.clamp(max=gamma)
    if scheduler.config.prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return torch.where(snr > 0, clipped / snr.clamp(min=torch.finfo(snr.dtype).tiny), 1.0)


def losses_of(prediction: Tensor, target: Tensor, masks: Tensor | None) -> Tensor:
    """Return each row's mean squared error (b,) in float32, weighed by masks (b, 1, h, w) if there are any.

    Masked errors are divided by the mask's own mean, so that a small subject counts as much as a large one.
    """
    errors = (prediction.float() - target.float()).square()
    if masks is None:
        return errors.mean(dim=(1, 2, 3))
    weight = masks.mean(dim=(1, 2, 3)).clamp(min=1e-6)
    return (errors * masks).mean(dim=(1, 2, 3)) / weight


def _kinds(visits: Sequence[int], is_frozen_prior: Tensor) -> list[tuple[int, int]]:
    """Number the rows of each visit: 0 is the instance's and a frozen prior's, 1 a class image's."""
    seen: Counter[int] = Counter()
    kinds = []
    for visit, is_frozen in zip(visits, is_frozen_prior.tolist(), strict=True):
        kinds.append((visit, 0 if is_frozen else seen[visit]))
        seen[visit] += 1
    return kinds

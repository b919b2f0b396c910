"""The denoising objective: a batch is noised, the UNet is asked, and its answer compared with the target."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from ether_diffusion.bases import NoiseScheduler, PromptEmbeddings, UNet, take_rows, unet_inputs
from ether_diffusion.control import ControlEncoder, controlled
from ether_diffusion.training.batches import Batch
from ether_diffusion.training.methods import adapters_off
from ether_diffusion.training.randomness import stream

Encode = Callable[[Sequence[str]], PromptEmbeddings]


@dataclass(frozen=True)
class Denoising:
    """The objective of a run: its UNet, what embeds prompts, the forward process, the seed of its noise.

    text_encoders are those that carry adapters, too; control is what encodes control images.
    """

    unet: UNet
    encode: Encode
    scheduler: NoiseScheduler
    seed: int
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    text_encoders: Sequence[nn.Module] = ()
    control: ControlEncoder | None = None

    def losses(self, batch: Batch) -> Tensor:
        """Return the loss of each row (b,), unweighed."""
        scheduler, device = self.scheduler, self.unet.device
        noise = draw_noise(
            batch.latents.shape,
            batch.samples,
            batch.is_frozen_prior,
            seed=self.seed,
            offset=self.noise_offset,
        )
        timesteps = draw_timesteps(
            batch.samples,
            batch.is_frozen_prior,
            seed=self.seed,
            num_train_timesteps=scheduler.config.num_train_timesteps,
        )
        noisy = scheduler.add_noise(batch.latents, noise, timesteps)
        inputs = self._inputs(batch, noisy, timesteps)
        target = target_of(scheduler, batch.latents, noise, timesteps).to(device)
        if batch.is_frozen_prior.any():
            target = self._with_frozen_prior(target, batch, noisy, timesteps)
        with self._controlled(batch):
            prediction = self.unet(**inputs).sample
        masks = None if batch.masks is None else batch.masks.to(device)
        losses = losses_of(prediction, target, masks)
        if self.snr_gamma is not None:
            losses = losses * min_snr_weights(scheduler, timesteps, self.snr_gamma).to(device)
        return losses

    def _controlled(self, batch: Batch) -> AbstractContextManager[None]:
        """Return the context in which the UNet sees the batch's control images, if it has any."""
        if self.control is None or batch.controls is None:
            return nullcontext()
        assert batch.control_strengths is not None
        return controlled(self.unet, self.control, batch.controls, strength=batch.control_strengths)

    def _inputs(self, batch: Batch, noisy: Tensor, timesteps: Tensor) -> dict[str, Any]:
        embeddings = self.encode(batch.prompts)
        return unet_inputs(
            self.unet, noisy, timesteps, embeddings, size_ids=batch.size_ids, inpainting=batch.inpainting
        )

    @torch.no_grad()
    def _with_frozen_prior(self, target: Tensor, batch: Batch, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Replace the targets of frozen priors by what the base itself predicts."""
        is_frozen = batch.is_frozen_prior.to(target.device)
        with adapters_off((self.unet, *self.text_encoders)):
            inputs = self._inputs(batch, noisy, timesteps)
            prediction = self.unet(**take_rows(inputs, is_frozen)).sample
        target = target.clone()
        target[is_frozen] = prediction.to(target.dtype)
        return target


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


def target_of(scheduler: NoiseScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the UNet should predict: the noise, or the velocity (Salimans and Ho 2022, eq. 12)."""
    if scheduler.config.prediction_type == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(latents, noise, timesteps)
        return velocity
    return noise


def min_snr_weights(scheduler: NoiseScheduler, timesteps: Tensor, gamma: float) -> Tensor:
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

"""The denoising objective: a batch is noised, the UNet is asked, and its answer compared with the target."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ether_diffusion.bases import Base, Denoiser, Noise, PromptEmbeddings
from ether_diffusion.control import ControlEncoder, controlled
from ether_diffusion.training.batches import Batch
from ether_diffusion.training.config import OptimizationConfig
from ether_diffusion.training.methods import adapters_off
from ether_diffusion.training.randomness import stream

Encode = Callable[[Sequence[str]], PromptEmbeddings]


@dataclass(frozen=True)
class Denoising:
    """The objective of a run: its denoiser, the base that asks it, what embeds prompts, noise and its seed.

    text_encoders are those that carry adapters, too; control is what encodes control images.
    """

    unet: Denoiser
    base: Base | type[Base]
    encode: Encode
    noise: Noise
    config: OptimizationConfig
    seed: int
    text_encoders: Sequence[nn.Module] = ()
    control: ControlEncoder | None = None

    def losses(self, batch: Batch) -> Tensor:
        """Return the loss of each row (b,), unweighed."""
        device = self.unet.device
        rows, offset = (batch.samples, batch.is_frozen_prior), self.config.noise_offset
        noise = draw_noise(batch.latents.shape, *rows, seed=self.seed, offset=offset)
        timesteps = draw_timesteps(self.noise, *rows, seed=self.seed, shape=batch.latents.shape[1:])
        noisy = self.noise.add(batch.latents, noise, timesteps)
        embeddings = self.encode(batch.prompts)
        target = self.noise.target(batch.latents, noise, timesteps).to(device)
        if batch.is_frozen_prior.any():
            target = self._with_frozen_prior(target, batch, noisy, timesteps)
        with ExitStack() as stack:
            if self.control is not None and batch.controls is not None:
                strengths = batch.control_strengths
                assert strengths is not None
                stack.enter_context(controlled(self.unet, self.control, batch.controls, strength=strengths))
            prediction = self.base.predict(
                self.unet, noisy, timesteps, embeddings, size_ids=batch.size_ids, inpainting=batch.inpainting
            )
        masks = None if batch.masks is None else batch.masks.to(device)
        losses = losses_of(prediction, target, masks) * self.noise.weights(timesteps).to(device)
        if self.config.snr_gamma is not None:
            losses = losses * self.noise.min_snr_weights(timesteps, self.config.snr_gamma).to(device)
        return losses

    @torch.no_grad()
    def _with_frozen_prior(self, target: Tensor, batch: Batch, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Replace the targets of frozen priors by what the base itself predicts."""
        frozen = batch.is_frozen_prior
        with adapters_off((self.unet, *self.text_encoders)):
            prediction = self.base.predict(
                self.unet,
                noisy[frozen],
                timesteps[frozen],
                self.encode(batch.prompts).rows(frozen),
                size_ids=None if batch.size_ids is None else batch.size_ids[frozen],
                inpainting=None if batch.inpainting is None else batch.inpainting[frozen],
            )
        target = target.clone()
        target[frozen.to(target.device)] = prediction.to(target.dtype)
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
    noise: Noise, visits: Sequence[int], is_frozen_prior: Tensor, *, seed: int, shape: Sequence[int] = ()
) -> Tensor:
    """Return timesteps (b,) of the noise's distribution, each a function of its visit; see `Noise`."""
    drawn = [
        noise.draw_timestep(stream(seed, "timestep", visit, kind), shape)
        for visit, kind in _kinds(visits, is_frozen_prior)
    ]
    return torch.stack(drawn)


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

"""What a batch costs: it is noised, the UNet is asked, and its answer compared with the target."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ether_diffusion.bases import PromptEmbeddings
from ether_diffusion.control import ControlEncoder, controlled
from ether_diffusion.training.batches import Batch
from ether_diffusion.training.methods import adapters_off
from ether_diffusion.training.objective import (
    draw_noise,
    draw_timesteps,
    losses_of,
    min_snr_weights,
    target_of,
)

Encode = Callable[[Sequence[str]], PromptEmbeddings]


@dataclass(frozen=True)
class Denoising:
    """The objective of a run: its UNet, what embeds prompts, the forward process, the seed of its noise.

    text_encoders are those that carry adapters, too; control is what encodes control images.
    """

    unet: UNet2DConditionModel
    encode: Encode
    scheduler: DDPMScheduler
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
        """Return the UNet's arguments, in its dtype and on its device."""
        device, dtype = self.unet.device, self.unet.dtype
        embeddings = self.encode(batch.prompts).to(device, dtype)
        if batch.inpainting is not None:
            noisy = torch.cat((noisy, batch.inpainting), dim=1)
        inputs: dict[str, Any] = {
            "sample": noisy.to(device, dtype),
            "timestep": timesteps.to(device),
            "encoder_hidden_states": embeddings.sequence,
        }
        if batch.size_ids is not None:
            conditions = {"text_embeds": embeddings.pooled, "time_ids": batch.size_ids.to(device, dtype)}
            inputs["added_cond_kwargs"] = conditions
        return inputs

    @torch.no_grad()
    def _with_frozen_prior(self, target: Tensor, batch: Batch, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Replace the targets of frozen priors by what the base itself predicts."""
        is_frozen = batch.is_frozen_prior.to(target.device)
        with adapters_off((self.unet, *self.text_encoders)):
            inputs = self._inputs(batch, noisy, timesteps)
            prediction = self.unet(**_rows(inputs, is_frozen)).sample
        target = target.clone()
        target[is_frozen] = prediction.to(target.dtype)
        return target


def _rows(inputs: Mapping[str, Any], chosen: Tensor) -> dict[str, Any]:
    """Take rows (b,) of every tensor among a UNet's arguments."""
    return {
        name: _rows(value, chosen) if isinstance(value, Mapping) else value[chosen]
        for name, value in inputs.items()
    }

"""The denoising objective: a batch is noised, the UNet is asked, and its answer compared with the target."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

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
class Question:
    """What a denoiser is asked: noisy latents (b, c, h, w) at timesteps (b,), and what it is told beside."""

    noisy: Tensor
    timesteps: Tensor
    embeddings: PromptEmbeddings
    size_ids: Tensor | None
    inpainting: Tensor | None
    controls: tuple[Tensor, Tensor] | None = None
    """Control images (b, 3, H, W), and how strongly each is followed (b,)."""

    @property
    def beside(self) -> dict[str, Any]:
        """What `Base.predict` takes by name."""
        return {"size_ids": self.size_ids, "inpainting": self.inpainting}

    def rows(self, chosen: Tensor) -> "Question":
        """Return that of the rows chosen (b,), without control images."""
        size_ids, inpainting = (None if each is None else each[chosen] for each in self.beside.values())
        embeddings = self.embeddings.rows(chosen)
        return Question(self.noisy[chosen], self.timesteps[chosen], embeddings, size_ids, inpainting)


class Predict(Protocol):
    """What answers the questions of several batches, with the adapters in training or `of_base` alone."""

    def __call__(self, questions: Sequence[Question], *, of_base: bool = False) -> Sequence[Tensor]: ...


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
        return losses_of_batches([(self, batch)], self.predict)[0]

    def predict(self, questions: Sequence[Question], *, of_base: bool = False) -> list[Tensor]:
        """Ask the denoiser."""
        return [self._predict(question, of_base=of_base) for question in questions]

    def _predict(self, asked: Question, *, of_base: bool) -> Tensor:
        with ExitStack() as stack:
            if of_base:
                stack.enter_context(adapters_off((self.unet,)))
            if self.control is not None and asked.controls is not None:
                images, strength = asked.controls
                stack.enter_context(controlled(self.unet, self.control, images, strength=strength))
            return self.base.predict(
                self.unet, asked.noisy, asked.timesteps, asked.embeddings, **asked.beside
            )

    def ask(self, batch: Batch) -> tuple[Question, Tensor]:
        """Add noise to a batch; return what the denoiser is asked, and what it should answer (b, c, h, w)."""
        rows, offset = (batch.samples, batch.is_frozen_prior), self.config.noise_offset
        noise = draw_noise(batch.latents.shape, *rows, seed=self.seed, offset=offset)
        timesteps = draw_timesteps(self.noise, *rows, seed=self.seed, shape=batch.latents.shape[1:])
        noisy = self.noise.add(batch.latents, noise, timesteps)
        embeddings, controls = self.encode(batch.prompts), None
        if batch.controls is not None:
            assert batch.control_strengths is not None
            controls = (batch.controls, batch.control_strengths)
        target = self.noise.target(batch.latents, noise, timesteps).to(self.unet.device)
        question = Question(noisy, timesteps, embeddings, batch.size_ids, batch.inpainting, controls)
        return question, target

    def ask_prior(self, batch: Batch, asked: Question) -> Question:
        """Return what the base itself is asked of the batch's frozen priors."""
        with adapters_off(self.text_encoders):
            return replace(asked, embeddings=self.encode(batch.prompts)).rows(batch.is_frozen_prior)

    def compare(self, batch: Batch, asked: Question, target: Tensor, prediction: Tensor) -> Tensor:
        """Return the loss of each row (b,)."""
        device, timesteps = target.device, asked.timesteps
        masks = None if batch.masks is None else batch.masks.to(device)
        losses = losses_of(prediction, target, masks) * self.noise.weights(timesteps).to(device)
        if self.config.snr_gamma is not None:
            losses = losses * self.noise.min_snr_weights(timesteps, self.config.snr_gamma).to(device)
        return losses


def losses_of_batches(work: Sequence[tuple[Denoising, Batch]], predict: Predict) -> list[Tensor]:
    """Return the losses (b,) of each batch by its own objective, with what `predict` answers them all."""
    asked = [denoising.ask(batch) for denoising, batch in work]
    targets, questions = [target for _, target in asked], [question for question, _ in asked]
    if frozen := [index for index, (_, batch) in enumerate(work) if batch.is_frozen_prior.any()]:
        with torch.no_grad():
            priors = [work[index][0].ask_prior(work[index][1], questions[index]) for index in frozen]
            for index, prediction in zip(frozen, predict(priors, of_base=True), strict=True):
                target = targets[index] = targets[index].clone()
                target[work[index][1].is_frozen_prior.to(target.device)] = prediction.to(target.dtype)
    found = zip(work, questions, targets, predict(questions), strict=True)
    return [
        denoising.compare(batch, question, target, prediction)
        for (denoising, batch), question, target, prediction in found
    ]


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

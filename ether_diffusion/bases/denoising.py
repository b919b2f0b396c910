"""Pictures on their way from noise: each by its own schedule, and through the denoiser together."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.bases.base import Base, Denoiser, PromptEmbeddings, stack_embeddings


class Denoising:
    """One picture's latents (1, c, h, w), from its first noise on.

    Attributes:
        rows: what its rows in a batch are embedded as; where it is guided, without its prompt, then with it.
        step: how many of `num_steps` are done.
    """

    def __init__(
        self,
        base: Base,
        denoiser: Denoiser,
        scheduler: Any,
        embeddings: tuple[PromptEmbeddings, PromptEmbeddings | None],
        *,
        size: tuple[int, int],
        num_steps: int,
        guidance_scale: float,
        seed: int,
    ) -> None:
        """Draw the first noise of a picture of a size (height, width) in px; the scheduler is its alone.

        embeddings are those of the prompt, and of what it should not show where the base `is_guided`.
        """
        given, without = embeddings
        self.base, self.scheduler, self.guidance_scale, self.size = base, scheduler, guidance_scale, size
        self.rows = [given] if without is None else [without, given]
        self.step, self.generator = 0, torch.Generator().manual_seed(seed)
        noise = base.draw_noise(denoiser, size, self.generator).to(denoiser.device)
        base.set_timesteps(scheduler, num_steps, noise)
        self.latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        takes_generator = "generator" in signature(scheduler.step).parameters
        self._drawn = {"generator": self.generator} if takes_generator else {}

    @property
    def num_steps(self) -> int:
        """How many times the denoiser is called; of some schedulers more than were asked for."""
        return len(self.scheduler.timesteps)

    def noisy(self) -> Tensor:
        """Return what the denoiser is to see of the latents at this step."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        seen: Tensor = self.latents if scale is None else scale(self.latents, self.timestep)
        return seen

    @property
    def timestep(self) -> Tensor:
        """The timestep () of this step."""
        timestep: Tensor = self.scheduler.timesteps[self.step]
        return timestep

    def advance(self, predicted: Tensor) -> None:
        """Take a step along what was predicted of the rows (1 or 2, c, h, w)."""
        predicted = predicted.to(self.latents.dtype)
        found = (
            predicted
            if len(self.rows) == 1
            else self.base.guided(predicted[1:], predicted[:1], self.guidance_scale)
        )
        self.latents = self.scheduler.step(found, self.timestep, self.latents, **self._drawn).prev_sample
        self.step += 1

    def aimed(self) -> Tensor:
        """Return what the last step aimed at, where the scheduler remembers it, else the latents."""
        if self.scheduler.config.get("algorithm_type") == "dpmsolver++":
            aimed = getattr(self.scheduler, "model_outputs", [None])[-1]
            if isinstance(aimed, Tensor) and aimed.shape == self.latents.shape:
                return aimed
        return self.latents


def predict_together(
    base: Base,
    denoiser: Denoiser,
    several: Sequence[Denoising],
    before: Callable[[Sequence[int]], None] = lambda rows: None,
) -> list[Tensor]:
    """Return what a denoiser predicts of the rows of several pictures of one size, for each at its timestep.

    Rows whose prompts have as many tokens go together: padding would change how others' are rounded. `before`
    hears which of all the rows are next.
    """
    pictures = [picture for picture in several for _ in picture.rows]
    texts = [row for picture in several for row in picture.rows]
    by_length: dict[int, list[int]] = {}
    for index, text in enumerate(texts):
        by_length.setdefault(text.sequence.shape[1], []).append(index)
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    for rows in by_length.values():
        before(rows)
        here = [pictures[row] for row in rows]
        size_ids = torch.tensor([[*each.size, 0, 0, *each.size] for each in here])
        predicted = base.predict(
            denoiser,
            torch.cat([each.noisy() for each in here]),
            torch.stack([each.timestep.float() for each in here]),
            stack_embeddings([texts[row] for row in rows]),
            size_ids=size_ids if base.has_size_ids else None,
            guidance=torch.tensor([each.guidance_scale for each in here]),
        )
        for row, one in zip(rows, torch.split(predicted, 1), strict=True):
            found[row] = one
    ends = torch.tensor([len(picture.rows) for picture in several]).cumsum(0).tolist()
    return [torch.cat(found[end - len(each.rows) : end]) for each, end in zip(several, ends, strict=True)]


@torch.no_grad()
def denoise(denoising: Denoising, denoiser: Denoiser, check: Callable[[], None]) -> Tensor:
    """Return the latents of one picture by itself; `check` may raise before each step."""
    while denoising.step < denoising.num_steps:
        check()
        (predicted,) = predict_together(denoising.base, denoiser, [denoising])
        denoising.advance(predicted)
    return denoising.latents

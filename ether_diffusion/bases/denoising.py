"""Pictures on their way from noise: each by its own schedule, and through the denoiser together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ether_diffusion.bases.base import Autoencoder, Base, Denoiser, PromptEmbeddings, stack_embeddings


@dataclass(frozen=True)
class Beginning:
    """A picture (mode RGB) at the size of the one that is made from it, and what encodes it.

    Of `num_steps` those of the share `strength`, above 0 to 1, are taken. mask (mode L) is 128 and more where
    it is drawn anew; None is everywhere.
    """

    vae: Autoencoder
    image: Image.Image
    strength: float
    mask: Image.Image | None = None

    @property
    def pixels(self) -> Tensor:
        """The picture (1, 3, height, width) in [-1, 1]."""
        values = np.asarray(self.image, dtype=np.float32) / 255
        return torch.from_numpy(2 * values - 1).permute(2, 0, 1)[None]

    @property
    def hole(self) -> Tensor | None:
        """The mask (1, 1, height, width): 1 where it is drawn anew, else 0."""
        if self.mask is None:
            return None
        return torch.from_numpy((np.asarray(self.mask) >= 128).astype(np.float32))[None, None]

    def put_around(self, picture: Image.Image) -> Image.Image:
        """Return a picture that was drawn, with what the mask leaves as it was, pixel by pixel."""
        if self.mask is None:
            return picture
        around: Image.Image = VaeImageProcessor().apply_overlay(self.mask, self.image, picture)
        return around


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
        beginning: Beginning | None = None,
    ) -> None:
        """Draw the first noise of a picture of a size (height, width) in px; the scheduler is its alone.

        embeddings are those of the prompt, and of what it should not show where the base `is_guided`. What
        begins as another picture is as in diffusers' pipelines for that, on the same generator.
        """
        given, without = embeddings
        self.base, self.scheduler, self.guidance_scale, self.size = base, scheduler, guidance_scale, size
        self.rows = [given] if without is None else [without, given]
        self.step, self.generator = 0, torch.Generator().manual_seed(seed)
        self._hole: Tensor | None = None
        self.inpainting: Tensor | None = None
        whole = beginning is not None and not (base.is_inpainting and beginning.strength == 1)
        encoded = self._encoded(beginning, beginning.pixels) if beginning is not None and whole else None
        noise = base.draw_noise(denoiser, size, self.generator).to(denoiser.device)
        base.set_timesteps(scheduler, num_steps, noise)
        self.timesteps: Tensor = scheduler.timesteps
        self.latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        if beginning is not None:
            self._begin(beginning, num_steps, noise, None if encoded is None else encoded.to(noise))
        takes_generator = "generator" in signature(scheduler.step).parameters
        self._drawn = {"generator": self.generator} if takes_generator else {}

    def _begin(self, beginning: Beginning, num_steps: int, noise: Tensor, encoded: Tensor | None) -> None:
        """Leave out the first steps, and begin with the picture under the noise of the next."""
        scheduler, hole = self.scheduler, beginning.hole
        first = self.base.first_step(num_steps, beginning.strength) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        self.timesteps = scheduler.timesteps[first:]
        self._kept = encoded, noise
        if encoded is not None and (hole is None or beginning.strength < 1):
            self.latents = self._noised(self.timesteps[:1])
        if hole is None:
            return
        seen = interpolate(hole, size=noise.shape[-2:]).to(noise)
        if self.base.is_inpainting:  # whose UNet sees the hole and what is around it
            around = self._encoded(beginning, beginning.pixels * (1 - hole)).to(noise)
            self.inpainting = torch.cat((seen, around), dim=1)
        else:
            self._hole = seen

    def _encoded(self, beginning: Beginning, pixels: Tensor) -> Tensor:
        """Draw latents of what the autoencoder makes of pixels, where it leaves a choice."""
        mean, std = self.base.encode_images(beginning.vae, pixels)
        if bool(std.any()):
            drawn = torch.randn(mean.shape, generator=self.generator, dtype=beginning.vae.dtype)
            mean = mean + std * drawn
        return self.base.scale_latents(beginning.vae, mean)

    def _noised(self, timestep: Tensor) -> Tensor:
        """Return what the picture began as with the noise of a timestep (1,)."""
        encoded, noise = self._kept
        assert encoded is not None
        if hasattr(self.scheduler, "scale_noise"):  # of flow matching
            noised: Tensor = self.scheduler.scale_noise(encoded, timestep, noise)
        else:
            noised = self.scheduler.add_noise(encoded, noise, timestep)
        return noised

    @property
    def num_steps(self) -> int:
        """How many times the denoiser is called; of some schedulers more than were asked for."""
        return len(self.timesteps)

    def noisy(self) -> Tensor:
        """Return what the denoiser is to see of the latents at this step."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        seen: Tensor = self.latents if scale is None else scale(self.latents, self.timestep)
        return seen

    @property
    def timestep(self) -> Tensor:
        """The timestep () of this step."""
        return self.timesteps[self.step]

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
        if self._hole is not None:  # what is kept, at the noise that is left
            is_last, (encoded, _) = self.step == self.num_steps, self._kept
            assert encoded is not None
            kept = encoded if is_last else self._noised(self.timesteps[self.step : self.step + 1])
            self.latents = (1 - self._hole) * kept + self._hole * self.latents

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
    kinds: Sequence[object] | None = None,
) -> list[Tensor]:
    """Return what a denoiser predicts of the rows of several pictures of one size, for each at its timestep.

    Rows whose prompts have as many tokens go together: padding would change how others' are rounded. `before`
    hears which of all the rows are next; rows of different `kinds` go one after the other.
    """
    pictures = [picture for picture in several for _ in picture.rows]
    texts = [row for picture in several for row in picture.rows]
    alike: dict[tuple[int, object], list[int]] = {}
    for index, (text, kind) in enumerate(zip(texts, kinds or [None] * len(texts), strict=True)):
        alike.setdefault((text.sequence.shape[1], kind), []).append(index)
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    for rows in alike.values():
        before(rows)
        here = [pictures[row] for row in rows]
        around = [each.inpainting for each in here if each.inpainting is not None]
        size_ids = torch.tensor([[*each.size, 0, 0, *each.size] for each in here])
        predicted = base.predict(
            denoiser,
            torch.cat([each.noisy() for each in here]),
            torch.stack([each.timestep.float() for each in here]),
            stack_embeddings([texts[row] for row in rows]),
            size_ids=size_ids if base.has_size_ids else None,
            inpainting=None if not around else torch.cat(around),
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

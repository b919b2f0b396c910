"""From samples to batches: crops are cut or remembered, encoded by the VAE one by one, drawn and stacked."""

import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ether_diffusion.training.interrupts import release_signals, signals_held
from ether_diffusion.training.randomness import stream
from ether_diffusion.training.sample_plan import Crop, CropPixels, Sample, SamplePixels, SamplePlan
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: a row for each sample, then with prior preservation a row of the class for each.

    latents (b, c, h, w) are float32, sampled from the VAE's posterior and scaled; prompts are those after
    caption dropout. weights (b,) are those of the rows in the loss, 1 or prior_loss_weight; masks (b, 1, h,
    w) in [0, 1] those of the latents' pixels, None where all are 1. Where is_frozen_prior (b,) is true, the
    target is the base's own prediction. size_ids (b, 6) are SDXL's: original height and width, crop top and
    left, target height and width, all in px. inpainting (b, 1 + c, h, w), for UNets that see it, is the
    mask (1 where something is to be painted) and the scaled latents of the masked image. samples are their
    numbers, a class row's that of its sample; names are the photos' files. controls (b, 3, H, W) in
    [0, 1] are control images at the size of the photos, and control_strengths (b,) 1 for rows that follow
    them and 0 for the others: those dropped, and all rows of a prior.
    """

    latents: Tensor
    prompts: tuple[str, ...]
    weights: Tensor
    masks: Tensor | None
    is_frozen_prior: Tensor
    size_ids: Tensor | None
    inpainting: Tensor | None
    samples: tuple[int, ...]
    names: tuple[str, ...]
    controls: Tensor | None = None
    control_strengths: Tensor | None = None


@dataclass(frozen=True)
class Codec:
    """A base's VAE: `encode` turns images (b, 3, H, W) in [-1, 1] into the posterior's mean and standard
    deviation, each (b, c, h, w), unscaled float32 on the CPU; `scale` turns latents into what the UNet
    sees.
    """

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    scale: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Posterior:
    """What the VAE knows of an image: mean and standard deviation (c, h, w) of its unscaled latents."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw latents (c, h, w)."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)


@dataclass(frozen=True)
class EncodedCrop:
    """A crop without its pixels; `mask` and `inpainting_mask` (1, h, w) are of the latents' size.

    `masked` is the image with gray where it is to be painted, None where nothing is. `control` (3, H, W) is
    the crop's in 8 bits, a quarter of the memory.
    """

    name: str
    posterior: Posterior
    mask: Tensor | None
    inpainting_mask: Tensor | None
    masked: Posterior | None
    size_ids: tuple[int, int, int, int, int, int]
    control: Tensor | None


def encode_crop(crop: CropPixels, codec: Codec) -> EncodedCrop:
    """Encode a crop by itself, so that it does not depend on its neighbours.

    Raises:
        ValueError: the VAE gives values that are not finite; the message names the photo.
    """
    posterior = _encode(crop.pixels, crop.name, codec)
    height, width = posterior.mean.shape[-2:]
    mask, hidden, masked = crop.mask, crop.inpainting_mask, None
    if mask is not None:  # the mean of each latent pixel's area
        mask = mask.reshape(1, height, mask.shape[-2] // height, width, mask.shape[-1] // width).mean((2, 4))
    if hidden is not None:
        masked = _encode(crop.pixels * (hidden < 0.5), crop.name, codec)
        # nearest values, as in diffusers' pipelines
        hidden = torch.nn.functional.interpolate(hidden[None], size=(height, width))[0]
    control = None if crop.control is None else (crop.control * 255).round().to(torch.uint8)
    return EncodedCrop(crop.name, posterior, mask, hidden, masked, crop.size_ids, control)


def _encode(pixels: Tensor, name: str, codec: Codec) -> Posterior:
    with torch.no_grad():
        mean, std = codec.encode(pixels[None])
    assert mean.dtype == std.dtype == torch.float32
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise ValueError(
            f"the VAE turns {printable(name)} into latents that are not finite, as SDXL's does in float16; "
            "load it in float32, or give one mended for float16 as pretrained_vae_model_name_or_path"
        )
    return Posterior(mean[0].clone(), std[0].clone())


class BatchSource:
    """Batches of a run. With cached latents, every crop that the samples ask for is encoded here, once.

    Raises:
        ValueError: a photo is gone or was changed since it was checked, or its latents are not finite.
    """

    def __init__(
        self,
        plan: SamplePlan,
        codec: Codec,
        *,
        num_samples: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.plan, self.codec = plan, codec
        self._warned: set[str] = set()
        self._cache: dict[Crop, EncodedCrop] | None = None
        if plan.data.cache_latents:
            self._cache = self._encode_crops(plan.crops(range(num_samples)), on_progress)

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return self.plan.num_samples

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt that can occur."""
        return self.plan.prompts

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of every photo, prompt, mask and class image by its name."""
        return self.plan.fingerprint()

    def batch(self, samples: Sequence[int]) -> Batch:
        """Return the batch of some samples, which must be of one size.

        Raises:
            ValueError: a photo that is not cached is gone or was changed.
        """
        if self._cache is None:
            return self._finish([self.plan[number] for number in samples])
        planned = [self.plan.sample(number) for number in samples]
        return self._stack(planned, [[self._cache[crop] for crop in sample.crops] for sample in planned])

    def batches(self, schedule: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Return the batches of lists of samples, in their order; workers load what is not cached.

        Raises:
            ValueError: a photo that is not cached is gone or was changed.
        """
        num_workers = self.plan.data.dataloader_num_workers
        if self._cache is not None or num_workers == 0:
            return (self.batch(samples) for samples in schedule)
        loader: DataLoader[SamplePixels | str] = DataLoader(
            self.plan,
            batch_sampler=schedule,  # type: ignore[arg-type]  # any iterable of lists will do
            num_workers=num_workers,
            collate_fn=list,
            worker_init_fn=_leave_interrupts_to_main,
            generator=torch.Generator(),  # else the global one is drawn from
        )
        with signals_held():  # a worker that is still starting could not outlive one
            found = iter(loader)
        return (self._finish(samples) for samples in found)

    def _encode_crops(
        self, crops: Sequence[Crop], on_progress: Callable[[int, int], None] | None
    ) -> dict[Crop, EncodedCrop]:
        cache: dict[Crop, EncodedCrop] = {}
        for _, group in groupby(crops, key=lambda crop: (crop.is_class, crop.photo, crop.size)):
            for pixels in self.plan.cut(list(group)):
                cache[pixels.crop] = self._encode(pixels)
                if on_progress is not None:
                    on_progress(len(cache), len(crops))
        return cache

    def _encode(self, crop: CropPixels) -> EncodedCrop:
        if crop.is_moved and self.plan.data.center_crop and crop.name not in self._warned:
            self._warned.add(crop.name)
            logger.warning(
                "the middle of %s shows nothing of its mask; it is cropped around the mask instead",
                printable(crop.name),
            )
        return encode_crop(crop, self.codec)

    def _finish(self, found: Sequence[SamplePixels | str]) -> Batch:
        loaded: list[SamplePixels] = []
        for each in found:
            if isinstance(each, str):
                raise ValueError(each)
            loaded.append(each)
        crops = [[self._encode(crop) for crop in each.crops] for each in loaded]
        return self._stack([each.sample for each in loaded], crops)

    def _stack(self, samples: Sequence[Sample], crops: Sequence[Sequence[EncodedCrop]]) -> Batch:
        plan, prior = self.plan, self.plan.prior
        rows = [_instance_row(sample, found[0], plan) for sample, found in zip(samples, crops, strict=True)]
        prompt, weight = prior.class_prompt or "", prior.prior_loss_weight
        if prior.prior_preservation == "frozen":
            rows += [
                replace(
                    row, prompt=prompt, mask=None, weight=weight, is_frozen_prior=True, follows_control=False
                )
                for row in rows
            ]
        elif prior.prior_preservation == "class_images":
            rows += [
                _Row(found[1], *_draw(found[1], plan.seed, "class ", sample), sample, prompt, None, weight)
                for sample, found in zip((each.number for each in samples), crops, strict=True)
            ]
        return _stack_rows(rows, self.codec.scale, plan)


@dataclass(frozen=True)
class _Row:
    """One row, its latents (c, h, w) and masked latents not yet scaled; `mask` (1, h, w) weighs the loss."""

    crop: EncodedCrop
    latents: Tensor
    masked_latents: Tensor | None
    sample: int
    prompt: str
    mask: Tensor | None
    weight: float = 1.0
    is_frozen_prior: bool = False
    follows_control: bool = False


def _draw(crop: EncodedCrop, seed: int, kind: str, sample: int) -> tuple[Tensor, Tensor | None]:
    latents = crop.posterior.sample(stream(seed, f"{kind}posterior", sample))
    if crop.masked is None:
        return latents, None
    return latents, crop.masked.sample(stream(seed, f"{kind}masked posterior", sample))


def _instance_row(sample: Sample, crop: EncodedCrop, plan: SamplePlan) -> _Row:
    number, outside = sample.number, plan.data.unmasked_weight
    chance = torch.rand((), generator=stream(plan.seed, "control dropout", number)).item()
    mask = None if crop.mask is None else outside + (1 - outside) * crop.mask
    drawn = _draw(crop, plan.seed, "", number)
    return _Row(crop, *drawn, number, sample.prompt, mask, follows_control=not chance < plan.control_dropout)


def _stack_rows(rows: Sequence[_Row], scale: Callable[[Tensor], Tensor], plan: SamplePlan) -> Batch:
    """Return the batch of rows of one size."""
    masks = [torch.ones_like(row.latents[:1]) if row.mask is None else row.mask for row in rows]
    hidden = [row.crop.inpainting_mask for row in rows if row.crop.inpainting_mask is not None]
    masked = [row.masked_latents for row in rows if row.masked_latents is not None]
    controls = [row.crop.control for row in rows]
    given = next((control for control in controls if control is not None), None)
    images = strengths = None
    if given is not None:
        filled = [torch.zeros_like(given) if control is None else control for control in controls]
        images = torch.stack(filled).float() / 255
        follows = [row.follows_control and row.crop.control is not None for row in rows]
        strengths = torch.tensor(follows).float()
    return Batch(
        latents=scale(torch.stack([row.latents for row in rows])),
        prompts=tuple(row.prompt for row in rows),
        weights=torch.tensor([row.weight for row in rows], dtype=torch.float32),
        masks=torch.stack(masks) if plan.has_masks else None,
        is_frozen_prior=torch.tensor([row.is_frozen_prior for row in rows]),
        size_ids=torch.tensor([row.crop.size_ids for row in rows]) if plan.needs.has_size_ids else None,
        inpainting=torch.cat((torch.stack(hidden), scale(torch.stack(masked))), dim=1) if hidden else None,
        samples=tuple(row.sample for row in rows),
        names=tuple(row.crop.name for row in rows),
        controls=images,
        control_strengths=strengths,
    )


def _leave_interrupts_to_main(worker: int) -> None:
    """Let a worker outlive Ctrl-C, which it gets too: the step in progress needs its samples.

    SIGTERM ends it as ever, whatever handler it was forked with: that is how it is stopped at last.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    release_signals()

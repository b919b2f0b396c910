"""From samples to batches: crops are cut or remembered, encoded by the VAE one by one, drawn and stacked."""

import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ether_diffusion.training.processes import release_signals, signals_held
from ether_diffusion.training.randomness import stream
from ether_diffusion.training.sample_plan import Crop, CropImage, Sample, SampleImages, SamplePlan
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


def encode_crop(crop: CropImage, codec: Codec) -> CropImage:
    """Encode a crop by itself, so that it does not depend on its neighbours.

    Raises:
        ValueError: the VAE gives values that are not finite; the message names the photo.
    """
    image, mask, hole, masked = _encode(crop.image, crop.name, codec), crop.mask, crop.hole, None
    height, width = image.shape[-2:]
    if mask is not None:  # the mean of each latent pixel's area
        mask = mask.reshape(1, height, mask.shape[-2] // height, width, mask.shape[-1] // width).mean((2, 4))
    if hole is not None:
        masked = _encode(crop.image * (hole < 0.5), crop.name, codec)
        # nearest values, as in diffusers' pipelines
        hole = torch.nn.functional.interpolate(hole[None], size=(height, width))[0]
    return replace(crop, image=image, mask=mask, hole=hole, masked=masked)


def _encode(pixels: Tensor, name: str, codec: Codec) -> Tensor:
    with torch.no_grad():
        mean, std = codec.encode(pixels[None])
    assert mean.dtype == std.dtype == torch.float32
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise ValueError(
            f"the VAE turns {printable(name)} into latents that are not finite, as SDXL's does in float16; "
            "load it in float32, or give one mended for float16 as pretrained_vae_model_name_or_path"
        )
    return torch.cat((mean, std))


def _drawn(posterior: Tensor, generator: torch.Generator) -> Tensor:
    """Draw latents (1, c, h, w) from a mean and a standard deviation."""
    mean, std = posterior[:1], posterior[1:]
    return mean + std * torch.randn(mean.shape, generator=generator)


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
        self._cache: dict[Crop, CropImage] | None = None
        if plan.data.cache_latents:
            self._cache = self._encode_crops(plan.crops(range(num_samples)), on_progress)

    def batch(self, samples: Sequence[int]) -> Batch:
        """Return the batch of some samples, which must be of one size.

        Raises:
            ValueError: a photo that is not cached is gone or was changed.
        """
        if self._cache is None:
            return self._finish([self.plan[number] for number in samples])
        planned = [self.plan.sample(number) for number in samples]
        return self._stack([(each, [self._cache[crop] for crop in each.crops]) for each in planned])

    def batches(self, schedule: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Return the batches of lists of samples, in their order; workers load what is not cached.

        Raises:
            ValueError: a photo that is not cached is gone or was changed.
        """
        num_workers = self.plan.data.dataloader_num_workers
        if self._cache is not None or num_workers == 0:
            return (self.batch(samples) for samples in schedule)
        loader: DataLoader[SampleImages | str] = DataLoader(
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
    ) -> dict[Crop, CropImage]:
        cache: dict[Crop, CropImage] = {}
        for _, group in groupby(crops, key=lambda crop: crop.group):
            for pixels in self.plan.cut(list(group)):
                cache[pixels.crop] = self._encode(pixels)
                if on_progress is not None:
                    on_progress(len(cache), len(crops))
        for each in (*self.plan.photos, *self.plan.class_photos):
            each.kept.clear()  # it is not needed again
        return cache

    def _encode(self, crop: CropImage) -> CropImage:
        if crop.is_moved and self.plan.data.center_crop and crop.name not in self._warned:
            self._warned.add(crop.name)
            logger.warning(
                "the middle of %s shows nothing of its mask; it is cropped around the mask instead",
                printable(crop.name),
            )
        return encode_crop(crop, self.codec)

    def _finish(self, found: Sequence[SampleImages | str]) -> Batch:
        for each in found:
            if isinstance(each, str):
                raise ValueError(each)
        loaded = [each for each in found if not isinstance(each, str)]
        return self._stack([(sample, [self._encode(crop) for crop in crops]) for sample, crops in loaded])

    def _stack(self, samples: Sequence[tuple[Sample, Sequence[CropImage]]]) -> Batch:
        prior, no_prior = self.plan.prior, torch.zeros(1)
        rows = [self._row(sample, crops[0], "") for sample, crops in samples]
        class_rows: list[Batch] = []
        if prior.prior_preservation == "frozen":
            class_rows = [replace(row, is_frozen_prior=torch.tensor([True])) for row in rows]
        elif prior.prior_preservation == "class_images":
            class_rows = [self._row(sample, crops[1], "class ") for sample, crops in samples]
        weight = torch.tensor([prior.prior_loss_weight], dtype=torch.float32)
        for row in class_rows:
            masks = None if row.masks is None else torch.ones_like(row.masks)
            prompts = (prior.class_prompt or "",)
            rows.append(
                replace(row, prompts=prompts, weights=weight, masks=masks, control_strengths=no_prior)
            )
        return _joined(rows, has_controls=any(crops[0].control is not None for _, crops in samples))

    def _row(self, sample: Sample, crop: CropImage, kind: str) -> Batch:
        """Return a sample as a batch of one: the crop's latents are drawn here."""
        plan, number, scale = self.plan, sample.number, self.codec.scale
        latents = _drawn(crop.image, stream(plan.seed, f"{kind}posterior", number))
        inpainting = None
        if crop.hole is not None and crop.masked is not None:
            masked = _drawn(crop.masked, stream(plan.seed, f"{kind}masked posterior", number))
            inpainting = torch.cat((crop.hole[None], scale(masked)), dim=1)
        outside = plan.data.unmasked_weight
        mask = torch.ones_like(latents[:, :1])
        if crop.mask is not None:
            mask = outside + (1 - outside) * crop.mask[None]
        chance = torch.rand((), generator=stream(plan.seed, "control dropout", number)).item()
        return Batch(
            latents=scale(latents),
            prompts=(sample.prompt,),
            weights=torch.ones(1),
            masks=mask if plan.data.has_masks else None,
            is_frozen_prior=torch.tensor([False]),
            size_ids=torch.tensor([crop.size_ids]) if plan.needs.has_size_ids else None,
            inpainting=inpainting,
            samples=(number,),
            names=(crop.name,),
            controls=None if crop.control is None else crop.control[None].float() / 255,
            control_strengths=torch.tensor([float(chance >= plan.control_dropout)]),
        )


def _joined(rows: Sequence[Batch], *, has_controls: bool) -> Batch:
    """Return the batch of batches of one; rows without a control image get a black one."""
    values: dict[str, Any] = {}
    for name in (each.name for each in fields(Batch)):
        parts = [getattr(row, name) for row in rows]
        given = next((part for part in parts if part is not None), None)
        if isinstance(given, Tensor):
            values[name] = torch.cat([torch.zeros_like(given) if part is None else part for part in parts])
        else:
            values[name] = None if given is None else tuple(value for part in parts for value in part)
    return Batch(**values) if has_controls else replace(Batch(**values), control_strengths=None)


def _leave_interrupts_to_main(worker: int) -> None:
    """Let a worker outlive Ctrl-C, which it gets too: the step in progress needs its samples.

    SIGTERM ends it as ever, whatever handler it was forked with: that is how it is stopped at last.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    release_signals()

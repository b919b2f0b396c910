"""From photos to batches: what a sample shows is a function of the seed and its number, whoever makes it."""

import logging
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ether_diffusion.bases import Base
from ether_diffusion.control.images import resampling_of
from ether_diffusion.training.config import ControlConfig, DataConfig, PriorConfig
from ether_diffusion.training.dataset import detector_of
from ether_diffusion.training.photos import PhotoFolder, Scaling, Size, check_sizes, covering_size
from ether_diffusion.training.processes import release_signals, signals_held
from ether_diffusion.training.randomness import draw_inpainting_mask, draw_int, happens, shuffled, stream
from ether_diffusion.wording import listed, printable

logger = logging.getLogger(__name__)

_LATER = torch.empty(0)  # what a crop gets last: a worker would open a file for it to send it


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

    A crop is such a row before its latents are drawn. As cut, pixels (1, 3, H, W) in [-1, 1] stand for them,
    and encoded the mean and the standard deviation (2, c, h, w); its controls are in 8 bits.
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


class Crop(NamedTuple):
    """Which part of which photo: of what size, which of its random ones, and whether mirrored."""

    is_class: bool
    photo: int
    size: Size
    number: int
    is_flipped: bool


def order_photos(
    buckets: Sequence[Size], repeats: Sequence[int], effective_batch: int, seed: int, epoch: int
) -> list[int]:
    """Return the photos of an epoch, each of a bucket and with repeats of its own, in the samples' order.

    Where all are of one bucket, that is a permutation of them, each so many times. Else the `effective_batch`
    samples of one step come from one bucket: each bucket's permutation is cut into chunks of that many, a
    short last chunk is filled up by going round in the bucket, and the chunks are shuffled.
    """
    photos = [photo for turn in range(max(repeats)) for photo, n in enumerate(repeats) if turn < n]
    order, chunks = stream(seed, "order", epoch), list[list[int]]()
    if len(set(buckets)) == 1:
        return shuffled(photos, order)
    for number, bucket in enumerate(sorted(set(buckets))):
        members = [photo for photo in photos if buckets[photo] == bucket]
        members = shuffled(members, stream(seed, "bucket order", epoch, number))
        for start in range(0, len(members), effective_batch):
            chunks.append([members[place % len(members)] for place in range(start, start + effective_batch)])
    return [photo for chunk in shuffled(chunks, order) for photo in chunk]


class SamplePlan(Dataset[list[Batch] | str]):
    """The samples of a run, each made from its number alone; picklable, for the workers of a data loader.

    `class_images` are given if the prior is preserved by them. `prompts` are all that can occur, and
    `num_samples` those of an epoch. Each random choice has a stream of its own, so that none moves another's.

    Raises:
        ValueError: a size does not fit the base, or the class prompt is missing.
    """

    def __init__(
        self,
        data: DataConfig,
        prior: PriorConfig,
        training: PhotoFolder,
        class_images: PhotoFolder,
        *,
        base: Base,
        effective_batch: int,
        seed: int,
        control: ControlConfig | None = None,
    ) -> None:
        check_sizes(data, base)
        self.data, self.prior, self.seed = data, prior, seed
        self._has_size_ids, self._is_inpainting = base.has_size_ids, base.is_inpainting
        self.effective_batch, self._scaling = effective_batch, Scaling.of(data, base)
        self.detector, self.control_dropout = (
            detector_of(control),
            control.control_dropout if control else 0.0,
        )
        self._control_resampling = resampling_of(control.control_type if control else None)
        self.photos, self.class_photos = training.photos, class_images.photos
        self.sizes = [self._scaling.size(photo.size) for photo in self.photos]
        others = {f"class image {name}": digest for name, digest in class_images.fingerprint.items()}
        self.fingerprint = training.fingerprint | others
        self._epoch = 0, self._order(0)
        self.num_samples = len(self._epoch[1])
        if prior.prior_preservation != "none" and not prior.class_prompt:
            mode = f"prior_preservation={prior.prior_preservation}"
            raise ValueError(f"{mode} needs class_prompt, e.g. 'a photo of a dog'; give it")
        extra = [""] if data.caption_dropout > 0 else []
        extra += [prior.class_prompt] if prior.class_prompt and prior.prior_preservation != "none" else []
        self.prompts = tuple(dict.fromkeys((*(photo.prompt for photo in self.photos), *extra)))
        said = [f"class images: {warning}" for warning in class_images.warnings]
        self.warnings = (*training.warnings, *said, *self._warnings())
        self._warned: set[str] = set()

    def _order(self, epoch: int) -> list[int]:
        repeats = [self.data.repeats * (photo.named_repeats or (1,))[0] for photo in self.photos]
        return order_photos(self.sizes, repeats, self.effective_batch, self.seed, epoch)

    def _warnings(self) -> Iterator[str]:
        """Say which photos are enlarged, which buckets hold too few, and which options have no effect."""
        planned = zip(self.photos, self.sizes, strict=True)
        enlarged = [each.name for each, size in planned if covering_size(each.size, size)[0] > each.height]
        if enlarged:
            yield (
                f"{len(enlarged)} photos are smaller than the size of training and are enlarged, which "
                f"blurs: {listed(enlarged)}; give larger ones, or lower the resolution"
            )
        counts, batch = sorted(Counter(self.sizes).items()), self.effective_batch
        small = [f"{n} at {height} × {width}" for (height, width), n in counts if n % batch]
        if small and len(counts) > 1:
            yield (
                f"photos per bucket (height × width) that are no multiple of the effective batch of {batch}, "
                f"so that some are used more often than others: {listed(small)}"
            )
        if self.data.cache_latents and self.data.dataloader_num_workers:
            yield "dataloader_num_workers has no effect with cache_latents: nothing is left to load"
        if self.data.resolution is not None and self.data.bucket_sizes:
            yield "resolution has no effect on photos, as aspect_ratio_buckets lists their sizes"

    def sample(self, number: int) -> tuple[str, list[Crop]]:
        """Return the prompt of a sample; and its crop, and that of its class image, if there is one."""
        epoch, place = divmod(number, self.num_samples)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        index = self._epoch[1][place]
        size, prompt = self.sizes[index], self.photos[index].prompt
        crops = [self._crop(number, index, size, is_class=False)]
        if self.class_photos:
            other = draw_int(len(self.class_photos), stream(self.seed, "class image", number))
            crops.append(self._crop(number, other, size, is_class=True))
        is_dropped = happens(self.data.caption_dropout, stream(self.seed, "caption drop", number))
        return "" if is_dropped else prompt, crops

    def _crop(self, sample: int, index: int, size: Size, *, is_class: bool) -> Crop:
        kind, number = "class " if is_class else "", 0
        photo = (self.class_photos if is_class else self.photos)[index]
        if not self.data.center_crop and covering_size(photo.size, size) != size:
            number = sample
            if self.data.cache_latents:
                number = draw_int(self.data.crops_per_photo, stream(self.seed, f"{kind}crop choice", sample))
        share = 0.5 if self.data.random_flip else 0.0
        return Crop(is_class, index, size, number, happens(share, stream(self.seed, f"{kind}flip", sample)))

    def crops(self, number: int, cut: Callable[[Crop], Batch]) -> list[Batch]:
        """Return the crops of a sample, as `cut` makes them, with its prompt and number."""
        prompt, crops = self.sample(number)
        return [replace(cut(crop), prompts=(prompt,), samples=(number,)) for crop in crops]

    def __getitem__(self, number: int) -> list[Batch] | str:
        """Return a sample's pixels; photos in, pixels out, so that workers need no model.

        Where a photo cannot be read any more, the sentence on it comes instead: an exception would come out
        of a worker as a traceback.
        """
        try:
            return self.crops(number, lambda crop: next(self.cut([crop])))
        except ValueError as error:
            return str(error)

    def cut(self, crops: Sequence[Crop]) -> Iterator[Batch]:
        """Give crops of one photo at one size, which is decoded at most once; raises as `read_again`."""
        is_class, index, size, *_ = crops[0]
        photo, kind = (self.class_photos if is_class else self.photos)[index], "class " if is_class else ""
        shown = photo.covering(size, self._scaling.resampling)
        whole, mask, control = shown.rgb.size, None, None
        if photo.mask is not None:
            mask = photo.mask.decode().resize(whole, Image.Resampling.BILINEAR)
        elif self.data.mask_from_alpha and not is_class:
            mask = shown.mask
        if photo.control is not None:
            control = photo.control.decode().resize(whole, self._control_resampling)
        elif self.detector is not None and not is_class:
            control = self.detector.draw(shown.rgb, shown.mask)
        for crop in crops:
            generator = stream(self.seed, f"{kind}crop", index, crop.number)
            rooms, holes = (whole[1] - size[0], whole[0] - size[1]), None
            corner = [
                round(each / 2) if self.data.center_crop else draw_int(each + 1, generator) for each in rooms
            ]
            if mask is not None and not _cut(mask, corner, crop).any():
                corner = self._onto_mask(mask, corner, size, generator, photo.name)
            pixels = _cut(shown.rgb, corner, crop).float() / 127.5 - 1
            if self._is_inpainting:
                place = (index, crop.number, int(crop.is_flipped))
                hole = draw_inpainting_mask(size, stream(self.seed, f"{kind}hole", *place))[None]
                holes = torch.cat((hole, pixels * (hole < 0.5)), dim=1)
            # mirrored before it is cropped, as in diffusers' train_dreambooth_lora_sdxl.py
            left = whole[0] - corner[1] - size[1] if crop.is_flipped else corner[1]
            ids = torch.tensor([(*photo.size, corner[0], left, *size)]) if self._has_size_ids else None
            yield Batch(
                latents=pixels,
                prompts=(),
                weights=_LATER,
                masks=None if mask is None else _cut(mask, corner, crop).float() / 255,
                is_frozen_prior=_LATER,
                size_ids=ids,
                inpainting=holes,
                samples=(),
                names=(photo.name,),
                controls=None if control is None else _cut(control, corner, crop),
            )

    def _onto_mask(
        self, mask: Image.Image, corner: list[int], size: Size, generator: torch.Generator, name: str
    ) -> list[int]:
        """Return where a crop shows some of the mask: some point of it, drawn, lies as central as may be."""
        points = np.argwhere(np.asarray(mask))
        if len(points) == 0:  # a mask of so few points that resizing has lost them
            return corner
        if self.data.center_crop and name not in self._warned:
            self._warned.add(name)
            shown = f"the middle of {printable(name)} shows nothing of its mask"
            logger.warning("%s; it is cropped around the mask instead", shown)
        point, whole = points[draw_int(len(points), generator)], (mask.height, mask.width)
        return [min(max(int(point[k]) - size[k] // 2, 0), whole[k] - size[k]) for k in (0, 1)]


def _cut(image: Image.Image, corner: Sequence[int], crop: Crop) -> Tensor:
    """Return the values (1, channels, h, w) of a part in 8 bits; the corner is (top, left) in px."""
    (top, left), (height, width) = corner, crop.size
    part = np.array(image.crop((left, top, left + width, top + height))).reshape(1, height, width, -1)
    values = torch.from_numpy(part).permute(0, 3, 1, 2)
    return (values.flip(-1) if crop.is_flipped else values).contiguous()


@dataclass(frozen=True)
class Codec:
    """A base's VAE: `encode` turns images (b, 3, H, W) in [-1, 1] into the posterior's mean and standard
    deviation, each (b, c, h, w), unscaled float32 on the CPU; `scale` makes of latents what the UNet sees.
    """

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    scale: Callable[[Tensor], Tensor]

    def encode_crop(self, crop: Batch) -> Batch:
        """Encode a crop by itself, so that it does not depend on its neighbours."""
        latents, masks, inpainting = self._posterior(crop.latents, crop), crop.masks, crop.inpainting
        height, width = latents.shape[-2:]
        if masks is not None:  # the mean of each latent pixel's area
            areas = masks.reshape(1, height, masks.shape[-2] // height, width, -1)
            masks = areas.mean((2, 4))[None]
        if inpainting is not None:  # the hole's nearest values, as in diffusers' pipelines
            holes = torch.nn.functional.interpolate(inpainting[:, :1], size=(height, width))
            masked = self._posterior(inpainting[:, 1:], crop)
            inpainting = torch.cat((holes.expand(2, -1, -1, -1), masked), dim=1)
        return replace(crop, latents=latents, masks=masks, inpainting=inpainting)

    def _posterior(self, pixels: Tensor, crop: Batch) -> Tensor:
        with torch.no_grad():
            found = torch.cat(self.encode(pixels))
        assert found.dtype == torch.float32
        if not found.isfinite().all():
            raise ValueError(
                f"the VAE turns {printable(crop.names[0])} into latents that are not finite, as SDXL's does "
                "in float16; load it in float32, or give a mended one as pretrained_vae_model_name_or_path"
            )
        return found

    def draw(self, posterior: Tensor, generator: torch.Generator) -> Tensor:
        """Draw scaled latents (1, c, h, w) from a mean and a standard deviation."""
        mean, std = posterior[:1], posterior[1:]
        return self.scale(mean + std * torch.randn(mean.shape, generator=generator))


class BatchSource:
    """Batches of a run. With cached latents, every crop that the samples ask for is encoded here, once.

    Raises:
        ValueError: now, or by each method where latents are not cached: a photo is gone or was changed since
            it was checked, or its latents are not finite.
    """

    def __init__(
        self,
        plan: SamplePlan,
        codec: Codec,
        *,
        num_samples: int,
        on_progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        self.plan, self.codec, self._cache = plan, codec, dict[Crop, Batch]()
        if not plan.data.cache_latents:
            return
        crops = sorted({crop for number in range(num_samples) for crop in plan.sample(number)[1]})
        for _, group in groupby(crops, key=lambda crop: crop[:3]):
            same = list(group)
            for crop, pixels in zip(same, plan.cut(same), strict=True):
                self._cache[crop] = codec.encode_crop(pixels)
                on_progress(len(self._cache), len(crops))
        for each in (*plan.photos, *plan.class_photos):
            each.kept.clear()  # it is not needed again

    def batch(self, samples: Sequence[int]) -> Batch:
        """Return the batch of some samples, which must be of one size."""
        if self._cache:
            return self._stack([self.plan.crops(number, self._cache.__getitem__) for number in samples])
        return self._encoded([self.plan[number] for number in samples])

    def batches(self, schedule: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Return the batches of lists of samples, in their order; workers load what is not cached."""
        num_workers = self.plan.data.dataloader_num_workers
        if self._cache or num_workers == 0:
            return (self.batch(samples) for samples in schedule)
        loader: DataLoader[list[Batch] | str] = DataLoader(
            self.plan,
            batch_sampler=schedule,  # type: ignore[arg-type]  # any iterable of lists will do
            num_workers=num_workers,
            collate_fn=list,
            worker_init_fn=_leave_interrupts_to_main,
            generator=torch.Generator(),  # else the global one is drawn from
        )
        with signals_held():  # a worker that is still starting could not outlive one
            found = iter(loader)
        return (self._encoded(samples) for samples in found)

    def _encoded(self, samples: Sequence[list[Batch] | str]) -> Batch:
        crops: list[list[Batch]] = []
        for each in samples:
            if isinstance(each, str):
                raise ValueError(each)
            crops.append([self.codec.encode_crop(crop) for crop in each])
        return self._stack(crops)

    def _stack(self, samples: Sequence[Sequence[Batch]]) -> Batch:
        """Return the batch of samples' encoded crops; rows without a control image get a black one."""
        prior, mode = self.plan.prior, self.plan.prior.prior_preservation
        rows, class_rows = [self._row(crops[0], "") for crops in samples], list[Batch]()
        has_controls = any(row.controls is not None for row in rows)
        if mode == "frozen":
            class_rows = [replace(row, is_frozen_prior=torch.tensor([True])) for row in rows]
        elif mode == "class_images":
            class_rows = [self._row(crops[1], "class ") for crops in samples]
        for row in class_rows:
            changes: dict[str, Any] = {
                "prompts": (prior.class_prompt,),
                "weights": torch.tensor([prior.prior_loss_weight], dtype=torch.float32),
                "masks": None if row.masks is None else torch.ones_like(row.masks),
                "control_strengths": torch.zeros(1),
            }
            rows.append(replace(row, **changes))
        values: dict[str, Any] = {}
        for name in (each.name for each in fields(Batch)):
            parts = [getattr(row, name) for row in rows]
            given = next((part for part in parts if part is not None), None)
            if isinstance(given, Tensor):
                values[name] = torch.cat(
                    [torch.zeros_like(given) if part is None else part for part in parts]
                )
            else:
                values[name] = None if given is None else sum(parts, ())
        return Batch(**values) if has_controls else replace(Batch(**values), control_strengths=None)

    def _row(self, crop: Batch, kind: str) -> Batch:
        """Return an encoded crop as a row: its latents are drawn here."""
        seed, data, number, inpainting = self.plan.seed, self.plan.data, crop.samples[0], crop.inpainting
        latents = self.codec.draw(crop.latents, stream(seed, f"{kind}posterior", number))
        if inpainting is not None:
            masked = self.codec.draw(inpainting[:, 1:], stream(seed, f"{kind}masked posterior", number))
            inpainting = torch.cat((inpainting[:1, :1], masked), dim=1)
        masks, outside = torch.ones_like(latents[:, :1]), data.unmasked_weight
        if crop.masks is not None:
            masks = outside + (1 - outside) * crop.masks
        chance = torch.rand((), generator=stream(seed, "control dropout", number)).item()
        return replace(
            crop,
            latents=latents,
            weights=torch.ones(1),
            masks=masks if data.has_masks else None,
            is_frozen_prior=torch.tensor([False]),
            inpainting=inpainting,
            controls=None if crop.controls is None else crop.controls.float() / 255,
            control_strengths=torch.tensor([float(chance >= self.plan.control_dropout)]),
        )


def _leave_interrupts_to_main(worker: int) -> None:
    """Let a worker outlive Ctrl-C, which it gets too: the step in progress needs its samples.

    SIGTERM ends it as ever, whatever handler it was forked with: that is how it is stopped at last.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    release_signals()

"""What each sample of a run is, as a pure function of the seed and the sample's number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ether_diffusion.control import Detector
from ether_diffusion.control.images import resampling_of
from ether_diffusion.training.config import ControlConfig, DataConfig, PriorConfig
from ether_diffusion.training.control_images import detector_of
from ether_diffusion.training.crops import (
    Frame,
    Needs,
    Scaling,
    Size,
    centre_frame,
    check_sizes,
    covering_size,
    draw_inpainting_mask,
    draw_int,
    frame_around,
    random_frame,
)
from ether_diffusion.training.dataset import TrainingData, TrainingPhoto
from ether_diffusion.training.randomness import stream
from ether_diffusion.wording import listed


class SampleOrder:
    """The photos of all samples, in epochs of `num_samples`.

    Without buckets, sample s is number s mod n of epoch s div n, and an epoch is a permutation of n: each
    photo `repeats` times. With buckets (of each photo, its bucket), the `effective_batch` samples of one step
    come from one bucket: each bucket's permutation is cut into chunks of that many, a short last chunk is
    filled up by going round in the bucket, and the chunks are shuffled. Then an epoch uses each photo at
    least `repeats` times. Photos may have `repeats` of their own.
    """

    def __init__(
        self,
        num_photos: int,
        effective_batch: int,
        seed: int,
        buckets: Sequence[int] | None = None,
        *,
        repeats: int | Sequence[int] = 1,
    ) -> None:
        counts = [repeats] * num_photos if isinstance(repeats, int) else repeats
        assert min(counts) > 0
        self.effective_batch, self.seed = effective_batch, seed
        self._photos = [photo for turn in range(max(counts)) for photo, n in enumerate(counts) if turn < n]
        self.num_samples = len(self._photos)
        self._buckets: list[list[int]] | None = None
        if buckets is not None:
            self._buckets = [
                [place for place, photo in enumerate(self._photos) if buckets[photo] == bucket]
                for bucket in sorted(set(buckets))
            ]
            num_chunks = sum(-(-len(members) // effective_batch) for members in self._buckets)
            self.num_samples = num_chunks * effective_batch
        self._last: tuple[int, list[int]] | None = None

    def photo(self, sample: int) -> int:
        """Return the index of the photo that a sample shows."""
        epoch, place = divmod(sample, self.num_samples)
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, self._places(epoch))
        return self._photos[self._last[1][place]]

    def _places(self, epoch: int) -> list[int]:
        if self._buckets is None:
            return _shuffled(self.num_samples, stream(self.seed, "order", epoch))
        chunks: list[list[int]] = []
        for number, members in enumerate(self._buckets):
            places = _shuffled(len(members), stream(self.seed, "bucket order", epoch, number))
            for start in range(0, len(places), self.effective_batch):
                stop = start + self.effective_batch
                chunks.append([members[places[index % len(places)]] for index in range(start, stop)])
        order = _shuffled(len(chunks), stream(self.seed, "order", epoch))
        return [place for chunk in order for place in chunks[chunk]]


def _shuffled(count: int, generator: torch.Generator) -> list[int]:
    return [int(index) for index in torch.randperm(count, generator=generator)]


@dataclass(frozen=True)
class Crop:
    """Which crop: of which photo, of what size, which of its random ones, and whether mirrored."""

    is_class: bool
    photo: int
    size: Size
    number: int
    is_flipped: bool


@dataclass(frozen=True)
class Sample:
    """One use of one photo; its crop, and that of the class image that goes with it, if any does."""

    number: int
    prompt: str
    crops: tuple[Crop, ...]


@dataclass(frozen=True)
class CropPixels:
    """A crop's pixels (3, H, W) in [-1, 1].

    `mask` (1, H, W) in [0, 1] is what the loss sees of it, None for all. `inpainting_mask` (1, H, W) is 1
    where an inpainting UNet has to paint. `is_moved` says that the crop first drawn showed nothing of the
    mask. `control` (3, H, W) in [0, 1] says where, in the same crop; None where nothing does.
    """

    crop: Crop
    name: str
    pixels: Tensor
    mask: Tensor | None
    inpainting_mask: Tensor | None
    size_ids: tuple[int, int, int, int, int, int]
    is_moved: bool
    control: Tensor | None


SamplePixels = tuple[Sample, tuple[CropPixels, ...]]
"""A sample and its crops in pixels."""


@dataclass(frozen=True)
class SamplePlan(Dataset[SamplePixels | str]):
    """The samples of a run, each made from its number alone; picklable, for the workers of a data loader.

    Each random choice has a stream of its own, so that none moves another's. `prompts` are all that can
    occur.
    """

    data: DataConfig
    prior: PriorConfig
    needs: Needs
    scaling: Scaling
    photos: tuple[TrainingPhoto, ...]
    class_photos: tuple[TrainingPhoto, ...]
    order: SampleOrder
    seed: int
    prompts: tuple[str, ...]
    warnings: tuple[str, ...]
    hashes: tuple[tuple[str, str], ...]
    control_resampling: Image.Resampling
    control_dropout: float
    detector: Detector | None

    @property
    def num_samples(self) -> int:
        """Samples of an epoch, with repeats and what fills up buckets' chunks."""
        return self.order.num_samples

    @property
    def has_masks(self) -> bool:
        """Whether the loss is weighed by masks."""
        return self.data.mask_from_alpha or self.data.mask_data_dir is not None

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """The size that each photo is trained at."""
        return tuple(self.scaling.size(each.photo.size) for each in self.photos)

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of every photo, prompt, mask and class image by its name."""
        return dict(self.hashes)

    def sample(self, number: int) -> Sample:
        """Return what a sample shows."""
        index = self.order.photo(number)
        crops = [self._crop(number, index, self.sizes[index], is_class=False)]
        if self.class_photos:
            class_index = draw_int(len(self.class_photos), stream(self.seed, "class image", number))
            crops.append(self._crop(number, class_index, self.sizes[index], is_class=True))
        is_dropped = _happens(self.data.caption_dropout, stream(self.seed, "caption drop", number))
        return Sample(number, "" if is_dropped else self.photos[index].prompt, tuple(crops))

    def crops(self, samples: range) -> list[Crop]:
        """Return the different crops of some samples, those of the same photo and size together."""
        crops = {crop for number in samples for crop in self.sample(number).crops}
        return sorted(crops, key=lambda each: (*_group(each), each.number, each.is_flipped))

    def _crop(self, sample: int, index: int, size: Size, *, is_class: bool) -> Crop:
        kind = "class " if is_class else ""
        photo, number = self.photo(index, is_class=is_class).photo.size, 0
        if not self.data.center_crop and covering_size(photo, size) != size:
            number = sample
            if self.data.cache_latents:
                choice = stream(self.seed, f"{kind}crop choice", sample)
                number = draw_int(self.data.crops_per_photo, choice)
        share = 0.5 if self.data.random_flip else 0.0
        is_flipped = _happens(share, stream(self.seed, f"{kind}flip", sample))
        return Crop(is_class, index, size, number, is_flipped)

    def photo(self, index: int, *, is_class: bool = False) -> TrainingPhoto:
        """Return one of the photos, or of the class images."""
        return (self.class_photos if is_class else self.photos)[index]

    def __getitem__(self, number: int) -> SamplePixels | str:
        """Return a sample's pixels; photos in, pixels out, so that workers need no model.

        Where a photo cannot be read any more, the sentence on it comes instead: an exception would come out
        of a worker as a traceback.
        """
        sample = self.sample(number)
        try:
            return sample, tuple(next(self.cut([crop])) for crop in sample.crops)
        except ValueError as error:
            return str(error)

    def cut(self, crops: Sequence[Crop]) -> Iterator[CropPixels]:
        """Give crops of one photo at one size, which is decoded at most once.

        Raises:
            ValueError: the photo or its mask is gone, or was changed.
        """
        first = crops[0]
        assert all(_group(crop) == _group(first) for crop in crops)
        photo = self.photo(first.photo, is_class=first.is_class)
        shown = photo.photo.covering(first.size, self.scaling.resampling)
        resized, mask, control = shown.rgb.size, None, None
        if photo.mask is not None:
            mask = photo.mask.decode().resize(resized, Image.Resampling.BILINEAR)
        elif self.data.mask_from_alpha and not first.is_class:
            mask = shown.mask
        if photo.control is not None:
            control = photo.control.decode().resize(resized, self.control_resampling)
        elif self.detector is not None and not first.is_class:
            control = self.detector.draw(shown.rgb, shown.mask)
        for crop in crops:
            yield self._cut(crop, photo, shown.rgb, mask, control)

    def _cut(
        self,
        crop: Crop,
        photo: TrainingPhoto,
        rgb: Image.Image,
        mask: Image.Image | None,
        control: Image.Image | None,
    ) -> CropPixels:
        kind = "class " if crop.is_class else ""
        generator = stream(self.seed, f"{kind}crop", crop.photo, crop.number)
        if self.data.center_crop:
            frame = centre_frame(photo.photo.size, crop.size)
        else:
            frame = random_frame(photo.photo.size, crop.size, generator)
        moved = frame if mask is None else _onto_mask(frame, mask, generator)
        inpainting_mask = None
        if self.needs.is_inpainting:
            place = (crop.photo, crop.number, int(crop.is_flipped))
            inpainting_mask = draw_inpainting_mask(crop.size, stream(self.seed, f"{kind}hole", *place))
        return CropPixels(
            crop=crop,
            name=photo.name,
            pixels=_values(rgb, moved, crop) / 127.5 - 1,
            mask=None if mask is None else _values(mask, moved, crop) / 255,
            inpainting_mask=inpainting_mask,
            size_ids=moved.size_ids(is_flipped=crop.is_flipped),
            is_moved=moved != frame,
            control=None if control is None else _values(control, moved, crop) / 255,
        )


def _group(crop: Crop) -> tuple[bool, int, Size]:
    return crop.is_class, crop.photo, crop.size


def _happens(share: float, generator: torch.Generator) -> bool:
    return bool(torch.rand((), generator=generator, dtype=torch.float64) < share)


def _onto_mask(frame: Frame, mask: Image.Image, generator: torch.Generator) -> Frame:
    """Return the frame, moved where it shows nothing of the mask, which would teach nothing.

    Some point of the mask, drawn at random, then lies as central as may be.
    """
    if mask.crop(frame.box).getextrema()[1] != 0:
        return frame
    points = np.argwhere(np.asarray(mask))
    if len(points) == 0:  # a mask of so few points that resizing has lost them
        return frame
    y, x = points[draw_int(len(points), generator)]
    return frame_around(frame, (int(y), int(x)))


def _values(image: Image.Image, frame: Frame, crop: Crop) -> Tensor:
    """Return a part's values (channels, h, w) as floats in [0, 255]."""
    part = np.asarray(image.crop(frame.box), dtype=np.float32)
    values = torch.from_numpy(part.reshape(*crop.size, -1)).permute(2, 0, 1)
    return (values.flip(-1) if crop.is_flipped else values).contiguous()


def plan_samples(
    data: DataConfig,
    prior: PriorConfig,
    training: TrainingData,
    class_images: TrainingData | None,
    *,
    needs: Needs,
    effective_batch: int,
    seed: int,
    control: ControlConfig | None = None,
) -> SamplePlan:
    """Decide what each sample shows; `class_images` are given if the prior is preserved by them.

    Raises:
        ValueError: a size does not fit the base, or the class prompt is missing.
    """
    check_sizes(data, needs)
    scaling = Scaling.of(data, needs)
    sizes = [scaling.size(each.photo.size) for each in training.photos]
    numbers = {size: number for number, size in enumerate(sorted(set(sizes)))}
    given = (training,) if class_images is None else (training, class_images)
    return SamplePlan(
        data=data,
        prior=prior,
        needs=needs,
        scaling=scaling,
        photos=training.photos,
        class_photos=() if class_images is None else class_images.photos,
        order=SampleOrder(
            len(sizes),
            effective_batch,
            seed,
            [numbers[size] for size in sizes] if len(numbers) > 1 else None,
            repeats=[data.repeats * each.repeats for each in training.photos],
        ),
        seed=seed,
        prompts=_prompts(data, prior, training),
        warnings=(
            *(warning for part in given for warning in part.warnings),
            *_warn_of_sizes(training.photos, sizes, effective_batch),
            *_warn_of_options(data),
        ),
        hashes=tuple(pair for part in given for pair in part.fingerprint.items()),
        control_resampling=resampling_of(None if control is None else control.control_type),
        control_dropout=0.0 if control is None else control.control_dropout,
        detector=detector_of(control),
    )


def _prompts(data: DataConfig, prior: PriorConfig, training: TrainingData) -> tuple[str, ...]:
    extra = [""] if data.caption_dropout > 0 else []
    if prior.prior_preservation != "none":
        if not prior.class_prompt:
            mode = f"prior_preservation={prior.prior_preservation}"
            raise ValueError(f"{mode} needs class_prompt, e.g. 'a photo of a dog'; give it")
        extra.append(prior.class_prompt)
    return tuple(dict.fromkeys((*(each.prompt for each in training.photos), *extra)))


def _warn_of_sizes(
    photos: Sequence[TrainingPhoto], sizes: Sequence[Size], effective_batch: int
) -> Iterator[str]:
    """Say which photos are enlarged, and which buckets hold too few."""
    enlarged = [
        each.name
        for each, size in zip(photos, sizes, strict=True)
        if covering_size(each.photo.size, size)[0] > each.photo.height
    ]
    if enlarged:
        yield (
            f"{len(enlarged)} photos are smaller than the size of training and are enlarged, which blurs: "
            f"{listed(enlarged)}; give larger ones, or lower the resolution"
        )
    small = {size: sizes.count(size) for size in set(sizes) if sizes.count(size) % effective_batch}
    if small and len(set(sizes)) > 1:
        counts = (f"{count} at {size[0]} × {size[1]}" for size, count in sorted(small.items()))
        yield (
            f"photos per bucket (height × width) that are no multiple of the effective batch of "
            f"{effective_batch}, so that some are used more often than others: {listed(counts)}"
        )


def _warn_of_options(data: DataConfig) -> Iterator[str]:
    if data.cache_latents and data.dataloader_num_workers:
        yield "dataloader_num_workers has no effect with cache_latents: nothing is left to load"
    if data.resolution is not None and data.bucket_sizes:
        yield "resolution has no effect on photos, as aspect_ratio_buckets lists their sizes"

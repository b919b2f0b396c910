"""What each sample of a run is, as a pure function of the seed and the sample's number."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ether_diffusion.control.images import resampling_of
from ether_diffusion.training.config import ControlConfig, DataConfig, PriorConfig
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
    random_frame,
)
from ether_diffusion.training.dataset import TrainingData
from ether_diffusion.training.overlays import detector_of
from ether_diffusion.training.randomness import stream
from ether_diffusion.wording import listed


class SampleOrder:
    """The photos of all samples, in epochs of `num_samples`; each photo has a bucket and repeats of its own.

    Where all are of one bucket, sample s is number s mod n of epoch s div n, and an epoch is a permutation of
    n: each photo so many times. Else the `effective_batch` samples of one step come from one bucket: each
    bucket's permutation is cut into chunks of that many, a short last chunk is filled up by going round in
    the bucket, and the chunks are shuffled. Then an epoch uses each photo at least so many times.
    """

    def __init__(
        self, buckets: Sequence[Size], repeats: Sequence[int], effective_batch: int, seed: int
    ) -> None:
        assert min(repeats) > 0
        self.effective_batch, self.seed = effective_batch, seed
        self._photos = [photo for turn in range(max(repeats)) for photo, n in enumerate(repeats) if turn < n]
        self.num_samples = len(self._photos)
        self._buckets = [
            [place for place, photo in enumerate(self._photos) if buckets[photo] == bucket]
            for bucket in sorted(set(buckets))
        ]
        if len(self._buckets) > 1:
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
        if len(self._buckets) == 1:
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

    @property
    def group(self) -> tuple[bool, int, Size]:
        """What crops of one decoded photo have in common."""
        return self.is_class, self.photo, self.size


@dataclass(frozen=True)
class Sample:
    """One use of one photo; its crop, and that of the class image that goes with it, if any does."""

    number: int
    prompt: str
    crops: tuple[Crop, ...]


@dataclass(frozen=True)
class CropImage:
    """A crop as pixels in [-1, 1] (3, H, W), or encoded: the VAE's mean and standard deviation (2, c, h, w).

    `mask` (1, H, W) in [0, 1] is what the loss sees of it, None for all. `hole` (1, H, W) is 1 where an
    inpainting UNet has to paint, and `masked` the image encoded with gray there. Both masks are of the
    latents' size once it is encoded. `is_moved` says that the crop first drawn showed nothing of the mask.
    `control` (3, H, W), in 8 bits, says where, in the same crop; None where nothing does.
    """

    crop: Crop
    name: str
    image: Tensor
    mask: Tensor | None
    hole: Tensor | None
    size_ids: tuple[int, int, int, int, int, int]
    is_moved: bool
    control: Tensor | None
    masked: Tensor | None = None


SampleImages = tuple[Sample, Sequence[CropImage]]
"""A sample and its crops."""


class SamplePlan(Dataset[SampleImages | str]):
    """The samples of a run, each made from its number alone; picklable, for the workers of a data loader.

    `class_images` are given if the prior is preserved by them. `prompts` are all that can occur. Each random
    choice has a stream of its own, so that none moves another's.

    Raises:
        ValueError: a size does not fit the base, or the class prompt is missing.
    """

    def __init__(
        self,
        data: DataConfig,
        prior: PriorConfig,
        training: TrainingData,
        class_images: TrainingData | None,
        *,
        needs: Needs,
        effective_batch: int,
        seed: int,
        control: ControlConfig | None = None,
    ) -> None:
        check_sizes(data, needs)
        self.data, self.prior, self.needs, self.seed = data, prior, needs, seed
        self.detector, self.control_dropout = (
            detector_of(control),
            control.control_dropout if control else 0.0,
        )
        self._control_resampling = resampling_of(control.control_type if control else None)
        self._scaling = Scaling.of(data, needs)
        self.photos, self.class_photos = training.photos, class_images.photos if class_images else ()
        self.sizes = [self._scaling.size(photo.size) for photo in self.photos]
        self.fingerprint = training.fingerprint | (class_images.fingerprint if class_images else {})
        repeats = [data.repeats * photo.repeats for photo in self.photos]
        self._order = SampleOrder(self.sizes, repeats, effective_batch, seed)
        self.num_samples = self._order.num_samples
        """Of an epoch, with repeats and what fills up buckets' chunks."""
        extra = [""] if data.caption_dropout > 0 else []
        if prior.prior_preservation != "none":
            if not prior.class_prompt:
                mode = f"prior_preservation={prior.prior_preservation}"
                raise ValueError(f"{mode} needs class_prompt, e.g. 'a photo of a dog'; give it")
            extra.append(prior.class_prompt)
        self.prompts = tuple(dict.fromkeys((*(photo.prompt for photo in self.photos), *extra)))
        others = class_images.warnings if class_images else ()
        self.warnings = (*training.warnings, *others, *self._warnings(effective_batch))

    def _warnings(self, effective_batch: int) -> Iterator[str]:
        """Say which photos are enlarged, which buckets hold too few, and which options have no effect."""
        enlarged = [
            photo.name for photo in self.photos if self._scaling.covering(photo.size)[0] > photo.height
        ]
        if enlarged:
            yield (
                f"{len(enlarged)} photos are smaller than the size of training and are enlarged, which "
                f"blurs: {listed(enlarged)}; give larger ones, or lower the resolution"
            )
        counts = Counter(self.sizes)
        small = [
            f"{counts[size]} at {size[0]} × {size[1]}"
            for size in sorted(counts)
            if counts[size] % effective_batch
        ]
        if small and len(counts) > 1:
            yield (
                f"photos per bucket (height × width) that are no multiple of the effective batch of "
                f"{effective_batch}, so that some are used more often than others: {listed(small)}"
            )
        if self.data.cache_latents and self.data.dataloader_num_workers:
            yield "dataloader_num_workers has no effect with cache_latents: nothing is left to load"
        if self.data.resolution is not None and self.data.bucket_sizes:
            yield "resolution has no effect on photos, as aspect_ratio_buckets lists their sizes"

    def sample(self, number: int) -> Sample:
        """Return what a sample shows."""
        index = self._order.photo(number)
        crops = [self._crop(number, index, self.sizes[index], is_class=False)]
        if self.class_photos:
            class_index = draw_int(len(self.class_photos), stream(self.seed, "class image", number))
            crops.append(self._crop(number, class_index, self.sizes[index], is_class=True))
        is_dropped = _happens(self.data.caption_dropout, stream(self.seed, "caption drop", number))
        return Sample(number, "" if is_dropped else self.photos[index].prompt, tuple(crops))

    def crops(self, samples: range) -> list[Crop]:
        """Return the different crops of some samples, those of the same photo and size together."""
        crops = {crop for number in samples for crop in self.sample(number).crops}
        return sorted(crops, key=lambda each: (*each.group, each.number, each.is_flipped))

    def _crop(self, sample: int, index: int, size: Size, *, is_class: bool) -> Crop:
        kind = "class " if is_class else ""
        photo, number = (self.class_photos if is_class else self.photos)[index], 0
        if not self.data.center_crop and covering_size(photo.size, size) != size:
            number = sample
            if self.data.cache_latents:
                choice = stream(self.seed, f"{kind}crop choice", sample)
                number = draw_int(self.data.crops_per_photo, choice)
        share = 0.5 if self.data.random_flip else 0.0
        is_flipped = _happens(share, stream(self.seed, f"{kind}flip", sample))
        return Crop(is_class, index, size, number, is_flipped)

    def __getitem__(self, number: int) -> SampleImages | str:
        """Return a sample's pixels; photos in, pixels out, so that workers need no model.

        Where a photo cannot be read any more, the sentence on it comes instead: an exception would come out
        of a worker as a traceback.
        """
        sample = self.sample(number)
        try:
            return sample, [next(self.cut([crop])) for crop in sample.crops]
        except ValueError as error:
            return str(error)

    def cut(self, crops: Sequence[Crop]) -> Iterator[CropImage]:
        """Give crops of one photo at one size, which is decoded at most once.

        Raises:
            ValueError: the photo or its mask is gone, or was changed.
        """
        is_class, index, size = crops[0].group
        photo = (self.class_photos if is_class else self.photos)[index]
        shown = photo.covering(size, self._scaling.resampling)
        resized, mask, control = shown.rgb.size, None, None
        if photo.mask is not None:
            mask = photo.mask.decode().resize(resized, Image.Resampling.BILINEAR)
        elif self.data.mask_from_alpha and not is_class:
            mask = shown.mask
        if photo.control is not None:
            control = photo.control.decode().resize(resized, self._control_resampling)
        elif self.detector is not None and not is_class:
            control = self.detector.draw(shown.rgb, shown.mask)
        kind = "class " if is_class else ""
        for crop in crops:
            generator = stream(self.seed, f"{kind}crop", index, crop.number)
            if self.data.center_crop:
                frame = centre_frame(photo.size, size)
            else:
                frame = random_frame(photo.size, size, generator)
            moved = frame if mask is None else _onto_mask(frame, mask, generator)
            hole = None
            if self.needs.is_inpainting:
                place = (index, crop.number, int(crop.is_flipped))
                hole = draw_inpainting_mask(size, stream(self.seed, f"{kind}hole", *place))
            yield CropImage(
                crop=crop,
                name=photo.name,
                image=_values(shown.rgb, moved, crop).float() / 127.5 - 1,
                mask=None if mask is None else _values(mask, moved, crop).float() / 255,
                hole=hole,
                size_ids=moved.size_ids(is_flipped=crop.is_flipped),
                is_moved=moved != frame,
                control=None if control is None else _values(control, moved, crop),
            )


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
    return frame.around((int(y), int(x)))


def _values(image: Image.Image, frame: Frame, crop: Crop) -> Tensor:
    """Return a part's values (channels, h, w) in 8 bits."""
    values = torch.from_numpy(np.array(image.crop(frame.box)).reshape(*crop.size, -1)).permute(2, 0, 1)
    return (values.flip(-1) if crop.is_flipped else values).contiguous()

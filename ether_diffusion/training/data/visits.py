"""The plan of a run: what each visit trains on, as a pure function of the seed and the visit's number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ether_diffusion.training.config import DataConfig
from ether_diffusion.training.data.buckets import automatic_buckets, check_sides, nearest_bucket
from ether_diffusion.training.data.geometry import Size, covering_size, draw_int, has_freedom
from ether_diffusion.training.data.items import Item
from ether_diffusion.training.data.order import VisitOrder
from ether_diffusion.training.data.views import ViewKey
from ether_diffusion.training.randomness import stream
from ether_diffusion.wording import listed


@dataclass(frozen=True)
class Visit:
    """One use of one sample; `class_view` is the class image that goes with it, if any does."""

    number: int
    prompt: str
    view: ViewKey
    class_view: ViewKey | None


@dataclass(frozen=True)
class Schedule:
    """Gives any visit. Each random choice has a stream of its own, so that none moves another's."""

    items: tuple[Item, ...]
    class_items: tuple[Item, ...]
    sizes: tuple[Size, ...]
    order: VisitOrder
    config: DataConfig
    seed: int

    def visit(self, number: int) -> Visit:
        """Return what a visit trains on."""
        index = self.order.item(number)
        size = self.sizes[index]
        class_view = None
        if self.class_items:
            class_index = draw_int(len(self.class_items), stream(self.seed, "class image", number))
            class_view = self._view(number, class_index, size, is_class=True)
        is_dropped = _happens(self.config.caption_dropout, stream(self.seed, "caption drop", number))
        return Visit(
            number=number,
            prompt="" if is_dropped else self.items[index].prompt,
            view=self._view(number, index, size, is_class=False),
            class_view=class_view,
        )

    def views(self, visits: range) -> list[ViewKey]:
        """Return the different views of some visits, those of the same photo and size together."""
        keys: set[ViewKey] = set()
        for number in visits:
            visit = self.visit(number)
            keys |= {visit.view} if visit.class_view is None else {visit.view, visit.class_view}
        return sorted(keys, key=lambda key: (key.is_class, key.item, key.size, key.crop, key.is_flipped))

    def _view(self, number: int, index: int, size: Size, *, is_class: bool) -> ViewKey:
        kind = "class " if is_class else ""
        photo = (self.class_items if is_class else self.items)[index].photo
        crop = 0
        if not self.config.center_crop and has_freedom((photo.height, photo.width), size):
            crop = number
            if self.config.cache_latents:
                crop = draw_int(self.config.crops_per_photo, stream(self.seed, f"{kind}crop choice", number))
        share = 0.5 if self.config.random_flip else 0.0
        is_flipped = _happens(share, stream(self.seed, f"{kind}flip", number))
        return ViewKey(is_class, index, size, crop, is_flipped)


def choose_sizes(
    config: DataConfig, items: Sequence[Item], *, native_size: int, size_multiple: int
) -> tuple[Size, ...]:
    """Return the size that each photo is trained at; `size_multiple` (px) divides all sides.

    Raises:
        ValueError: it does not divide the resolution or a bucket's side.
    """
    buckets = config.bucket_sizes
    for size in buckets:
        check_sides(size, size_multiple, f"the bucket {size[0]},{size[1]}")
    if not buckets:
        resolution = config.resolution or native_size
        check_sides((resolution, resolution), size_multiple, f"resolution={resolution}")
        buckets = ((resolution, resolution),)
        if config.use_aspect_ratio_buckets:
            buckets = automatic_buckets(resolution, size_multiple)
    return tuple(buckets[nearest_bucket((item.photo.height, item.photo.width), buckets)] for item in items)


def warn_of_sizes(items: Sequence[Item], sizes: Sequence[Size], effective_batch: int) -> Iterator[str]:
    """Say which photos are enlarged, and which buckets hold too few."""
    enlarged = [
        item.name
        for item, size in zip(items, sizes, strict=True)
        if covering_size((item.photo.height, item.photo.width), size)[0] > item.photo.height
    ]
    if enlarged:
        yield (
            f"{len(enlarged)} photos are smaller than the size of training and are enlarged, which blurs: "
            f"{listed(enlarged)}; give larger ones, or lower the resolution"
        )
    if len(set(sizes)) > 1:
        small = {size: sizes.count(size) for size in sizes if sizes.count(size) % effective_batch}
        if small:
            counts = (f"{count} at {size[0]} × {size[1]}" for size, count in sorted(small.items()))
            yield (
                f"photos per bucket (height × width) that are no multiple of the effective batch of "
                f"{effective_batch}, so that some are used more often than others: {listed(counts)}"
            )


def _happens(share: float, generator: torch.Generator) -> bool:
    return bool(torch.rand((), generator=generator, dtype=torch.float64) < share)

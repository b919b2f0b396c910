"""Views: a photo as it is trained on once, cropped, maybe mirrored, with its mask and hole."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.control import Detector
from ether_diffusion.training.data.geometry import (
    Frame,
    Size,
    centre_frame,
    covering_size,
    draw_int,
    frame_around,
    random_frame,
)
from ether_diffusion.training.data.holes import draw_hole
from ether_diffusion.training.data.items import Item
from ether_diffusion.training.data.sources import read_again
from ether_diffusion.training.decoding import MAX_PIXELS, MIN_SIDE, WHITE, Decoded, decode_bytes
from ether_diffusion.training.randomness import stream


@dataclass(frozen=True)
class ViewKey:
    """Which view: of which photo, of what size, which of its random crops, and whether mirrored."""

    is_class: bool
    item: int
    size: Size
    crop: int
    is_flipped: bool


@dataclass(frozen=True)
class View:
    """A view's pixels (3, H, W) in [-1, 1].

    `mask` (1, H, W) in [0, 1] is what the loss sees of it, None for all. `hole` (1, H, W) is 1 where an
    inpainting UNet has to paint. `is_moved` says that the crop first drawn showed nothing of the mask.
    `control` (3, H, W) in [0, 1] says where, in the same crop; None where nothing does.
    """

    key: ViewKey
    name: str
    pixels: Tensor
    mask: Tensor | None
    hole: Tensor | None
    size_ids: tuple[int, int, int, int, int, int]
    is_moved: bool
    control: Tensor | None = None


@dataclass(frozen=True)
class ViewMaker:
    """Makes any view from its key alone; picklable, for the workers of a data loader.

    A crop that shows nothing of its photo's mask would teach nothing: it is moved so that some point of the
    mask, drawn at random, lies as central as may be.
    """

    items: tuple[Item, ...]
    class_items: tuple[Item, ...]
    seed: int
    center_crop: bool
    mask_from_alpha: bool
    has_holes: bool
    resampling: Image.Resampling
    control_resampling: Image.Resampling = Image.Resampling.BILINEAR
    detector: Detector | None = None

    def item(self, key: ViewKey) -> Item:
        """Return the photo of a view."""
        return (self.class_items if key.is_class else self.items)[key.item]

    def make(self, keys: Sequence[ViewKey]) -> Iterator[View]:
        """Make views of one photo at one size, which is decoded and resized once.

        Raises:
            ValueError: the photo or its mask is gone, or was changed.
        """
        item, size = self.item(keys[0]), keys[0].size
        assert all(
            (key.is_class, key.item, key.size) == (keys[0].is_class, keys[0].item, size) for key in keys
        )
        original = (item.photo.height, item.photo.width)
        resized = covering_size(original, size)
        decoded = decode_item(item, min(resized))
        photo = decoded.rgb.resize(resized[::-1], self.resampling)
        mask = self._mask(item, decoded, is_class=keys[0].is_class)
        if mask is not None:
            mask = mask.resize(resized[::-1], Image.Resampling.BILINEAR)
        control = self._control(item, photo, decoded.mask, is_class=keys[0].is_class)
        for key in keys:
            yield self._cut(key, item, photo, mask, control)

    def _mask(self, item: Item, decoded: Decoded, *, is_class: bool) -> Image.Image | None:
        if item.mask is not None:
            return item.mask.decode()
        return decoded.mask if self.mask_from_alpha and not is_class else None

    def _control(
        self, item: Item, photo: Image.Image, alpha: Image.Image | None, *, is_class: bool
    ) -> Image.Image | None:
        """Return what says where in a resized photo, at its size."""
        if item.control is not None:
            return item.control.decode().resize(photo.size, self.control_resampling)
        if self.detector is None or is_class:
            return None
        resized = None if alpha is None else alpha.resize(photo.size, Image.Resampling.BILINEAR)
        return self.detector.draw(photo, resized)

    def _cut(
        self,
        key: ViewKey,
        item: Item,
        photo: Image.Image,
        mask: Image.Image | None,
        control: Image.Image | None,
    ) -> View:
        generator = stream(self.seed, "class crop" if key.is_class else "crop", key.item, key.crop)
        original = (item.photo.height, item.photo.width)
        if self.center_crop:
            frame = centre_frame(original, key.size)
        else:
            frame = random_frame(original, key.size, generator)
        moved = frame if mask is None else _onto_mask(frame, mask, generator)
        return View(
            key=key,
            name=item.name,
            pixels=_values(photo, moved, key) / 127.5 - 1,
            mask=None if mask is None else _values(mask, moved, key) / 255,
            hole=self._hole(key),
            size_ids=moved.size_ids(is_flipped=key.is_flipped),
            is_moved=moved != frame,
            control=None if control is None else _values(control, moved, key) / 255,
        )

    def _hole(self, key: ViewKey) -> Tensor | None:
        if not self.has_holes:
            return None
        purpose = "class hole" if key.is_class else "hole"
        return draw_hole(key.size, stream(self.seed, purpose, key.item, key.crop, int(key.is_flipped)))


def decode_item(item: Item, target_side: int | None = None) -> Decoded:
    """Decode a photo again, as in `decode_photo`; whole without a target_side (px).

    Raises:
        ValueError: it is gone, or was changed.
    """
    data = read_again(item.source, item.name, item.photo.sha256)
    return decode_bytes(
        data,
        item.photo.path.suffix,
        background=WHITE,
        max_pixels=MAX_PIXELS,
        min_side=MIN_SIDE,
        target_side=target_side,
    )


def _onto_mask(frame: Frame, mask: Image.Image, generator: torch.Generator) -> Frame:
    if mask.crop(frame.box).getextrema()[1] != 0:
        return frame
    points = np.argwhere(np.asarray(mask))
    if len(points) == 0:  # a mask of so few points that resizing has lost them
        return frame
    y, x = points[draw_int(len(points), generator)]
    return frame_around(frame, (int(y), int(x)))


def _values(image: Image.Image, frame: Frame, key: ViewKey) -> Tensor:
    """Return a part's values (channels, h, w) as floats in [0, 255]."""
    part = np.asarray(image.crop(frame.box), dtype=np.float32)
    values = torch.from_numpy(part.reshape(*key.size, -1)).permute(2, 0, 1)
    return (values.flip(-1) if key.is_flipped else values).contiguous()

"""Where a photo is cut: resized until it just covers the training size, then cropped to it."""

from dataclasses import dataclass

import torch

Size = tuple[int, int]
"""(height, width) in px."""


@dataclass(frozen=True)
class Frame:
    """A part of a resized photo: sizes and places are (height, width) and (top, left) in px."""

    original: Size
    resized: Size
    corner: tuple[int, int]
    size: Size

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The part in Pillow's order: left, top, right, bottom."""
        top, left = self.corner
        return left, top, left + self.size[1], top + self.size[0]

    def size_ids(self, *, is_flipped: bool) -> tuple[int, int, int, int, int, int]:
        """Return SDXL's conditioning: original height and width, crop top and left, target height and width.

        A mirrored photo is mirrored before it is cropped, as in diffusers' train_dreambooth_lora_sdxl.py.
        """
        top, left = self.corner
        if is_flipped:
            left = self.resized[1] - left - self.size[1]
        return *self.original, top, left, *self.size


def covering_size(photo: Size, size: Size) -> Size:
    """Return a photo's size after resizing: one side is that of `size`, the other no less; rounded down."""
    (photo_height, photo_width), (height, width) = photo, size
    if photo_width * height >= photo_height * width:
        return height, photo_width * height // photo_height
    return photo_height * width // photo_width, width


def has_freedom(photo: Size, size: Size) -> bool:
    """Say whether a photo can be cropped to `size` in more than one way."""
    return covering_size(photo, size) != size


def centre_frame(photo: Size, size: Size) -> Frame:
    """Return the middle of a photo."""
    resized = covering_size(photo, size)
    corner = (round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2))
    return Frame(photo, resized, corner, size)


def random_frame(photo: Size, size: Size, generator: torch.Generator) -> Frame:
    """Return a part of a photo, all places equally likely."""
    resized = covering_size(photo, size)
    top, left = (draw_int(resized[axis] - size[axis] + 1, generator) for axis in (0, 1))
    return Frame(photo, resized, (top, left), size)


def frame_around(frame: Frame, point: tuple[int, int]) -> Frame:
    """Return the frame of the same photo with `point` (y, x) of the resized photo as central as may be."""
    corner = [
        min(max(point[axis] - frame.size[axis] // 2, 0), frame.resized[axis] - frame.size[axis])
        for axis in (0, 1)
    ]
    return Frame(frame.original, frame.resized, (corner[0], corner[1]), frame.size)


def draw_int(end: int, generator: torch.Generator) -> int:
    """Draw from 0, 1, …, end − 1."""
    return int(torch.randint(end, (), generator=generator))

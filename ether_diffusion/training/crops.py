"""Sizes and places: at what size a photo is trained, and which part of it is cut out."""

import math
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ether_diffusion.training.config import DataConfig

Size = tuple[int, int]
"""(height, width) in px."""

LARGE = 256
"""From this resolution (px) on, buckets' sides are multiples of 64, as in other trainers."""
MAX_STRETCH = 2
"""Buckets' sides are between the resolution divided and multiplied by this: aspects from 1:4 to 4:1."""


@dataclass(frozen=True)
class Needs:
    """What a base asks of the photos: its native size (px), what divides every side (px, the VAE's factor
    times the UNet's), and whether its UNet is told sizes (SDXL) or sees a mask and what is around it
    (inpainting).
    """

    native_size: int
    size_multiple: int
    has_size_ids: bool = False
    is_inpainting: bool = False


@dataclass(frozen=True)
class Scaling:
    """The sizes that photos are trained at, one square or buckets of aspect ratios, and the filter."""

    sizes: tuple[Size, ...]
    resampling: Image.Resampling

    @classmethod
    def of(cls, data: DataConfig, needs: Needs) -> "Scaling":
        """Return what a configuration asks for; `check_sizes` says whether the base can do it."""
        resolution = data.resolution or needs.native_size
        sizes = data.bucket_sizes or ((resolution, resolution),)
        if data.use_aspect_ratio_buckets and not data.bucket_sizes:
            sizes = automatic_buckets(resolution, needs.size_multiple)
        name = data.image_interpolation_mode.removesuffix("_exact")  # Pillow's nearest is the exact one
        return cls(sizes, Image.Resampling[name.upper()])

    def size(self, photo: Size) -> Size:
        """Return the size that a photo is trained at: of the nearest aspect ratio, of several the largest."""

        def distance(size: Size) -> tuple[float, int]:
            height, width = size
            return abs(math.log(photo[1] * height / (photo[0] * width))), -height * width

        return min(self.sizes, key=distance)

    def covering(self, photo: Size) -> Size:
        """Return a photo's size after resizing."""
        return covering_size(photo, self.size(photo))


def check_sizes(data: DataConfig, needs: Needs) -> None:
    """Refuse a resolution or buckets with sides that the base cannot halve as often as it must.

    Raises:
        ValueError: the base's multiple (px) does not divide a side.
    """
    resolution, multiple = data.resolution or needs.native_size, needs.size_multiple
    wanted = {f"the bucket {height},{width}": (height, width) for height, width in data.bucket_sizes}
    for found, size in (wanted or {f"resolution={resolution}": (resolution, resolution)}).items():
        wrong = next((side for side in size if side <= 0 or side % multiple), None)
        if wrong is not None:
            below = max(wrong // multiple, 1) * multiple
            raise ValueError(
                f"{found} is no multiple of {multiple} px, which the VAE and the UNet of this base need "
                f"together; use {below}, {below + multiple}, …"
            )


def automatic_buckets(resolution: int, multiple: int) -> tuple[Size, ...]:
    """Return sizes of at most the square's area, so that none needs more memory, and about that.

    Sides are multiples of 64 px from a resolution of 256 on, below of `multiple`; and always of `multiple`.
    """
    step = math.lcm(64, multiple) if resolution >= LARGE else multiple
    shortest, longest = resolution // MAX_STRETCH, resolution * MAX_STRETCH
    sizes = {(resolution, resolution)}
    for side in range(-(-shortest // step) * step, longest + 1, step):
        other = min(resolution**2 // side, longest) // step * step
        if other >= shortest:
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))


def covering_size(photo: Size, size: Size) -> Size:
    """Return a photo's size after resizing: one side is that of `size`, the other no less; rounded down."""
    (photo_height, photo_width), (height, width) = photo, size
    if photo_width * height >= photo_height * width:
        return height, photo_width * height // photo_height
    return photo_height * width // photo_width, width


@dataclass(frozen=True)
class Frame:
    """A part of a resized photo: sizes and places are (height, width) and (top, left) in px."""

    original: Size
    size: Size
    corner: tuple[int, int]

    @property
    def resized(self) -> Size:
        """The size of the whole photo that this is a part of."""
        return covering_size(self.original, self.size)

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

    def around(self, point: tuple[int, int]) -> "Frame":
        """Return the frame with a point (y, x) of the resized photo as central as may be."""
        top, left = (
            min(max(place - side // 2, 0), whole - side)
            for place, side, whole in zip(point, self.size, self.resized, strict=True)
        )
        return Frame(self.original, self.size, (top, left))


def centre_frame(photo: Size, size: Size) -> Frame:
    """Return the middle of a photo."""
    resized = covering_size(photo, size)
    return Frame(photo, size, (round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)))


def random_frame(photo: Size, size: Size, generator: torch.Generator) -> Frame:
    """Return a part of a photo, all places equally likely."""
    resized = covering_size(photo, size)
    top, left = (draw_int(resized[axis] - size[axis] + 1, generator) for axis in (0, 1))
    return Frame(photo, size, (top, left))


def draw_int(end: int, generator: torch.Generator) -> int:
    """Draw from 0, 1, …, end − 1."""
    return int(torch.randint(end, (), generator=generator))


def draw_inpainting_mask(size: Size, generator: torch.Generator) -> Tensor:
    """Return a mask (1, height, width) of 1 in a rectangle or an ellipse, each as likely, and 0 elsewhere.

    Its sides are uniform up to the whole image's, and it lies anywhere inside, as in `random_mask` of
    diffusers' research project dreambooth_inpaint.
    """
    mask = Image.new("1", (size[1], size[0]))
    half_height, half_width = (draw_int(side + 1, generator) // 2 for side in size)
    y = half_height + draw_int(size[0] - 2 * half_height + 1, generator)
    x = half_width + draw_int(size[1] - 2 * half_width + 1, generator)
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    draw = ImageDraw.Draw(mask)
    (draw.ellipse if draw_int(2, generator) else draw.rectangle)(box, fill=1)
    values = torch.frombuffer(bytearray(mask.convert("L").tobytes()), dtype=torch.uint8)
    return (values > 0).float().reshape(1, *size)

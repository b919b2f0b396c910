"""Control images: as they are given, brought to size, named by their pixels, and edges drawn from photos."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

ControlImage = Image.Image | Tensor
"""A picture, or a tensor (3, height, width) or (1, height, width) in [0, 1]."""

NEAREST_TYPES = ("palette",)
"""Control types whose colours stand for classes: between two there is no third."""
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


def control_batch(
    images: ControlImage | Sequence[ControlImage], *, height: int, width: int, control_type: str | None = None
) -> Tensor:
    """Return control images (n, 3, height, width) in [0, 1]: RGB, what is transparent is black.

    They are resized where they are of the same proportions; a palette without new colours between its own.
    A tensor may hold several: (n, 3, h, w).
    """
    size, resampling = (width, height), resampling_of(control_type)
    pictures = [as_picture(image) for image in listed_images(images)]
    for picture in pictures:
        check_shape(picture, width=width, height=height)
    fitted = [each if each.size == size else each.resize(size, resampling) for each in pictures]
    arrays = np.stack([np.asarray(picture) for picture in fitted])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous().float() / 255


def check_shape(picture: Image.Image, *, width: int, height: int) -> None:
    """Check that a control image has the proportions of the picture (px) that follows it."""
    # a pixel more or less on the longer side is rounding, not another shape
    if abs(picture.width * height - picture.height * width) > max(*picture.size, height, width):
        raise ValueError(
            f"a control image has {picture.width} × {picture.height} px and the picture {width} × "
            f"{height} px; crop it to the same proportions, or give width and height"
        )


def resampling_of(control_type: str | None) -> Image.Resampling:
    """Return how control images of a type are brought to another size."""
    return Image.Resampling.NEAREST if control_type in NEAREST_TYPES else Image.Resampling.BILINEAR


def listed_images(images: ControlImage | Sequence[ControlImage]) -> list[ControlImage]:
    """Return control images one by one; none is a ValueError."""
    if isinstance(images, Image.Image) or (isinstance(images, Tensor) and images.ndim < 4):
        return [images]
    found = list(images)
    if not found:
        raise ValueError("found an empty list of control images; give one for all prompts or one for each")
    return found


def as_picture(image: ControlImage) -> Image.Image:
    """Return a control image in RGB, what is transparent over black.

    Raises:
        ValueError: it is no picture or tensor in [0, 1], or has more than 8 bits.
    """
    if isinstance(image, Tensor):
        return _picture_of(image)
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise ValueError(f"found a control image of type {kind}; give a PIL image or a tensor in [0, 1]")
    if image.mode not in _MODES:
        raise ValueError(f"found a control image of mode {image.mode}; save it as 8-bit RGB or gray")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image.convert("RGB")


def control_image_sha256(image: ControlImage) -> str:
    """Return the SHA-256 of a control image's size and RGB pixels as given; 64 hexadecimal digits.

    A picture and the tensor of its values have the same.
    """
    picture = as_picture(image)
    return hashlib.sha256(f"{picture.width}x{picture.height}:".encode() + picture.tobytes()).hexdigest()


def _picture_of(image: Tensor) -> Image.Image:
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
        needed = "use (3, height, width) or (1, height, width)"
        raise ValueError(f"found a control image of shape {tuple(image.shape)}; {needed}")
    values = image.detach().to("cpu", torch.float32)
    if not bool(((values >= 0) & (values <= 1)).all()):
        low, high = values.min().item(), values.max().item()
        raise ValueError(f"found a control image with values from {low:g} to {high:g}; use 0 to 1")
    pixels = (values.expand(3, -1, -1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


_Whole = NDArray[np.int64]
_TAN_SHIFT = 15
_TAN_22 = round((2**0.5 - 1) * 2**_TAN_SHIFT)  # tan(22.5°) in fixed point; tan(67.5°) is two more


def draw_edges(photo: Image.Image, low_threshold: float, high_threshold: float) -> Image.Image:
    """Return the edges of a photo, white on black; both are of mode RGB."""
    return Image.fromarray(canny(np.asarray(photo), low_threshold, high_threshold)).convert("RGB")


def canny(picture: NDArray[np.uint8], low_threshold: float, high_threshold: float) -> NDArray[np.uint8]:
    """Return the edges (height, width) of a picture (height, width, 3): 255 on an edge, else 0.

    A pixel is an edge where the gradient |∂x| + |∂y| of Sobel's 3 × 3 kernels, unnormalised on values from 0
    to 255 and of the channel where it is largest, is a maximum across the edge and above the high threshold,
    or above the low one and joined to such pixels.
    """
    low, high = sorted((int(np.floor(low_threshold)), int(np.floor(high_threshold))))
    values = np.pad(picture.astype(np.int64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = values[:-2] + 2 * values[1:-1] + values[2:]
    columns = values[:, :-2] + 2 * values[:, 1:-1] + values[:, 2:]
    both = np.stack((rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]))
    channel = np.argmax(np.abs(both).sum(0), axis=-1)  # the first of equals
    across, down = np.take_along_axis(both, channel[None, ..., None], -1)[..., 0]
    strength = np.abs(across) + np.abs(down)
    is_peak = _peaks(across, down, strength) & (strength > low)
    return np.where(_joined(is_peak & (strength > high), is_peak), 255, 0).astype(np.uint8)


def _peaks(across: _Whole, down: _Whole, strength: _Whole) -> NDArray[np.bool_]:
    """Say where the gradient is largest along its own direction, which is one of four."""
    framed, (height, width) = np.pad(strength, 1), strength.shape
    beside = {(y, x): framed[1 + y :, 1 + x :][:height, :width] for y in (-1, 0, 1) for x in (-1, 0, 1)}
    width_at_22, steep = np.abs(across) * _TAN_22, np.abs(down) << _TAN_SHIFT
    is_across = steep < width_at_22
    is_down = steep > width_at_22 + (np.abs(across) << _TAN_SHIFT + 1)
    rises = (across ^ down) < 0  # the gradient points to the upper right or the lower left
    # one comparison of each straight pair lets equals pass, so that of two equal pixels one is kept
    return np.select(
        [is_across, is_down, rises],
        [
            (strength > beside[0, -1]) & (strength >= beside[0, 1]),
            (strength > beside[-1, 0]) & (strength >= beside[1, 0]),
            (strength > beside[-1, 1]) & (strength > beside[1, -1]),
        ],
        (strength > beside[-1, -1]) & (strength > beside[1, 1]),
    )


def _joined(seeds: NDArray[np.bool_], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pixels of the mask that are joined to a seed within it, also by corners."""
    left, reached = np.pad(mask & ~seeds, 1).ravel(), np.pad(seeds, 1).ravel()
    width, front = mask.shape[1] + 2, np.flatnonzero(reached)
    steps = np.array([y * width + x for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)])
    while len(front):
        around = np.unique(front[:, None] + steps)
        front = around[left[around]]
        left[front], reached[front] = False, True
    return reached.reshape(-1, width)[1:-1, 1:-1]

"""Control images as they are given: checked, converted, brought to size, and named by their pixels."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ControlImage = Image.Image | Tensor
"""A picture, or a tensor (3, height, width) or (1, height, width) in [0, 1]."""

NEAREST_TYPES = ("palette",)
"""Control types whose colours stand for classes: between two there is no third."""
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
_BLACK = (0, 0, 0)


def control_batch(
    images: ControlImage | Sequence[ControlImage], *, height: int, width: int, control_type: str | None = None
) -> Tensor:
    """Return control images (n, 3, height, width) in [0, 1]: RGB, what is transparent is black.

    They are resized where they are of the same proportions; a palette without new colours between its own.
    A tensor may hold several: (n, 3, h, w).

    Raises:
        ValueError: an image has other proportions, values out of range, or a mode of more than 8 bits.
    """
    resampling = resampling_of(control_type)
    pictures = [as_picture(image) for image in listed_images(images)]
    for picture in pictures:
        check_shape(picture, width=width, height=height)
    fitted = [
        picture if picture.size == (width, height) else picture.resize((width, height), resampling)
        for picture in pictures
    ]
    arrays = np.stack([np.asarray(picture) for picture in fitted])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous().float() / 255


def check_shape(picture: Image.Image, *, width: int, height: int) -> None:
    """Check that a control image has the proportions of the picture (px) that follows it.

    Raises:
        ValueError: it has others.
    """
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
    """Return control images one by one.

    Raises:
        ValueError: there is none.
    """
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
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*_BLACK, 255)), layer).convert("RGB")
    return image.convert("RGB")


def control_image_sha256(image: ControlImage) -> str:
    """Return the SHA-256 of a control image's size and RGB pixels as given; 64 hexadecimal digits.

    A picture and the tensor of its values have the same.
    """
    picture = as_picture(image)
    return hashlib.sha256(f"{picture.width}x{picture.height}:".encode() + picture.tobytes()).hexdigest()


def _picture_of(image: Tensor) -> Image.Image:
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
        raise ValueError(
            f"found a control image of shape {tuple(image.shape)}; use (3, height, width) or "
            "(1, height, width)"
        )
    values = image.detach().to("cpu", torch.float32)
    if not bool(((values >= 0) & (values <= 1)).all()):
        low, high = values.min().item(), values.max().item()
        raise ValueError(f"found a control image with values from {low:g} to {high:g}; use 0 to 1")
    array = (values.expand(3, -1, -1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array)

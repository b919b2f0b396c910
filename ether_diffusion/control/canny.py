"""Canny's edges (Canny 1986), value for value as OpenCV draws them, which control models are trained with.

scikit-image blurs first and has other thresholds; OpenCV is 60 MB for this one function.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.uint8]
_Integers = NDArray[np.int64]

_TAN_SHIFT = 15
_TAN_22 = round((2**0.5 - 1) * 2**_TAN_SHIFT)
"""tan(22.5°) in fixed point; tan(67.5°) is two more."""


def draw_edges(photo: Image.Image, low_threshold: float, high_threshold: float) -> Image.Image:
    """Return the edges of a photo, white on black; both are of mode RGB."""
    return Image.fromarray(canny(np.asarray(photo), low_threshold, high_threshold)).convert("RGB")


def canny(picture: Array, low_threshold: float, high_threshold: float) -> Array:
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


def _peaks(across: _Integers, down: _Integers, strength: _Integers) -> NDArray[np.bool_]:
    """Say where the gradient is largest along its own direction, which is one of four."""
    framed = np.pad(strength, 1)
    height, width = strength.shape

    def beside(y: int, x: int) -> _Integers:
        return framed[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    width_at_22 = np.abs(across) * _TAN_22
    steep = np.abs(down) << _TAN_SHIFT
    is_across = steep < width_at_22
    is_down = steep > width_at_22 + (np.abs(across) << _TAN_SHIFT + 1)
    rises = (across ^ down) < 0  # the gradient points to the upper right or the lower left
    # one comparison of each pair lets equals pass, so that of two equal pixels one is kept
    straight = np.where(
        is_across,
        (strength > beside(0, -1)) & (strength >= beside(0, 1)),
        (strength > beside(-1, 0)) & (strength >= beside(1, 0)),
    )
    slanted = np.where(
        rises,
        (strength > beside(-1, 1)) & (strength > beside(1, -1)),
        (strength > beside(-1, -1)) & (strength > beside(1, 1)),
    )
    return np.where(is_across | is_down, straight, slanted)


def _joined(seeds: NDArray[np.bool_], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pixels of the mask that are joined to a seed within it, also by corners."""
    left = np.pad(mask & ~seeds, 1).ravel()
    width = mask.shape[1] + 2
    steps = np.array([y * width + x for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)])
    reached = np.pad(seeds, 1).ravel()
    front = np.flatnonzero(reached)
    while len(front):
        around = np.unique(front[:, None] + steps)
        front = around[left[around]]
        left[front] = False
        reached[front] = True
    return reached.reshape(-1, width)[1:-1, 1:-1]

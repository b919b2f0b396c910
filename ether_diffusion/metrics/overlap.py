"""What control maps expect of each pixel, and how far two maps agree: IoU, accuracy, and F1 of edges.

Counts are kept by picture, since the errors of their ratios are found by leaving out one group at a time;
torchmetrics keeps sums alone.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.control.images import as_picture
from ether_diffusion.control.palette import Palette
from ether_diffusion.metrics.likeness import Estimate
from ether_diffusion.wording import listed

IGNORED = -1
"""The class of a pixel of which a control map says nothing."""
SILHOUETTE_CLASSES = ("background", "object")
_BLACK = (0, 0, 0)
_PACKING = np.array([1 << 16, 1 << 8, 1])
"""Times a colour, one number that no other colour has."""


def check_classes(palette: Palette, classes: Sequence[str]) -> None:
    """Refuse a palette of classes that a segmenter does not find.

    Raises:
        ValueError: it has some; they are named.
    """
    unknown = sorted(set(palette.classes) - set(classes))
    if unknown:
        raise ValueError(
            f"{palette.name} has {listed(unknown)}, which the segmenter does not know; use its labels, as "
            f"{', '.join(list(classes)[:3])}"
        )


def classes_of(image: Image.Image, palette: Palette, classes: Sequence[str]) -> Tensor:
    """Return the index in `classes` of each pixel (height, width) of a map in a palette's colours.

    Black means that nothing is known, unless it is a class's colour: `IGNORED`.

    Raises:
        ValueError: the map has colours that are not the palette's; the message follows its name.
    """
    numbers = [classes.index(name) for name in palette.classes]
    if _BLACK not in palette.colours:
        numbers.append(IGNORED)
        palette = replace(palette, classes=(*palette.classes, ""), colours=(*palette.colours, _BLACK))
    pixels = np.asarray(palette.snap(as_picture(image)), dtype=np.int64) @ _PACKING
    number_of = dict(zip(np.array(palette.colours) @ _PACKING, numbers, strict=True))
    colours, places = np.unique(pixels, return_inverse=True)
    return torch.tensor([number_of[colour] for colour in colours])[places.reshape(pixels.shape)]


def silhouette_of(image: Image.Image) -> Tensor:
    """Return the index in `SILHOUETTE_CLASSES` of each pixel (height, width): white is the object."""
    light = np.asarray(as_picture(image).convert("L"), dtype=np.int64)
    return torch.from_numpy((light >= 128).astype(np.int64))


def scaled_map(classes: Tensor, width: int, height: int) -> Tensor:
    """Bring a map (h, w) of whole numbers or truths to a size in px, each pixel from the nearest."""
    if classes.shape == (height, width):
        return classes
    rows = ((torch.arange(height) + 0.5) * classes.shape[0] / height).long()
    columns = ((torch.arange(width) + 0.5) * classes.shape[1] / width).long()
    return classes[rows][:, columns]


def confusion(expected: Tensor, found: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each expected (row) and found (column) class: (num_classes, num_classes), int64.

    Both are maps of one shape with whole numbers from 0; where `expected` is `IGNORED` nothing is counted.

    Raises:
        ValueError: the maps are of different shapes, or have other numbers.
    """
    if expected.shape != found.shape:
        raise ValueError(
            f"found maps of the shapes {tuple(expected.shape)} and {tuple(found.shape)}; give two of one size"
        )
    known = expected != IGNORED
    rows, columns = expected[known].long(), found[known].long()
    for values in (rows, columns):
        if values.numel() and not bool(((values >= 0) & (values < num_classes)).all()):
            raise ValueError(
                f"found classes from {int(values.min())} to {int(values.max())}; there are {num_classes}"
            )
    counts = torch.bincount(rows * num_classes + columns, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def class_ious(counts: Tensor) -> Tensor:
    """Return |A ∩ B| / |A ∪ B| of each class (num_classes), NaN where it is in neither map."""
    both = counts.diagonal().double()
    return both / (counts.sum(0) + counts.sum(1) - counts.diagonal())


def mean_iou(counts: Tensor) -> float:
    """Return the mean IoU over the classes that are in either map, pixels of all pictures together.

    As the benchmarks of semantic segmentation have it: counts are summed over pictures before the ratio.
    """
    return float(class_ious(counts).nanmean())


def object_iou(counts: Tensor) -> float:
    """Return the IoU of the object in counts (2, 2); 1 where there is none in either map."""
    return float(class_ious(counts)[1].nan_to_num(1.0))


def pixel_accuracy(counts: Tensor) -> float:
    """Return the share of pixels whose class is the expected one; NaN without pixels."""
    return float(counts.diagonal().sum().double() / counts.sum())


def edge_overlap(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Return IoU and F1 of two masks of edges (h, w), bool; 1 where neither has any.

    F1 = 2 |A ∩ B| / (|A| + |B|), the harmonic mean of precision and recall.
    """
    both, either = int((expected & found).sum()), int((expected | found).sum())
    return (both / either, 2 * both / (both + either)) if either else (1.0, 1.0)


def pooled(
    counts: Sequence[Tensor], groups: Sequence[Hashable], statistic: Callable[[Tensor], float]
) -> Estimate:
    """Return a statistic of summed counts, with its standard error by leaving out one group at a time.

    With θ_g the statistic without group g of G: SE² = (G − 1) / G · Σ (θ_g − mean θ)², the jackknife (Efron
    and Stein 1981). For a mean over groups of one size it is that of `estimate`.

    Raises:
        ValueError: there are no counts, or not a group for each.
    """
    if not counts:
        raise ValueError("found no maps to compare")
    by_group: dict[Hashable, Tensor] = {}
    for each, group in zip(counts, groups, strict=True):
        by_group[group] = by_group[group] + each if group in by_group else each
    total = torch.stack(list(by_group.values())).sum(0)
    value, num_groups = statistic(total), len(by_group)
    if num_groups == 1:
        return Estimate(value, None, len(counts), 1)
    without = [statistic(total - each) for each in by_group.values()]
    mean = math.fsum(without) / num_groups
    squares = math.fsum((each - mean) ** 2 for each in without)
    error = math.sqrt((num_groups - 1) / num_groups * squares)
    return Estimate(value, error, len(counts), num_groups)

"""What is where in a picture: maps of classes, from control images and segmenters, and how far two agree.

Counts are kept by picture, since the errors of their ratios are found by leaving out one group at a time;
torchmetrics keeps sums alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from ether_diffusion.control.images import as_picture
from ether_diffusion.control.palette import Palette
from ether_diffusion.metrics.encoders import BATCH_SIZE, is_tiny_world, load_whole, read_model_type
from ether_diffusion.tiny_world import ALIAS, WEIGHTS_FOLDER
from ether_diffusion.tiny_world.networks import load_segmenter
from ether_diffusion.tiny_world.pictures import at_native_size
from ether_diffusion.tiny_world.world import CLASSES, OBJECT_CLASSES, PALETTE
from ether_diffusion.wording import listed, printable

IGNORED = -1
"""The class of a pixel of which a control map says nothing."""
_BLACK = (0, 0, 0)
_PACKING = np.array([1 << 16, 1 << 8, 1])
"""Times a colour, one number that no other colour has."""


@dataclass(frozen=True)
class ClassFinder:
    """A network that names the class of each pixel; `source` says where it came from.

    `things` are the classes of what stands before a background; empty where that is not known. `find_classes`
    returns the index in `classes` of each pixel (height, width) of each picture, at its own size.
    """

    source: str
    classes: Sequence[str]
    things: frozenset[str]
    find_classes: Callable[[Sequence[Image.Image]], list[Tensor]]


def load_finder(
    name: str, *, device: torch.device | None = None, batch_size: int = BATCH_SIZE
) -> ClassFinder:
    """Load a segmenter by name: "tiny_world", or the folder or hub id of one of transformers.

    Raises:
        FileNotFoundError: it is not here, and the Hub does not give it.
        ValueError: it is no model of semantic segmentation, or lacks weights.
    """
    if is_tiny_world(name):
        segmenter = load_segmenter(WEIGHTS_FOLDER)

        def find_tiny(pictures: Sequence[Image.Image]) -> list[Tensor]:
            maps = segmenter.segment(at_native_size(pictures), batch_size=batch_size)
            return [scaled_map(found, *each.size) for found, each in zip(maps, pictures, strict=True)]

        return ClassFinder(ALIAS, CLASSES, frozenset(OBJECT_CLASSES), find_tiny)
    read_model_type(name, "segmenter", [ALIAS], offline=False)
    try:
        model = load_whole(AutoModelForSemanticSegmentation, name, "segmenter", device=device, offline=False)
        processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        reason = printable(str(error).strip().split("\n")[0], 300)
        raise ValueError(
            f"{printable(name)} is no whole model of semantic segmentation, as UperNet or SegFormer are "
            f"({reason})"
        ) from error

    @torch.no_grad()
    def find(pictures: Sequence[Image.Image]) -> list[Tensor]:
        found: list[Tensor] = []
        for start in range(0, len(pictures), batch_size):
            part = [each.convert("RGB") for each in pictures[start : start + batch_size]]
            pixels = processor(images=part, return_tensors="pt").pixel_values
            logits = model(pixel_values=pixels.to(model.device, torch.float32)).logits.cpu()
            for row, picture in zip(logits, part, strict=True):
                size = (picture.height, picture.width)
                larger = F.interpolate(row[None], size=size, mode="bilinear", align_corners=False)
                found.append(larger[0].argmax(0))
        return found

    labels = model.config.id2label
    return ClassFinder(name, [str(labels[number]) for number in range(len(labels))], frozenset(), find)


def tiny_palette() -> Palette:
    """Return the colours of Tiny World's classes."""
    return Palette("the palette of Tiny World", tuple(PALETTE), tuple(PALETTE.values()))


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
    """Return of each pixel (height, width) 1 where it is the object's, which is white, else 0."""
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
    """
    known = expected != IGNORED
    pairs = expected[known].long() * num_classes + found[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


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

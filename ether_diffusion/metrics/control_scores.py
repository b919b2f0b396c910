"""Does a picture follow its control image? Classes and edges over each other, and distances to the photos."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.control.detectors import Detector
from ether_diffusion.control.palette import Palette
from ether_diffusion.metrics.control_maps import (
    SILHOUETTE_CLASSES,
    classes_of,
    edges_of,
    silhouette_of,
)
from ether_diffusion.metrics.encoders import Encoder
from ether_diffusion.metrics.frechet import find_obstacle, frechet_distance
from ether_diffusion.metrics.landmarks import FaceFinder, landmark_distances
from ether_diffusion.metrics.likeness import Estimate, estimate
from ether_diffusion.metrics.overlap import (
    IGNORED,
    confusion,
    edge_overlap,
    mean_iou,
    pixel_accuracy,
    pooled,
    scaled_map,
)
from ether_diffusion.metrics.scoring import Scores
from ether_diffusion.metrics.segmenters import ClassFinder

MIOU, ACCURACY, OBJECT_IOU = "miou", "accuracy", "object_iou"
CANNY_IOU, CANNY_F1, LANDMARKS = "canny_iou", "canny_f1", "landmark_distance"
PALETTE, SILHOUETTE, CANNY = "palette", "silhouette", "canny"


@dataclass(frozen=True)
class ControlPair:
    """A photo, the control image that belongs to it, and its caption.

    Errors of scores are over `group`: pairs of one group, as of one concept, are not independent.
    """

    name: str
    photo: Image.Image
    control: Image.Image
    prompt: str
    group: Hashable


@dataclass(frozen=True)
class ControlYardsticks:
    """What following is measured with; `left_out` says of what there is not, by column, why.

    `palette` has the colours of classes, where control images of the type "palette" are to be read.
    """

    control_type: str | None
    finder: ClassFinder | None = None
    palette: Palette | None = None
    encoders: Sequence[Encoder] = ()
    faces: FaceFinder | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)


def score_control(
    pictures: Sequence[Image.Image], pairs: Sequence[ControlPair], yardsticks: ControlYardsticks
) -> Scores:
    """Score pictures against the control images that they were drawn from, and against the photos.

    `miou`, `accuracy`: of the classes that a segmenter finds in the picture, against those of a palette or a
    silhouette; `object_iou`: of the object whatever its class. `canny_iou`, `canny_f1`: of the edges of the
    picture against those of the photo, or the control image where it shows edges. `landmark_distance`: px
    between landmarks of faces. Sets have Fréchet distances to the photos.

    Raises:
        ValueError: not a pair for each picture, or a map cannot be read.
    """
    if len(pictures) != len(pairs):
        raise ValueError(f"found {len(pictures)} pictures and {len(pairs)} control images; give as many")
    groups = [pair.group for pair in pairs]
    columns = _class_columns(pictures, pairs, yardsticks) if yardsticks.finder is not None else {}
    columns |= _edge_columns(pictures, pairs, yardsticks.control_type)
    left_out = dict(yardsticks.left_out)
    if yardsticks.faces is not None:
        distances = landmark_distances(yardsticks.faces, [pair.photo for pair in pairs], pictures)
        there = [index for index, each in enumerate(distances) if each is not None]
        if there:
            values = [distances[index] or 0.0 for index in there]
            columns[LANDMARKS] = estimate(values, [groups[index] for index in there])
        else:
            left_out[LANDMARKS] = "no photo and its picture both have a face"
    sets = {}
    for encoder in yardsticks.encoders:
        obstacle = find_obstacle(len(pairs), len(pictures), encoder.size)
        if obstacle is not None:
            left_out[f"fid_{encoder.kind}"] = obstacle
            continue
        photos = encoder.embed_images([pair.photo for pair in pairs])
        sets[f"fid_{encoder.kind}"] = frechet_distance(photos, encoder.embed_images(pictures))
    return Scores(columns, {}, sets, left_out)


def expected_classes(pair: ControlPair, yardsticks: ControlYardsticks) -> Tensor:
    """Return what a pair's control image expects (height, width): indices of the segmenter's classes.

    A silhouette's are those of `SILHOUETTE_CLASSES`.

    Raises:
        ValueError: the control image cannot be read as its type.
    """
    if yardsticks.control_type == SILHOUETTE:
        return silhouette_of(pair.control)
    assert yardsticks.finder is not None
    assert yardsticks.palette is not None
    try:
        return classes_of(pair.control, yardsticks.palette, yardsticks.finder.classes)
    except ValueError as error:
        raise ValueError(f"the control image of {pair.name} {error}") from None


def _class_columns(
    pictures: Sequence[Image.Image], pairs: Sequence[ControlPair], yardsticks: ControlYardsticks
) -> dict[str, Estimate]:
    finder = yardsticks.finder
    assert finder is not None
    groups = [pair.group for pair in pairs]
    expected = [
        scaled_map(expected_classes(pair, yardsticks), *picture.size)
        for pair, picture in zip(pairs, pictures, strict=True)
    ]
    found = finder.find_classes(pictures)
    things = torch.tensor([name in finder.things for name in finder.classes])
    shapes = [things[each].long() for each in found]
    if yardsticks.control_type == SILHOUETTE:
        wanted, found, num_classes = expected, shapes, len(SILHOUETTE_CLASSES)
    else:
        wanted, num_classes = [_things_of(each, things) for each in expected], len(finder.classes)
    counts = [confusion(a, b, num_classes) for a, b in zip(expected, found, strict=True)]
    columns = {
        MIOU: pooled(counts, groups, mean_iou),
        ACCURACY: pooled(counts, groups, pixel_accuracy),
    }
    if bool(things.any()):
        overlaps = [_object_counts(a, b) for a, b in zip(wanted, shapes, strict=True)]
        columns[OBJECT_IOU] = pooled(overlaps, groups, _object_iou)
    return columns


def _things_of(classes: Tensor, things: Tensor) -> Tensor:
    """Return 1 for the pixels of things, 0 for those of the background, and what is ignored as it is."""
    known = classes != IGNORED
    return torch.where(known, things[classes.clamp(min=0)].long(), classes)


def _object_counts(expected: Tensor, found: Tensor) -> Tensor:
    return confusion(expected, found, 2)


def _object_iou(counts: Tensor) -> float:
    """Return |A ∩ B| / |A ∪ B| of the object in counts (2, 2); 1 where there is none in either."""
    either = counts.sum() - counts[0, 0]
    return float(counts[1, 1].double() / either) if either else 1.0


def canny_edges(picture: Image.Image) -> Tensor:
    """Return a picture's edges, bool (height, width).

    With thresholds 100 and 200, as in OFT's evaluation (Qiu et al. 2023, arXiv:2306.07280).
    """
    edges = Detector(CANNY, 100, 200).draw(picture.convert("RGB"), None)
    return torch.from_numpy(np.asarray(edges.convert("L")) > 0)


def _edge_columns(
    pictures: Sequence[Image.Image], pairs: Sequence[ControlPair], control_type: str | None
) -> dict[str, Estimate]:
    values = []
    for pair, picture in zip(pairs, pictures, strict=True):
        if control_type == CANNY:
            wanted = scaled_map(edges_of(pair.control), *picture.size)
        else:
            wanted = canny_edges(_fitted(pair.photo, picture.size))
        values.append(edge_overlap(wanted, canny_edges(picture)))
    groups = [pair.group for pair in pairs]
    ious, f1s = zip(*values, strict=True)
    return {CANNY_IOU: estimate(ious, groups), CANNY_F1: estimate(f1s, groups)}


def _fitted(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    return photo if photo.size == size else photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)

"""Does a picture follow its control image? Classes and edges over each other, and distances to the photos.

Counts are kept by picture, since the errors of their ratios are found by leaving out one group at a time;
torchmetrics keeps sums alone.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModelForSemanticSegmentation

from ether_diffusion.control.detectors import Detector
from ether_diffusion.control.images import as_picture
from ether_diffusion.control.palette import Palette
from ether_diffusion.metrics.encoders import BATCH_SIZE, Encoder, load_whole, read_model_type
from ether_diffusion.metrics.scores import Estimate, Scores, estimate, frechet_distance, pooled
from ether_diffusion.tiny_world import ALIAS, WEIGHTS_FOLDER, world
from ether_diffusion.tiny_world.networks import load_segmenter
from ether_diffusion.tiny_world.pictures import at_native_size
from ether_diffusion.wording import listed

IGNORED = -1
"""The class of a pixel of which a control map says nothing."""
_BLACK = (0, 0, 0)
_PACKING = np.array([1 << 16, 1 << 8, 1])  # times a colour, one number that no other colour has


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
    """Load a segmenter by name, "tiny_world", or the folder or hub id of one of transformers.

    What is not here is a FileNotFoundError, what is no whole model of semantic segmentation a ValueError.
    """
    if read_model_type(name, "segmenter", [ALIAS]) == "tiny":
        segmenter = load_segmenter(WEIGHTS_FOLDER)

        def find_tiny(pictures: Sequence[Image.Image]) -> list[Tensor]:
            maps = segmenter.segment(at_native_size(pictures), batch_size=batch_size)
            return [scaled_map(found, *each.size) for found, each in zip(maps, pictures, strict=True)]

        return ClassFinder(ALIAS, world.CLASSES, frozenset(world.OBJECT_CLASSES), find_tiny)
    model, processor = load_whole(AutoModelForSemanticSegmentation, name, "segmenter", device=device)

    @torch.no_grad()
    def find(pictures: Sequence[Image.Image]) -> list[Tensor]:
        found: list[Tensor] = []
        for start in range(0, len(pictures), batch_size):
            part = [each.convert("RGB") for each in pictures[start : start + batch_size]]
            pixels = processor(images=part, return_tensors="pt").pixel_values
            logits = model(pixel_values=pixels.to(model.device, torch.float32)).logits.cpu()
            for row, (width, height) in zip(logits, (each.size for each in part), strict=True):
                larger = F.interpolate(row[None], size=(height, width), mode="bilinear", align_corners=False)
                found.append(larger[0].argmax(0))
        return found

    labels = model.config.id2label
    return ClassFinder(name, [str(labels[number]) for number in range(len(labels))], frozenset(), find)


def tiny_palette() -> Palette:
    """Return the colours of Tiny World's classes."""
    return Palette("the palette of Tiny World", tuple(world.PALETTE), tuple(world.PALETTE.values()))


def check_classes(palette: Palette, classes: Sequence[str]) -> None:
    """Refuse a palette of classes that a segmenter does not find."""
    unknown = sorted(set(palette.classes) - set(classes))
    if unknown:
        needed = f"use its labels, as {', '.join(list(classes)[:3])}"
        raise ValueError(f"{palette.name} has {listed(unknown)}, which the segmenter does not know; {needed}")


def classes_of(image: Image.Image, palette: Palette, classes: Sequence[str]) -> Tensor:
    """Return the index in `classes` of each pixel (height, width) of a map in a palette's colours.

    Black means that nothing is known, unless it is a class's colour: `IGNORED`. Colours that are not the
    palette's are a ValueError, which follows the map's name.
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
    return torch.from_numpy((np.asarray(as_picture(image).convert("L")) >= 128).astype(np.int64))


def scaled_map(classes: Tensor, width: int, height: int) -> Tensor:
    """Bring a map (h, w) of whole numbers or truths to a size in px, each pixel from the nearest."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * old / new).long()
        for new, old in zip((height, width), classes.shape, strict=True)
    )
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
    """Return the mean IoU over the classes in either map, counts summed over pictures before the ratio."""
    return float(class_ious(counts).nanmean())


def object_iou(counts: Tensor) -> float:
    """Return the IoU of the object in counts (2, 2); 1 where there is none in either map."""
    return float(class_ious(counts)[1].nan_to_num(1.0))


def pixel_accuracy(counts: Tensor) -> float:
    """Return the share of pixels whose class is the expected one; NaN without pixels."""
    return float(counts.diagonal().sum().double() / counts.sum())


def edge_overlap(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Return IoU and F1 = 2 |A ∩ B| / (|A| + |B|) of two masks of edges (h, w); 1 where both are empty."""
    both, either = int((expected & found).sum()), int((expected | found).sum())
    return (both / either, 2 * both / (both + either)) if either else (1.0, 1.0)


MIOU, ACCURACY, OBJECT_IOU = "miou", "accuracy", "object_iou"
CANNY_IOU, CANNY_F1, LANDMARKS = "canny_iou", "canny_f1", "landmark_distance"
PALETTE, SILHOUETTE, CANNY = "palette", "silhouette", "canny"

FaceFinder = Callable[[Image.Image], list[Tensor]]
"""Returns the landmarks (num_landmarks, 2) of each face in a picture, x and y in px."""


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
    """
    groups, photos = [pair.group for pair in pairs], [pair.photo for pair in pairs]
    finder, columns = yardsticks.finder, dict[str, Estimate]()
    if finder is not None:
        columns = _class_columns(pictures, pairs, yardsticks, finder)
    edges = [
        edge_overlap(_edges_of(pair, picture.size, yardsticks.control_type), canny_edges(picture))
        for pair, picture in zip(pairs, pictures, strict=True)
    ]
    for column, values in zip((CANNY_IOU, CANNY_F1), zip(*edges, strict=True), strict=True):
        columns[column] = estimate(values, groups)
    left_out = dict(yardsticks.left_out)
    if yardsticks.faces is not None:
        distances = landmark_distances(yardsticks.faces, photos, pictures)
        there = {k: each for k, each in enumerate(distances) if each is not None}
        if there:
            columns[LANDMARKS] = estimate(list(there.values()), [groups[k] for k in there])
        else:
            left_out[LANDMARKS] = "no photo and its picture both have a face"
    return Scores(columns, left_out=left_out).with_distances(
        {
            encoder.kind: frechet_distance(encoder.embed_images(photos), encoder.embed_images(pictures))
            for encoder in yardsticks.encoders
        }
    )


def expected_classes(pair: ControlPair, yardsticks: ControlYardsticks) -> Tensor:
    """Return what a pair's control image expects (height, width): indices of the segmenter's classes.

    Of a silhouette 1 for the object and 0 for what is behind it. ValueError where it is not of its type.
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
    pictures: Sequence[Image.Image],
    pairs: Sequence[ControlPair],
    yardsticks: ControlYardsticks,
    finder: ClassFinder,
) -> dict[str, Estimate]:
    groups = [pair.group for pair in pairs]
    expected = [
        scaled_map(expected_classes(pair, yardsticks), *picture.size)
        for pair, picture in zip(pairs, pictures, strict=True)
    ]
    found, num_classes = finder.find_classes(pictures), len(finder.classes)
    things = torch.tensor([name in finder.things for name in finder.classes])
    shapes = [things[each].long() for each in found]
    if yardsticks.control_type == SILHOUETTE:
        wanted, found, num_classes = expected, shapes, 2
    else:
        wanted = [torch.where(each == IGNORED, each, things[each.clamp(min=0)].long()) for each in expected]
    counts = [confusion(a, b, num_classes) for a, b in zip(expected, found, strict=True)]
    columns = {MIOU: pooled(counts, groups, mean_iou), ACCURACY: pooled(counts, groups, pixel_accuracy)}
    if bool(things.any()):
        overlaps = [confusion(a, b, 2) for a, b in zip(wanted, shapes, strict=True)]
        columns[OBJECT_IOU] = pooled(overlaps, groups, object_iou)
    return columns


def canny_edges(picture: Image.Image) -> Tensor:
    """Return a picture's edges, bool (height, width), as OFT's evaluation finds them (2306.07280)."""
    edges = Detector(CANNY, 100, 200).draw(picture.convert("RGB"), None)
    return torch.from_numpy(np.asarray(edges.convert("L")) > 0)


def _edges_of(pair: ControlPair, size: tuple[int, int], control_type: str | None) -> Tensor:
    if control_type == CANNY:
        return scaled_map(silhouette_of(pair.control) == 1, *size)
    return canny_edges(_fitted(pair.photo.convert("RGB"), size))


def _fitted(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    return photo if photo.size == size else photo.resize(size, Image.Resampling.LANCZOS)


def load_face_finder(*, device: torch.device | None = None) -> FaceFinder:
    """Load face-alignment, which fetches its weights: the 68 landmarks of Bulat and Tzimiropoulos 2017."""
    if find_spec("face_alignment") is None:
        raise ValueError(
            "landmarks of faces need face-alignment, which is not installed; "
            "pip install 'ether-diffusion[landmarks]'"
        )
    import face_alignment  # type: ignore[import-not-found, unused-ignore]

    network = face_alignment.FaceAlignment(face_alignment.LandmarksType.TWO_D, device=str(device or "cpu"))

    def find_faces(picture: Image.Image) -> list[Tensor]:
        found = network.get_landmarks_from_image(np.asarray(picture.convert("RGB")))
        return [torch.as_tensor(face, dtype=torch.float64) for face in found or []]

    return find_faces


def landmark_distances(
    find_faces: FaceFinder, photos: Sequence[Image.Image], pictures: Sequence[Image.Image]
) -> list[float | None]:
    """Return for each photo and its picture the mean distance of landmarks in px of the picture.

    Of several faces the largest counts. None where either has no face: OFT's error says how far faces are
    off, not how many are missing.
    """
    found: list[float | None] = []
    for photo, picture in zip(photos, pictures, strict=True):
        faces = [find_faces(each) for each in (_fitted(photo, picture.size), picture)]
        pair = [max(each, key=lambda face: float(np.ptp(face.numpy(), 0).prod())) for each in faces if each]
        found.append(float((pair[0] - pair[1]).norm(dim=1).mean()) if len(pair) == 2 else None)
    return found

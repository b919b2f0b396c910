"""Does a picture follow its control image? Classes and edges over each other, and distances to the photos."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.control.detectors import Detector
from ether_diffusion.control.palette import Palette
from ether_diffusion.metrics.encoders import Encoder
from ether_diffusion.metrics.likeness import Estimate, estimate, frechet_distance, frechet_obstacle, pooled
from ether_diffusion.metrics.overlap import (
    IGNORED,
    ClassFinder,
    classes_of,
    confusion,
    edge_overlap,
    mean_iou,
    object_iou,
    pixel_accuracy,
    scaled_map,
    silhouette_of,
)
from ether_diffusion.metrics.scores import Scores

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

    Raises:
        ValueError: a map cannot be read.
    """
    groups, photos = [pair.group for pair in pairs], [pair.photo for pair in pairs]
    columns = _class_columns(pictures, pairs, yardsticks) if yardsticks.finder is not None else {}
    ious, f1s = zip(
        *(
            edge_overlap(_edges_of(pair, picture.size, yardsticks.control_type), canny_edges(picture))
            for pair, picture in zip(pairs, pictures, strict=True)
        ),
        strict=True,
    )
    columns |= {CANNY_IOU: estimate(ious, groups), CANNY_F1: estimate(f1s, groups)}
    left_out = dict(yardsticks.left_out)
    if yardsticks.faces is not None:
        distances = landmark_distances(yardsticks.faces, photos, pictures)
        there = [(each, group) for each, group in zip(distances, groups, strict=True) if each is not None]
        if there:
            columns[LANDMARKS] = estimate([each for each, _ in there], [group for _, group in there])
        else:
            left_out[LANDMARKS] = "no photo and its picture both have a face"
    sets = {}
    for encoder in yardsticks.encoders:
        column, obstacle = f"fid_{encoder.kind}", frechet_obstacle(len(pairs), len(pictures), encoder.size)
        if obstacle is None:
            sets[column] = frechet_distance(encoder.embed_images(photos), encoder.embed_images(pictures))
        else:
            left_out[column] = obstacle
    return Scores(columns, {}, sets, left_out)


def expected_classes(pair: ControlPair, yardsticks: ControlYardsticks) -> Tensor:
    """Return what a pair's control image expects (height, width): indices of the segmenter's classes.

    Of a silhouette 1 for the object and 0 for what is behind it.

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
    found, num_classes = finder.find_classes(pictures), len(finder.classes)
    things = torch.tensor([name in finder.things for name in finder.classes])
    shapes = [things[each].long() for each in found]
    if yardsticks.control_type == SILHOUETTE:
        wanted, found, num_classes = expected, shapes, 2
    else:
        wanted = [
            torch.where(each == IGNORED, IGNORED, things[each.clamp(min=0)].long()) for each in expected
        ]
    counts = [confusion(a, b, num_classes) for a, b in zip(expected, found, strict=True)]
    columns = {MIOU: pooled(counts, groups, mean_iou), ACCURACY: pooled(counts, groups, pixel_accuracy)}
    if bool(things.any()):
        overlaps = [confusion(a, b, 2) for a, b in zip(wanted, shapes, strict=True)]
        columns[OBJECT_IOU] = pooled(overlaps, groups, object_iou)
    return columns


def canny_edges(picture: Image.Image) -> Tensor:
    """Return a picture's edges, bool (height, width).

    With thresholds 100 and 200, as in OFT's evaluation (Qiu et al. 2023, arXiv:2306.07280).
    """
    edges = Detector(CANNY, 100, 200).draw(picture.convert("RGB"), None)
    return torch.from_numpy(np.asarray(edges.convert("L")) > 0)


def _edges_of(pair: ControlPair, size: tuple[int, int], control_type: str | None) -> Tensor:
    if control_type == CANNY:
        return scaled_map(silhouette_of(pair.control) == 1, *size)
    return canny_edges(_fitted(pair.photo.convert("RGB"), size))


def _fitted(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    return photo if photo.size == size else photo.resize(size, Image.Resampling.LANCZOS)


def load_face_finder(*, device: torch.device | None = None) -> FaceFinder:
    """Load face-alignment, whose weights it fetches itself.

    It finds the 68 landmarks of Bulat and Tzimiropoulos 2017, which OFT's evaluation takes.

    Raises:
        ValueError: it is not installed.
    """
    if find_spec("face_alignment") is None:
        raise ValueError(
            "landmarks of faces need face-alignment, which is not installed; "
            "pip install 'ether-diffusion[landmarks]'"
        )
    import face_alignment  # type: ignore[import-not-found, unused-ignore]

    kind = face_alignment.LandmarksType.TWO_D
    network = face_alignment.FaceAlignment(kind, device=str(device or "cpu"))

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

    def largest(faces: list[Tensor]) -> Tensor:
        return max(faces, key=lambda face: float((face.amax(0) - face.amin(0)).prod()))

    found: list[float | None] = []
    for photo, picture in zip(photos, pictures, strict=True):
        faces, drawn = find_faces(_fitted(photo, picture.size)), find_faces(picture)
        there = faces and drawn
        found.append(float((largest(faces) - largest(drawn)).norm(dim=1).mean()) if there else None)
    return found

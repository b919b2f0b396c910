"""Landmarks of faces in photos and in pictures, and how far they are apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NEEDS_FACE_ALIGNMENT = (
    "landmarks of faces need face-alignment, which is not installed; pip install 'ether-diffusion[landmarks]'"
)


class FaceFinder(Protocol):
    """What finds the landmarks of faces."""

    def find_faces(self, picture: Image.Image) -> list[Tensor]:
        """Return the landmarks (num_landmarks, 2) of each face, x and y in px."""


@dataclass(frozen=True)
class FaceAlignment:
    """The 68 landmarks of Bulat and Tzimiropoulos 2017, which OFT's evaluation takes."""

    network: Any

    def find_faces(self, picture: Image.Image) -> list[Tensor]:
        """Return the landmarks (68, 2) of each face, x and y in px."""
        found = self.network.get_landmarks_from_image(np.asarray(picture.convert("RGB")))
        return [torch.as_tensor(face, dtype=torch.float64) for face in found or []]


def load_face_finder(*, device: torch.device | None = None) -> FaceFinder:
    """Load face-alignment, whose weights it fetches itself.

    Raises:
        ValueError: it is not installed.
    """
    if find_spec("face_alignment") is None:
        raise ValueError(NEEDS_FACE_ALIGNMENT)
    import face_alignment  # type: ignore[import-not-found, unused-ignore]

    kind = face_alignment.LandmarksType.TWO_D
    return FaceAlignment(face_alignment.FaceAlignment(kind, device=str(device or "cpu")))


def landmark_distances(
    finder: FaceFinder, photos: Sequence[Image.Image], pictures: Sequence[Image.Image]
) -> list[float | None]:
    """Return for each photo and its picture the mean distance of landmarks in px of the picture.

    Of several faces the largest counts. None where either has no
    face: OFT's error says how far faces are off, not how many are missing.
    """
    found: list[float | None] = []
    for photo, picture in zip(photos, pictures, strict=True):
        scaled = photo if photo.size == picture.size else photo.resize(picture.size, Image.Resampling.LANCZOS)
        first, second = (_largest(finder.find_faces(each)) for each in (scaled, picture))
        if first is None or second is None:
            found.append(None)
        else:
            found.append(float((first - second).norm(dim=1).mean()))
    return found


def _largest(faces: Sequence[Tensor]) -> Tensor | None:
    """Return the face with the largest box."""
    return max(faces, key=lambda face: float((face.amax(0) - face.amin(0)).prod()), default=None)

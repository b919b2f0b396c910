"""Detectors turn a photo into a control image: canny as OpenCV, the alpha's shape, colours as they are."""

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import photo_files
import pytest
from PIL import Image

from ether_diffusion.control import Detector
from ether_diffusion.control.canny import canny
from ether_diffusion.control.detectors import MODEL_DETECTORS, control_type_of

THRESHOLDS = [(100, 200), (0, 0), (50.7, 99.3), (300, 100), (20, 1000), (1, 3000)]
AUX = """
class Processor:
    def __init__(self, name):
        self.name = name
    def __call__(self, image):
        return image.convert("L").resize((512, 512))
"""


def blobs(seed: int, width: int, height: int, resampling: Image.Resampling) -> np.ndarray:
    coarse = Image.fromarray(photo_files.noise(8, 8, seed))
    return np.asarray(coarse.resize((width, height), resampling))


PICTURES = {
    "one pixel": photo_files.noise(1, 1),
    "a row": photo_files.noise(9, 1),
    "a column": photo_files.noise(1, 9),
    "noise": photo_files.noise(64, 48),
    "grey noise": np.repeat(photo_files.noise(50, 40)[..., :1], 3, axis=-1),
    "smooth": blobs(0, 131, 97, Image.Resampling.BICUBIC),
    "linear": blobs(1, 120, 160, Image.Resampling.BILINEAR),
    "steps": blobs(2, 99, 131, Image.Resampling.NEAREST),
}


@pytest.mark.parametrize("thresholds", THRESHOLDS)
@pytest.mark.parametrize("name", PICTURES)
def test_canny_is_opencvs_value_for_value(name: str, thresholds: tuple[float, float]) -> None:
    picture = PICTURES[name]
    expected = cv2.Canny(np.ascontiguousarray(picture), *thresholds)
    assert np.array_equal(canny(picture, *thresholds), expected)


def test_the_thresholds_reach_canny() -> None:
    photo = Image.fromarray(PICTURES["smooth"])
    few, many = (np.asarray(Detector("canny", low, 2 * low).draw(photo, None)) for low in (60, 15))
    assert 0 < few.sum() < many.sum()


def test_a_silhouette_is_white_where_the_alpha_is_half_or_more() -> None:
    alpha = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    drawn = Detector("silhouette").draw(Image.new("RGB", (16, 16)), alpha)
    assert drawn.mode == "RGB"
    assert np.array_equal(np.asarray(drawn)[..., 1] == 255, np.asarray(alpha) >= 128)
    assert set(np.unique(np.asarray(drawn))) == {0, 255}


def test_an_opaque_photo_has_no_silhouette() -> None:
    with pytest.raises(ValueError, match="no transparent parts to take a silhouette from"):
        Detector("silhouette").draw(Image.new("RGB", (16, 16)), None)


def test_a_map_of_colours_stays_as_it_is_at_any_size() -> None:
    picture = Image.fromarray(PICTURES["steps"])
    assert Detector("palette").draw(picture, None) == picture
    drawn = Detector("palette").draw_at(picture, None, width=198, height=262)
    assert {tuple(c) for c in np.asarray(drawn).reshape(-1, 3)} <= {
        tuple(c) for c in PICTURES["steps"].reshape(-1, 3)
    }


def test_at_another_size_the_lines_are_those_of_the_photo_at_that_size() -> None:
    photo = Image.fromarray(PICTURES["smooth"])
    small = photo.resize((64, 48), Image.Resampling.LANCZOS)
    drawn = Detector("canny").draw_at(photo.resize((128, 96)), None, width=64, height=48)
    again = cv2.Canny(
        np.asarray(photo.resize((128, 96)).resize((64, 48), Image.Resampling.LANCZOS)), 100, 200
    )
    assert drawn.size == small.size
    assert np.array_equal(np.asarray(drawn)[..., 0], again)


def test_a_photo_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="has 32 × 16 px and the picture 16 × 16 px"):
        Detector("canny").draw_at(Image.new("RGB", (32, 16)), None, width=16, height=16)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cany", "there is no detector 'cany'; did you mean canny\\?"),
        ("", "use one of canny, silhouette, palette, depth_leres"),
        (
            "depth_midas",
            "depth_midas needs controlnet-aux; pip install 'ether-diffusion\\[controlnet-aux\\]'",
        ),
    ],
)
def test_a_detector_that_is_not_there_is_a_sentence(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Detector(name)


@pytest.fixture
def aux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for the package controlnet_aux, which needs more than a test can install."""
    (tmp_path / "controlnet_aux").mkdir()
    (tmp_path / "controlnet_aux" / "__init__.py").touch()
    (tmp_path / "controlnet_aux" / "processor.py").write_text(AUX)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("controlnet_aux")]:
        del sys.modules[name]


def test_a_model_of_controlnet_aux_draws_at_the_photos_size(aux: Path) -> None:
    drawn = Detector("depth_midas").draw(Image.fromarray(PICTURES["noise"]), None)
    assert (drawn.mode, drawn.size) == ("RGB", (64, 48))


def test_a_model_that_cannot_be_fetched_is_a_sentence(aux: Path) -> None:
    (aux / "controlnet_aux" / "processor.py").write_text(
        "class Processor:\n    def __init__(self, name):\n        raise OSError('no net')\n"
    )
    with pytest.raises(ValueError, match=r"cannot be had \(no net\); connect to the hub once"):
        Detector("mlsd").draw(Image.new("RGB", (8, 8)), None)


def test_detectors_travel_to_the_workers_of_a_loader() -> None:
    assert pickle.loads(pickle.dumps(Detector("canny", 1, 2))) == Detector("canny", 1, 2)


def test_every_detectors_name_becomes_a_control_type() -> None:
    names = {control_type_of(name) for name in MODEL_DETECTORS}
    assert len(names) == len(MODEL_DETECTORS)
    assert all(name.replace("_", "").isalnum() for name in names)

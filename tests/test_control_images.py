"""Control images of every form, the detectors that draw them, and the palettes of their colours."""

import io
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import photo_files
import pytest
import torch
from PIL import Image

from ether_diffusion.control import Detector, control_batch, control_image_sha256
from ether_diffusion.control.detectors import MODEL_DETECTORS, control_type_of
from ether_diffusion.control.images import canny
from ether_diffusion.control.palette import TOLERANCE, Palette, palette_of, read_palette


def picture(side: int = 8, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def batch(image: object, side: int = 8, control_type: str | None = None) -> torch.Tensor:
    return control_batch(image, height=side, width=side, control_type=control_type)  # type: ignore[arg-type]


def test_pictures_of_the_right_size_keep_their_values_also_in_a_list_or_a_tensor() -> None:
    expected = torch.from_numpy(np.asarray(picture()).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(batch(picture())[0], expected, atol=0, rtol=0)
    stacked = batch([picture(), picture().rotate(90)])
    assert stacked.shape == (2, 3, 8, 8)
    assert torch.equal(batch(stacked), stacked)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_one_channel_becomes_three(mode: str) -> None:
    found = batch(picture(mode=mode))[0]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(batch(found[:1])[0], found)


def test_what_is_transparent_is_black() -> None:
    image = picture().convert("RGBA")
    image.putalpha(Image.new("L", (8, 8), 0))
    assert batch(image).abs().max() == 0


def test_the_colours_of_a_palette_stay_the_same_when_it_is_resized() -> None:
    image = Image.new("RGB", (8, 8), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 3, 8))
    colours = {tuple(c) for c in batch(image, 64, "palette")[0].flatten(1).T.tolist()}
    assert colours == {(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)}
    assert len({tuple(c) for c in batch(image, 64)[0].flatten(1).T.tolist()}) > 2


def test_a_picture_and_its_tensor_have_one_hash_and_another_picture_another() -> None:
    assert control_image_sha256(picture()) == control_image_sha256(batch(picture())[0])
    assert control_image_sha256(picture()) != control_image_sha256(picture().rotate(90))
    flat, tall = Image.new("RGB", (8, 2)), Image.new("RGB", (2, 8))
    assert control_image_sha256(flat) != control_image_sha256(tall)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("RGB", (16, 8)), "has 16 × 8 px and the picture 8 × 8 px; crop it"),
        (Image.new("I;16", (8, 8)), "of mode I;16; save it as 8-bit"),
        (Image.new("F", (8, 8)), "of mode F; save it as 8-bit"),
        (Image.new("CMYK", (8, 8)), "of mode CMYK; save it as 8-bit"),
        ([], "an empty list of control images"),
        (torch.zeros(0, 3, 8, 8), "an empty list of control images"),
        (torch.zeros(4, 8, 8), r"of shape \(4, 8, 8\)"),
        (torch.zeros(8, 8), r"of shape \(8, 8\)"),
        (torch.full((3, 8, 8), 255.0), "values from 255 to 255; use 0 to 1"),
        (torch.full((3, 8, 8), float("nan")), "use 0 to 1"),
        (["drawing.png"], "of type str; give a PIL image or a tensor"),
    ],
)
def test_what_is_no_control_image_of_this_size_is_refused(image: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        batch(image)


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


TWO = palette_of({"sky": [0, 128, 255], "earth": "#804000"}, "the palette two")


def image(*colours: tuple[int, int, int]) -> Image.Image:
    return Image.fromarray(np.array([colours], dtype=np.uint8))


def pixels(picture: Image.Image) -> list[list[int]]:
    found: list[list[int]] = np.asarray(picture).reshape(-1, 3).tolist()
    return found


def test_a_colour_within_the_tolerance_becomes_its_nearest_and_one_beyond_is_refused() -> None:
    assert pixels(TWO.snap(image((TOLERANCE, 128 - TOLERANCE, 250)))) == [[0, 128, 255]]
    with pytest.raises(ValueError, match="has 1 colours off the palette two"):
        TWO.snap(image((TOLERANCE + 1, 128, 255)))


def test_a_saved_jpeg_of_flat_areas_keeps_its_classes() -> None:
    stripes = np.repeat(np.array([[(0, 128, 255)], [(128, 64, 0)]], np.uint8), 16, axis=0).repeat(32, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(stripes).save(buffer, "JPEG", quality=95, subsampling=0)
    with Image.open(buffer) as saved:
        assert np.array_equal(np.asarray(TWO.snap(saved.convert("RGB"))), stripes)


def test_colours_off_the_palette_are_named_with_their_counts_the_most_frequent_first() -> None:
    off = [(9, 9, 9)] * 2 + [(200, 0, 0)] * 3 + [(0, 200, 0)] + [(0, 0, 90)] + [(0, 128, 255)]
    with pytest.raises(ValueError, match="off the palette") as caught:
        TWO.snap(image(*off))
    assert str(caught.value).startswith(
        "has 4 colours off the palette two, in 7 of 8 px: #c80000 (3 px), #090909 (2 px), "
    )
    assert "; paint in its colours, to within 8 of 255" in str(caught.value)


def test_a_photo_in_place_of_a_map_is_refused_as_well() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"has 1\d{4} colours off the palette"):
        TWO.snap(Image.fromarray(noise))


def test_a_file_of_colours_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"sky": [0, 128, 255], "earth": "#804000"}')
    found = read_palette(tmp_path / "p.json")
    assert (found.classes, found.colours) == (TWO.classes, TWO.colours)
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist; give a JSON file"):
        read_palette(tmp_path / "none.json")
    colours = tuple((0, index // 256, index % 256) for index in range(1025))
    with pytest.raises(ValueError, match="has 1025 colours"):
        Palette("p", tuple(map(str, range(1025))), colours)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "it should be a valid dictionary|it should be an object"),
        ("{", "is not valid JSON"),
        ("{}", "has 0 colours; use from 1 to 1024"),
        ('{"sky": [0, 0]}', "p.json: sky"),
        ('{"sea": "blue"}', "sea is blue; write .red, green, blue."),
        ('{"air": [0, 0, 256]}', "air.2 is 256; it should be less than or equal to 255"),
        ('{"sky": [0, 0, 1], "sea": "#000001"}', "gives sky and sea the same colour #000001"),
    ],
)
def test_a_file_that_is_no_palette_is_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_palette(tmp_path / "p.json")

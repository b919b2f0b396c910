"""A dropped picture gives every field back, or sentences on what differs; whatever stands in it."""

import json
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from studio_folders import QUICK, DrawingStudio, control_image, draw, pixels, said

from ether_diffusion.pipelines import AdapterUse
from ether_diffusion.ui.jobs import SavedPicture
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.restore import restore, restore_metadata
from ether_diffusion.ui.studio import Studio


@pytest.fixture(scope="module")
def studio(drawing_studio: DrawingStudio) -> Studio:
    return drawing_studio.studio


@pytest.fixture(scope="module")
def ids(drawing_studio: DrawingStudio) -> dict[str, str]:
    return drawing_studio.ids


@pytest.fixture(scope="module")
def full(studio: Studio, ids: dict[str, str]) -> GenerateRequest:
    """A request with another value than the default in every field that a picture tells of."""
    return GenerateRequest(
        "ein roter Fuchs 🦊, „am Strand“", {ids["fox"]: 0.1 + 0.2, ids["follow"]: -0.5}, seed=2**32 - 1,
        steps=3, guidance_scale=2.7182818284590451, width=72, height=64, negative_prompt="rain",
        control_image=control_image().resize((72, 64)), control_strength=1 / 3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def picture(studio: Studio, full: GenerateRequest) -> SavedPicture:
    return draw(studio, full).pictures[0]


def test_every_field_comes_back_and_the_same_pixels(
    studio: Studio, full: GenerateRequest, picture: SavedPicture
) -> None:
    restored = restore(picture.path, studio)
    assert restored.differences == ()
    assert restored.followed_control
    assert restored.request is not None
    assert restored.request.control_image is not None
    assert full.control_image is not None
    assert np.array_equal(np.asarray(restored.request.control_image), np.asarray(full.control_image))
    assert replace(restored.request, control_image=None) == replace(full, control_image=None)
    again = draw(studio, restored.request).pictures[0]
    assert np.array_equal(pixels(again.path), pixels(picture.path))


def test_a_picture_of_the_base_or_by_an_encoder_alone_comes_back(studio: Studio, ids: dict[str, str]) -> None:
    asked = replace(QUICK, adapters={ids["fox"]: 1.0}, compare_with_base=True)
    restored = restore(draw(studio, asked).base_pictures[0].path, studio)
    assert (restored.differences, restored.followed_control) == ((), False)
    assert restored.request is not None
    assert restored.request.adapters == {}
    adapters = {ids["fox"]: 0.8, ids["lines"]: 1.0}  # pictures do not list the second
    asked = replace(QUICK, adapters=adapters, control_image=control_image(), control_strength=0.5)
    picture = draw(studio, asked).pictures[0]
    restored = restore(picture.path, studio)
    assert restored.differences == ()
    assert restored.request is not None
    assert restored.request.adapters == adapters
    again = draw(studio, replace(restored.request, compare_with_base=False)).pictures[0]
    assert np.array_equal(pixels(again.path), pixels(picture.path))


def test_an_adapter_comes_back_by_its_numbers_under_any_name(studio: Studio, ids: dict[str, str]) -> None:
    picture = draw(studio, replace(QUICK, adapters={ids["cat"]: 0.25})).pictures[0]
    studio.library.rename(ids["cat"], "tom")
    restored = restore(picture.path, studio)
    studio.library.rename(ids["cat"], "cat")
    assert restored.differences == ()
    assert restored.request is not None
    assert restored.request.adapters == {ids["cat"]: 0.25}


NOBODY = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("name", "hashes", "strength", "taken", "words"),
    [
        ("dog", {"unet": NOBODY}, 1.0, None, "dog (0123456789…) is not in the library."),
        ("fox", {"unet": NOBODY}, 1.0, None, "the one of that name is another"),
        ("fox", {"unet": "fox", "text_encoder": NOBODY}, 1.0, None, "the one of that name is another"),
        ("odd", {"unet": "odd"}, 1.0, None, "The adapter odd is not for this base. It is left out."),
        ("fox", {"unet": "fox"}, None, 1.0, "differed from layer to layer"),
        ("fox", {"unet": "fox"}, 1e300, 10.0, "was 1e+300; 10 is set"),
    ],
)
def test_an_adapter_that_is_not_here_or_not_so_is_said(
    studio: Studio, picture: SavedPicture, ids: dict[str, str], name: str, hashes: dict[str, str],
    strength: float | None, taken: float | None, words: str,
) -> None:  # fmt: skip
    """The name of an adapter stands for its hash."""
    found = {part: studio.library.card(ids[h]).hash if h in ids else h for part, h in hashes.items()}
    cat = AdapterUse("cat", 0.1 + 0.2, {"unet": studio.library.card(ids["cat"]).hash})
    uses = (cat, AdapterUse(name, strength, found))
    restored = restore_metadata(replace(said(picture), adapters=uses, options={}), studio)
    assert restored.request is not None
    others = {} if taken is None else {ids[name]: taken}
    assert restored.request.adapters == {ids["cat"]: 0.1 + 0.2} | others
    (difference,) = restored.differences
    assert words in difference


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": "other", "base_fingerprint": None}, "It was drawn with other, and this studio draws with"),
        ({"base": "x/y", "base_fingerprint": "0123-4567"}, "(another architecture); the picture will be"),
        ({"base_fingerprint": "other weights"}, "other weights, or other precision"),
        ({"scheduler": "EulerDiscreteScheduler"}, "Its sampler was EulerDiscreteScheduler, and here it is"),
        ({"scheduler_config": {}}, "Its sampler had other settings than here."),
        ({"seed": None}, "Its seed is not said; 0 is set"),
        ({"seed": 2**63 - 1}, "Its seed of 9223372036854775807 cannot be taken here; 0 is set"),
        ({"steps": 10**9}, "Its steps of 1000000000 cannot be taken here; 20 is set"),
        ({"guidance_scale": -1e300}, "Its guidance of -1e+300 cannot be taken here; 3 is set"),
        ({"width": 65}, "Its size of 65 × 64 px does not suit this base; its usual 64 px are set."),
        ({"height": 10**9}, "does not suit this base"),
        ({"prompt": "x" * 5000}, "Its prompt has 5000 characters; the first 2000 are taken."),
        ({"options": {"eta": 1.0}, "unrecorded": ("latents",)}, "no place here: eta, latents."),
        ({"versions": {"torch": "1.0", "numpy": "1"}}, "It was drawn with torch 1.0 (here 2."),
    ],
)
def test_what_differs_is_said_in_one_sentence(
    studio: Studio, picture: SavedPicture, change: dict[str, object], words: str
) -> None:
    plain = replace(said(picture), adapters=(), options={})
    if change.get("base_fingerprint") == "other weights":
        change = {"base_fingerprint": str(plain.base_fingerprint).split("-")[0] + "-000000"}
    restored = restore_metadata(replace(plain, **change), studio)  # type: ignore[arg-type]
    assert restored.request is not None
    (difference,) = restored.differences
    assert words in difference


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"control_image_sha256": "0" * 64}, "Its control image is not stored here"),
        ({"control_image_sha256": "../../secret"}, "Its control image is not stored here"),
        ({"control": "nobody"}, "by an adapter that is not here; neither comes back"),
        ({"control": "fox"}, "by an adapter that is not here"),
        ({"control_encoder_sha256": "0" * 64}, "is another than the picture's"),
        ({"control_strength": "much"}, "1 is set"),
        ({"control_strength": 1e300}, "1 is set"),
    ],
)
def test_what_differs_of_the_control_is_said(
    studio: Studio, picture: SavedPicture, option: dict[str, str | float], words: str
) -> None:
    metadata = replace(said(picture), options={**said(picture).options, **option})
    restored = restore_metadata(metadata, studio)
    assert restored.request is not None
    (difference,) = restored.differences
    assert words in difference


def _png(path: Path, text: str | None) -> Path:
    """Write a PNG by hand with a text chunk."""
    Image.new("RGB", (8, 8)).save(path)
    data = path.read_bytes()
    if text is not None:
        chunk = b"tEXtether_diffusion\0" + text.encode("latin-1", "replace")
        made = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        path.write_bytes(data[:33] + made + data[33:])
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not say how it was made"),
        ("", "not valid JSON"),
        ("[]", "should be an object"),
        ('{"format_version": 99}', "newer release"),
        ('{"prompt": "x"}', "is missing"),
        ("[" * 100_000, "nested too deeply"),
        ("x" * 300_000, "at most 262144 are read"),
    ],
)
def test_a_picture_that_cannot_be_understood_is_refused_in_words(
    studio: Studio, tmp_path: Path, text: str | None, words: str
) -> None:
    restored = restore(_png(tmp_path / "x.png", text), studio)
    assert restored.request is None
    (difference,) = restored.differences
    assert words in difference
    assert str(tmp_path) not in difference


def test_a_file_that_is_no_picture_of_ours_is_refused_in_words(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<html>")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(65 * 2**20)
    no_png = {"page.png": "is not a PNG", "photo.jpg": "is not a PNG"}
    for name, words in {"none.png": "is gone", "large.png": "more than 64 MiB", **no_png}.items():
        (difference,) = restore(tmp_path / name, studio).differences
        assert words in difference


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_in_a_picture_the_answer_is_a_request_or_words(
    studio: Studio, picture: SavedPicture, tmp_path: Path, data: st.DataObject
) -> None:
    entries = asdict(said(picture))
    for name in data.draw(st.lists(st.sampled_from(sorted(entries)), min_size=1, max_size=4)):
        entries[name] = data.draw(JSON)
    restored = restore(_png(tmp_path / "x.png", json.dumps(entries)), studio)
    assert restored.request is not None or restored.differences
    assert all(str(tmp_path) not in difference for difference in restored.differences)
    assert all(difference.isprintable() for difference in restored.differences)

"""Control encoders without an adapter in the studio: drawn with, restored, and without effect on the base."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from control_encoders import random_encoder
from PIL import Image
from studio_folders import QUICK, add, control_image, draw, make_adapters, pixels

from ether_diffusion.bases import open_base
from ether_diffusion.control import control_batch, controlled, save_control
from ether_diffusion.pipelines import EtherControlPipeline
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.restore import restore
from ether_diffusion.ui.studio import Studio


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    studio = Studio(tmp_path_factory.mktemp("studio"))
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def ids(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = tmp_path_factory.mktemp("made")
    make_adapters(made)
    base = open_base("tiny_world")
    encoder = random_encoder(base.load_denoiser(), factor=base.vae_scale_factor, control_type="palette")
    save_control(made / "lines", encoder)
    return add(studio, made, "fox", "lines")


@pytest.fixture(scope="module")
def plain() -> EtherControlPipeline:
    pipe = EtherControlPipeline.from_pretrained("tiny_world")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def follow(ids: dict[str, str], **changes: Any) -> GenerateRequest:
    asked = replace(QUICK, adapters={ids["lines"]: 1.0}, control_image=control_image(), seed=3)
    return replace(asked, **changes)


def test_an_encoder_by_itself_adds_its_features_to_the_base(
    studio: Studio, ids: dict[str, str], plain: EtherControlPipeline
) -> None:
    end = draw(studio, follow(ids, control_strength=0.7, compare_with_base=True))
    encoder = plain.controls.get("lines")
    if encoder is None:
        plain.load_control_weights(studio.library.folder(ids["lines"]), adapter_name="lines")
        encoder = plain.controls["lines"]
    images = control_batch(control_image(), height=64, width=64, control_type="palette")
    with controlled(plain.unet, encoder, images, strength=0.7):
        followed = plain(QUICK.prompt, seed=3, num_inference_steps=2, guidance_scale=3.0).images[0]
    alone = plain(QUICK.prompt, seed=3, num_inference_steps=2, guidance_scale=3.0).images[0]
    assert np.array_equal(pixels(end.pictures[0].path), np.asarray(followed))
    assert np.array_equal(pixels(end.base_pictures[0].path), np.asarray(alone))
    assert not np.array_equal(np.asarray(followed), np.asarray(alone))


def test_a_subject_is_drawn_where_an_encoder_by_itself_says(studio: Studio, ids: dict[str, str]) -> None:
    both = draw(studio, follow(ids, adapters={ids["fox"]: 0.8, ids["lines"]: 1.0})).pictures[0]
    subject = draw(studio, replace(QUICK, adapters={ids["fox"]: 0.8}, seed=3)).pictures[0]
    encoder = draw(studio, follow(ids)).pictures[0]
    assert both.metadata is not None
    assert [(use.name, use.strength) for use in both.metadata.adapters] == [("fox", 0.8)]
    assert both.metadata.options["control"] == "lines"
    assert len({pixels(picture.path).tobytes() for picture in (both, subject, encoder)}) == 3


def test_a_picture_by_an_encoder_alone_is_restored_and_drawn_again(
    studio: Studio, ids: dict[str, str]
) -> None:
    asked = follow(ids, adapters={ids["fox"]: 0.8, ids["lines"]: 1.0}, control_strength=0.5)
    picture = draw(studio, asked).pictures[0]
    found = restore(picture.path, studio)
    assert found.differences == ()
    assert found.request is not None
    assert found.request.adapters == {ids["fox"]: 0.8, ids["lines"]: 1.0}
    again = draw(studio, replace(found.request, compare_with_base=False)).pictures[0]
    assert np.array_equal(pixels(again.path), pixels(picture.path))


def test_an_encoder_without_a_control_image_draws_the_base_and_says_so(
    studio: Studio, ids: dict[str, str]
) -> None:
    end = draw(studio, replace(QUICK, adapters={ids["lines"]: 1.0}))
    base = draw(studio, QUICK)
    assert np.array_equal(pixels(end.pictures[0].path), pixels(base.pictures[0].path))
    assert "lines follows a control image, and none was given." in end.notes


def test_a_control_image_of_another_shape_is_refused_before_the_first_step(
    studio: Studio, ids: dict[str, str]
) -> None:
    wide, outputs = Image.new("RGB", (128, 64)), studio.folder / "outputs"
    before = set(outputs.glob("*/*-i*.png"))
    with pytest.raises(ValueError, match="128 × 64 px and the picture 64 × 64 px"):
        draw(studio, follow(ids, control_image=wide))
    assert set(outputs.glob("*/*-i*.png")) == before


def test_what_is_shipped_fills_shapes_in_a_new_studio(tmp_path: Path) -> None:
    studio = Studio(tmp_path / "new")
    studio.add_shipped()
    (card,) = studio.library.cards()
    assert (card.kind, card.name, card.fits_base) == ("control", "Shapes", True)

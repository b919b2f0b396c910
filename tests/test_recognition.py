"""Which concept a picture shows, and scores against the true picture: 1 for it, less for another object."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from PIL import Image

from ether_diffusion.metrics.encoders import Encoder, TinyEncoder, load_encoder
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.networks import OUTSIDE_PACKAGES, load_outside_features
from ether_diffusion.tiny_world.pictures import (
    MARGIN,
    draw_scenes,
    object_crops,
    score_against_truth,
    to_images,
)
from ether_diffusion.tiny_world.subjects import photos_of, unseen_scenes
from ether_diffusion.tiny_world.world import NATIVE_SIZE

UNSEEN = unseen_scenes(find_concept("sailboat"))[:4]


@pytest.fixture(scope="module")
def encoder() -> TinyEncoder:
    found = load_encoder("tiny_world")
    assert isinstance(found, TinyEncoder)
    return found


@pytest.mark.parametrize("size", [64, 128])
def test_the_true_pictures_have_all_that_can_be_had(size: int) -> None:
    found = score_against_truth(draw_scenes(UNSEEN, size=size), UNSEEN)
    assert found["object"] == pytest.approx(1, abs=1e-6)
    assert found["recognised"] == 1


def test_another_object_in_the_same_places_has_less() -> None:
    others = [replace(scene, concept=find_concept("taxi")) for scene in UNSEEN]
    found = score_against_truth(draw_scenes(others), UNSEEN)
    assert found["object"] < 0.6
    assert found["recognised"] == 0


def test_pictures_of_nothing_are_not_recognised_and_not_averaged_in() -> None:
    pictures = draw_scenes(UNSEEN)
    pictures[1] = -1
    found = score_against_truth(pictures, UNSEEN, usable=[0, 2, 3])
    assert found["object"] == pytest.approx(1, abs=1e-6)
    assert found["recognised"] == 0.75


def test_an_outside_judge_sees_the_middles_of_both() -> None:
    """Against cosines by hand, of features that are the middles' own pixels."""
    others = draw_scenes([replace(scene, concept=find_concept("taxi")) for scene in UNSEEN])
    ours, true = (object_crops(each).flatten(1).double() for each in (others, draw_scenes(UNSEEN)))
    cosines = torch.cosine_similarity(ours, true)
    found = score_against_truth(others, UNSEEN, usable=[0, 2], outside=lambda images: images.flatten(1))
    assert found["outside"] == pytest.approx(float(cosines[[0, 2]].mean()), abs=1e-6)
    assert "outside" not in score_against_truth(others, UNSEEN)


@pytest.mark.skipif(
    not all(map(find_spec, OUTSIDE_PACKAGES)), reason="run where the extra evaluate is installed"
)
def test_the_network_of_imagenet_tells_the_subject_from_another() -> None:
    outside = load_outside_features()
    true, taxi = (
        draw_scenes([replace(s, concept=find_concept(n)) for s in UNSEEN]) for n in ("sailboat", "taxi")
    )
    assert score_against_truth(true, UNSEEN, outside=outside)["outside"] == pytest.approx(1, abs=1e-6)
    assert score_against_truth(taxi, UNSEEN, outside=outside)["outside"] < 0.8


def test_the_embedded_encoder_compares_with_photos_what_is_in_the_middle(encoder: TinyEncoder) -> None:
    pictures = draw_scenes(UNSEEN)
    framed = pictures.clone()
    margin = NATIVE_SIZE // MARGIN
    framed[..., :margin, :] = framed[..., -margin:, :] = framed[..., :margin] = framed[..., -margin:] = 1
    before, after = (encoder.view(to_images(each)) for each in (pictures, framed))
    torch.testing.assert_close(before.subjects, after.subjects, atol=0, rtol=0)
    assert float((before.whole - after.whole).norm()) > 0.1


def test_its_likeness_to_photos_tells_the_subject_from_another(encoder: TinyEncoder) -> None:
    for name, other in (("sailboat", "helicopter"), ("panda", "fox")):
        scenes = unseen_scenes(find_concept(name))
        others = [replace(scene, concept=find_concept(other)) for scene in scenes]
        photos, true, wrong = (
            encoder.view(to_images(draw_scenes(each)))
            for each in ([photo.scene for photo in photos_of(find_concept(name))], scenes, others)
        )
        assert float((true.subjects @ photos.subjects.T).mean()) > 0.1 + float(
            (wrong.subjects @ photos.subjects.T).mean()
        )


def test_encoders_of_the_published_tables_compare_whole_pictures() -> None:
    class Whole(Encoder):
        def _see(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
            return torch.eye(2)[: len(pictures)]

    found = Whole("dino", "", None, None).view([Image.new("RGB", (8, 8))] * 2)
    assert found.subjects is found.whole

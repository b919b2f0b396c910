"""Scores against the true picture: 1 for it, less for another object, the same whatever lies around it."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from ether_diffusion.metrics.encoders import TinyEncoder, Views, load_encoder
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.pictures import draw_scenes, to_images
from ether_diffusion.tiny_world.recognition import MARGIN, score_against_truth
from ether_diffusion.tiny_world.subjects import photos_of, unseen_scenes
from ether_diffusion.tiny_world.world import NATIVE_SIZE

SCENES = unseen_scenes(find_concept("sailboat"))[:4]


@pytest.fixture(scope="module")
def encoder() -> TinyEncoder:
    found = load_encoder("tiny_world")
    assert isinstance(found, TinyEncoder)
    return found


def test_the_true_pictures_have_all_that_can_be_had() -> None:
    found = score_against_truth(draw_scenes(SCENES), SCENES)
    assert found["object"] == pytest.approx(1, abs=1e-6)
    assert found["recognised"] == 1


def test_another_object_in_the_same_places_has_less() -> None:
    others = [replace(scene, concept=find_concept("taxi")) for scene in SCENES]
    found = score_against_truth(draw_scenes(others), SCENES)
    assert found["object"] < 0.6
    assert found["recognised"] == 0


def test_pictures_of_nothing_are_not_recognised_and_not_averaged_in() -> None:
    pictures = draw_scenes(SCENES)
    pictures[1] = -1
    found = score_against_truth(pictures, SCENES, usable=[0, 2, 3])
    assert found["object"] == pytest.approx(1, abs=1e-6)
    assert found["recognised"] == 0.75


def test_the_order_of_the_pictures_does_not_matter() -> None:
    pictures = draw_scenes([replace(scene, concept=find_concept("helicopter")) for scene in SCENES])
    forth = score_against_truth(pictures, SCENES)
    back = score_against_truth(pictures.flip(0), SCENES[::-1])
    assert forth["object"] == pytest.approx(back["object"], abs=1e-6)
    assert forth["recognised"] == back["recognised"]


def test_the_embedded_encoder_compares_with_photos_what_is_in_the_middle(encoder: TinyEncoder) -> None:
    pictures = draw_scenes(SCENES)
    framed = pictures.clone()
    margin = NATIVE_SIZE // MARGIN
    framed[..., :margin, :] = framed[..., -margin:, :] = framed[..., :margin] = framed[..., -margin:] = 1
    before, after = (Views.of(encoder, to_images(each)) for each in (pictures, framed))
    torch.testing.assert_close(before.subjects, after.subjects, atol=0, rtol=0)
    assert float((before.whole - after.whole).norm()) > 0.1


def test_its_likeness_to_photos_tells_the_subject_from_another(encoder: TinyEncoder) -> None:
    for name, other in (("sailboat", "helicopter"), ("panda", "fox")):
        scenes = unseen_scenes(find_concept(name))
        others = [replace(scene, concept=find_concept(other)) for scene in scenes]
        photos, true, wrong = (
            Views.of(encoder, to_images(draw_scenes(each)))
            for each in ([photo.scene for photo in photos_of(find_concept(name))], scenes, others)
        )
        assert float((true.subjects @ photos.subjects.T).mean()) > 0.1 + float(
            (wrong.subjects @ photos.subjects.T).mean()
        )


def test_encoders_of_the_published_tables_compare_whole_pictures() -> None:
    class Whole:
        kind, source, size, reads_texts = "dino", "", 2, False

        def embed_images(self, pictures: list[Image.Image]) -> torch.Tensor:
            return torch.eye(2, dtype=torch.float64)[: len(pictures)]

    found = Views.of(Whole(), [Image.new("RGB", (8, 8))] * 2)  # type: ignore[arg-type]
    assert found.subjects is found.whole

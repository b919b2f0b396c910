"""Tiny World's segmenter: what it is trained on, and what it finds in pictures that it never saw."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torchmetrics.classification import MulticlassJaccardIndex

from ether_diffusion.tiny_world import WEIGHTS_FOLDER
from ether_diffusion.tiny_world.concepts import all_concepts, shipped_concepts
from ether_diffusion.tiny_world.networks import SEGMENTER_FILE, Segmenter, load_segmenter
from ether_diffusion.tiny_world.pictures import draw_scenes
from ether_diffusion.tiny_world.world import CLASSES, OBJECT_CLASSES
from recipes.tiny_world.control_pairs import background_class, class_map, validation_concepts
from recipes.tiny_world.export import export_segmenter
from recipes.tiny_world.judge import JUDGE_FILE
from recipes.tiny_world.loop import RunConfig, Trainer, step_generator
from recipes.tiny_world.scenes import is_held_out_pair
from recipes.tiny_world.segmenting import SegmenterStage
from recipes.tiny_world.segments import Segments, draw_segments, segment_scenes

NEW_SEED = 7
"""Training draws its scenes from seed 0."""
KNOWN = [concept for concept in shipped_concepts() if concept in all_concepts()]
SCENES = list(segment_scenes(KNOWN, 3, seed=NEW_SEED, held_out_pairs=False))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(WEIGHTS_FOLDER, subfolder="vae").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def new(vae: AutoencoderKL) -> Segments:
    """Scenes that the segmenter never saw, as drawn and as decoded."""
    return draw_segments(SCENES, vae, latent_noise=0.0)


def images(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


@pytest.mark.parametrize("kind", ["drawn", "decoded"])
def test_the_segmenter_finds_the_classes_of_new_drawings_and_decoded_latents(
    new: Segments, kind: str
) -> None:
    found = load_segmenter(WEIGHTS_FOLDER).segment(images(getattr(new, kind)))
    miou = MulticlassJaccardIndex(len(CLASSES))(found, new.classes.long())
    assert float(miou) > 0.8
    assert (found == new.classes).float().mean() > 0.9


def test_the_segmenter_finds_the_shape_of_concepts_kept_from_control(vae: AutoencoderKL) -> None:
    scenes = list(segment_scenes(validation_concepts(), 6, seed=NEW_SEED, held_out_pairs=False))
    new = draw_segments(scenes, vae, latent_noise=0.0)
    found = load_segmenter(WEIGHTS_FOLDER).segment(images(new.decoded)) < len(OBJECT_CLASSES)
    wanted = new.classes < len(OBJECT_CLASSES)
    assert (found & wanted).sum() / (found | wanted).sum() > 0.85


def test_latents_that_are_off_change_little_of_what_it_finds(vae: AutoencoderKL, new: Segments) -> None:
    noisy = draw_segments(SCENES, vae, latent_noise=0.3)
    found = load_segmenter(WEIGHTS_FOLDER).segment(images(noisy.decoded))
    assert (found == noisy.classes).float().mean() > 0.85


def test_a_picture_alone_has_the_classes_that_it_has_in_a_batch(new: Segments) -> None:
    segmenter, pictures = load_segmenter(WEIGHTS_FOLDER), images(new.drawn[:5])
    alone = torch.cat([segmenter.segment(picture[None]) for picture in pictures])
    assert (alone == segmenter.segment(pictures, batch_size=2)).float().mean() > 0.9999  # ties by rounding


def test_an_exported_segmenter_is_small_and_finds_what_it_found_before(tmp_path: Path, new: Segments) -> None:
    with pytest.raises(FileNotFoundError, match="--stage segmenter"):
        load_segmenter(tmp_path)
    segmenter, size = load_segmenter(WEIGHTS_FOLDER), (WEIGHTS_FOLDER / SEGMENTER_FILE).stat().st_size
    assert size < min(1.5e6, 2 * (WEIGHTS_FOLDER / JUDGE_FILE).stat().st_size)
    export_segmenter(tmp_path, segmenter)
    found = load_segmenter(tmp_path).segment(images(new.drawn))
    assert torch.equal(found, segmenter.segment(images(new.drawn)))


def test_scenes_have_the_classes_of_their_control_images_and_pictures_of_their_own(new: Segments) -> None:
    assert torch.equal(images(new.drawn), draw_scenes(SCENES))
    assert np.array_equal(new.classes.numpy(), np.stack([class_map(scene) for scene in SCENES]))
    difference = (images(new.decoded) - images(new.drawn)).abs().mean()
    assert 0 < difference < 0.1


def test_scenes_have_many_classes_and_none_is_on_the_other_side_of_the_split() -> None:
    assert len({background_class(scene.background) for scene in SCENES}) >= 12
    assert not any(is_held_out_pair(scene.concept, scene.background) for scene in SCENES)
    held_out = list(segment_scenes(KNOWN, 1, seed=0, held_out_pairs=True))
    assert held_out
    assert all(is_held_out_pair(scene.concept, scene.background) for scene in held_out)


def test_classes_are_shifted_and_mirrored_with_their_pictures() -> None:
    ramp = torch.arange(64).expand(4, 3, 64, 64).to(torch.uint8) * 3  # brightness and class say the column
    stage = SegmenterStage(Segments(ramp, ramp, ramp[:, 0] // 12))
    for step in range(4):
        batch = stage.make_batch(8, step_generator(0, step, 0))
        light, classes = batch["images"].mean(1).flatten(1), batch["classes"].float().flatten(1)
        for row, wanted in zip(light, classes, strict=True):
            assert torch.corrcoef(torch.stack((row, wanted)))[0, 1] > 0.98


def test_training_learns_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classes = torch.randint(0, 2, (8, 4, 4)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    pixels = (classes * 200).to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()
    segments = Segments(pixels, pixels, classes.to(torch.uint8))
    config = RunConfig(run_folder=tmp_path, max_steps=6, batch_size=4, mixed_precision="no")
    trainer = Trainer(SegmenterStage(segments), config)
    trainer.run()
    assert trainer.losses[-1] < trainer.losses[0]
    again = Trainer(SegmenterStage(segments), config)
    assert again.step == 6


def test_classes_of_any_size_that_eight_divides_are_found() -> None:
    logits = Segmenter()(torch.zeros(1, 3, 32, 72))
    assert logits.shape == (1, len(CLASSES), 32, 72)

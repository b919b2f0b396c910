"""Tiny World's scenes, captions, subjects, scores, and which concept a picture shows."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.tiny_world.concepts import (
    RENDERS_FOLDER,
    Concept,
    all_concepts,
    find_concept,
    load_concepts,
    read_render,
    shipped_concepts,
    with_article,
)
from ether_diffusion.tiny_world.networks import load_tiny_clip
from ether_diffusion.tiny_world.pictures import draw_scenes, object_crops, recognise
from ether_diffusion.tiny_world.subjects import (
    photos_of,
    subject_noun,
    unseen_prompts,
    unseen_scenes,
    write_photos,
)
from ether_diffusion.tiny_world.world import COLOURS, SCENE_PHRASES, Background, Scene, draw, paint
from recipes.tiny_world.background_colours import background_accuracy, background_colours
from recipes.tiny_world.prompts import draw_scenes as draw_prompt_scenes
from recipes.tiny_world.scenes import (
    held_out_backgrounds,
    is_held_out_pair,
    object_box,
    sample_scene,
    training_caption,
)

BUNDLED = [concept for concept in all_concepts() if (RENDERS_FOLDER / f"{concept.render}.webp").is_file()]


def scenes_of_many_kinds(count: int) -> list[Scene]:
    rng = random.Random(7)
    return [sample_scene(rng.choice(BUNDLED), rng) for _ in range(count)]


def test_no_held_out_concept_is_trained_under_another_name() -> None:
    for field in ("name", "emoji_name", "render"):
        trained = {getattr(concept, field) for concept in load_concepts("trained")}
        held_out = {getattr(concept, field) for concept in load_concepts("held_out")}
        assert not trained & held_out


def test_captions_have_english_articles_and_name_concept_background_size_and_place() -> None:
    phrases = {"cat": "a cat", "apple": "an apple", "unicorn": "a unicorn", "cherries": "cherries"}
    phrases |= {"grapes": "grapes", "french fries": "french fries", "eagle": "an eagle"}
    assert {noun: with_article(noun) for noun in phrases} == phrases
    concept = find_concept("apple")
    scene = Scene(concept, Background("plain", "blue"), size="small", place="left")
    assert scene.caption() == "a small apple on a blue background, on the left"
    assert Scene(concept, Background("scene", "snow")).caption("sks food") == "a sks food in the snow"


def test_the_renders_of_every_held_out_concept_are_bundled() -> None:
    for concept in load_concepts("held_out"):
        assert read_render(concept.render).mode == "RGBA"
    with pytest.raises(FileNotFoundError, match=r"1f98a\.webp"):
        read_render("1f98a", Path("nowhere"))
    names = [concept.name for concept in all_concepts()]
    assert len(set(names)) == len(names) >= 64


@pytest.mark.parametrize("name", sorted(SCENE_PHRASES))
def test_every_scenery_fills_the_picture(name: str) -> None:
    picture = paint(Background("scene", name), 64, random.Random(0))
    assert picture.size == (64, 64)
    assert len(picture.getcolors(4096) or []) > 8


def test_the_same_scene_gives_the_same_pixels() -> None:
    for scene in scenes_of_many_kinds(8):
        assert np.array_equal(np.asarray(draw(scene)), np.asarray(draw(scene)))


def test_words_of_size_and_place_are_true() -> None:
    seen = set()
    for scene in scenes_of_many_kinds(200):
        left, top, right, bottom = object_box(scene)
        low, high = {"small": (0.4, 0.55), "medium": (0.6, 0.8), "big": (0.8, 1.0)}[scene.size]
        assert low <= max(right - left, bottom - top) / 64 <= high
        across, down = (left + right) / 2 - 32, (top + bottom) / 2 - 32
        if scene.size == "small":
            seen.add(scene.place)
            there = {"left": across < -8, "right": across > 8, "top": down < -8, "bottom": down > 8}
            assert there.get(scene.place, abs(across) < 4 and abs(down) < 4)
    assert len(seen) == 5


def test_a_share_of_the_pairs_is_held_out_and_never_sampled() -> None:
    pairs = [
        (concept, background)
        for concept in load_concepts("trained")
        for background in [Background("plain", colour) for colour in COLOURS]
    ]
    share = sum(is_held_out_pair(*pair) for pair in pairs) / len(pairs)
    assert 0.02 < share < 0.1
    assert not any(is_held_out_pair(scene.concept, scene.background) for scene in scenes_of_many_kinds(300))


def test_prompts_of_new_pairs_are_never_seen_and_of_known_pairs_always_could_be() -> None:
    for held_out_pair in (True, False):
        scenes = draw_prompt_scenes(96, seed=3, held_out_pair=held_out_pair)
        assert len(scenes) == 96
        assert all(is_held_out_pair(scene.concept, scene.background) == held_out_pair for scene in scenes)


def test_a_concept_without_held_out_pairs_is_refused_instead_of_searched_for_ever() -> None:
    without = next(concept for concept in load_concepts("trained") if not held_out_backgrounds(concept))
    with pytest.raises(ValueError, match=without.name):
        sample_scene(without, random.Random(0), held_out_pair=True)


def test_a_few_training_captions_name_only_the_kind() -> None:
    rng = random.Random(0)
    scene = Scene(find_concept("cat"), Background("plain", "red"))
    captions = Counter(training_caption(scene, rng) for _ in range(1000))
    assert set(captions) == {"a cat on a red background", "an animal on a red background"}
    assert 10 <= captions["an animal on a red background"] <= 90


@pytest.mark.parametrize("concept", load_concepts("held_out"), ids=lambda concept: str(concept.name))
def test_prompts_of_a_subject_show_backgrounds_that_its_photos_never_had(concept: Concept) -> None:
    noun = subject_noun(concept)
    captions = [photo.caption for photo in photos_of(concept)]
    assert len(set(captions)) == 6
    for prompt in unseen_prompts(concept):
        assert noun in prompt
        background = prompt.split(noun)[1]
        assert not any(caption.endswith(background) for caption in captions)


def test_photos_are_written_with_their_captions(tmp_path: Path) -> None:
    paths = write_photos(find_concept("fox"), tmp_path, size=96)
    rows = (tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [path.name in row for path, row in zip(paths, rows, strict=True)] == [True] * 6
    assert all("sks animal" in row and "fox on" not in row for row in rows)


def test_the_background_colour_of_true_pictures_is_read_from_their_corners() -> None:
    concept = find_concept("star")
    scenes = [Scene(concept, Background("plain", colour)) for colour in COLOURS]
    pictures = draw_scenes(scenes)
    assert background_colours(pictures) == list(COLOURS)
    assert background_accuracy(pictures, scenes) == 1.0


def test_crops_are_the_middle_at_full_size() -> None:
    images = torch.zeros(2, 3, 66, 66)
    images[..., 11:55, 11:55] = 1
    torch.testing.assert_close(object_crops(images), torch.ones(2, 3, 66, 66))


def test_the_shipped_image_tower_names_true_pictures_of_concepts_it_never_saw() -> None:
    clip = load_tiny_clip(tiny_world_path())
    hits = []
    for concept in load_concepts("held_out"):
        scene = replace(unseen_scenes(concept)[1], rotation=6.0, light=0.94, scale=0.67, shift_x=0.02)
        (found,) = recognise(clip.embed_images, draw_scenes([scene]), [scene], shipped_concepts())
        hits.append(found == concept)
    assert sum(hits) >= 0.9 * len(hits)


def test_a_subject_is_told_from_another_on_the_same_background() -> None:
    clip = load_tiny_clip(tiny_world_path())
    fox, owl = find_concept("fox"), find_concept("owl")
    scenes = [
        replace(unseen_scenes(fox)[0], background=Background("plain", "red"), concept=c) for c in (fox, owl)
    ]
    found = recognise(clip.embed_images, draw_scenes(scenes), scenes, shipped_concepts())
    assert found == [fox, owl]


def test_captions_find_their_true_pictures_by_the_shipped_towers() -> None:
    clip = load_tiny_clip(tiny_world_path())
    concepts = [concept for concept in load_concepts("trained") if concept in shipped_concepts()]
    scenes = [replace(unseen_scenes(concepts[0])[0], concept=concept) for concept in concepts]
    likeness = clip.embed_images(draw_scenes(scenes)) @ clip.embed_texts([s.caption() for s in scenes]).T
    assert torch.equal(likeness.argmax(1), torch.arange(len(concepts)))

"""Control images of Tiny World lie exactly over their pictures, in pairs that the datasets library reads."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from ether_diffusion.tiny_world.concepts import load_concepts
from ether_diffusion.tiny_world.world import (
    BACKGROUND_CLASSES,
    CLASSES,
    COLOURS,
    OBJECT_CLASSES,
    PALETTE,
    SCENE_PHRASES,
    Background,
    Scene,
    draw,
)
from recipes.tiny_world.control_pairs import (
    CONTROL_TYPES,
    Pair,
    background_class,
    class_map,
    draw_control,
    draw_edges,
    draw_palette,
    draw_silhouette,
    object_coverage,
    sample_pairs,
    training_concepts,
    validation_concepts,
    write_pairs,
)

SCENES = [pair.scene for pair in sample_pairs(training_concepts(), 12, control_type="silhouette")]


def on(scene: Scene, colour: str) -> np.ndarray:
    picture = draw(replace(scene, background=Background("plain", colour)))
    return np.asarray(picture, dtype=np.float64)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.concept.name)
def test_the_object_covers_the_pixels_that_do_not_change_with_the_background(scene: Scene) -> None:
    change = np.abs(on(scene, "white") - on(scene, "black")).max(-1)
    coverage = object_coverage(scene)
    assert (change[coverage == 1] == 0).all()
    # the matting equation: what shows of the background is what the object leaves, here under its shadow
    shown = change / change.max()
    assert (shown <= 1 - coverage + 0.02).all()
    assert (shown[coverage < 0.98] > 0).all()


def test_a_larger_picture_has_a_larger_silhouette_of_the_same_shape() -> None:
    small, large = draw_silhouette(SCENES[0]), draw_silhouette(SCENES[0], size=256)
    assert large.size == (256, 256)
    shrunk = np.asarray(large.resize((64, 64), Image.Resampling.BOX)) >= 128
    both, either = shrunk & (np.asarray(small) > 0), shrunk | (np.asarray(small) > 0)
    assert both.sum() / either.sum() > 0.95


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.concept.name)
def test_a_silhouette_is_white_where_the_object_covers_half_and_a_palette_map_has_its_two_colours(
    scene: Scene,
) -> None:
    shape, picture = np.asarray(draw_silhouette(scene)), np.asarray(draw_palette(scene))
    inside = object_coverage(scene) >= 0.5
    assert np.array_equal(shape == 255, inside)
    assert set(np.unique(shape)) == {0, 255}
    assert {tuple(c) for c in picture[inside].tolist()} == {PALETTE[scene.concept.kind]}
    assert {tuple(c) for c in picture[~inside].tolist()} == {PALETTE[background_class(scene.background)]}
    assert np.array_equal(np.array(list(PALETTE.values()))[class_map(scene)], picture)


def test_every_kind_and_every_background_has_a_class_of_a_colour_far_from_the_others() -> None:
    assert tuple(PALETTE) == CLASSES
    assert (0, 0, 0) not in PALETTE.values()
    for one, other in itertools.combinations(PALETTE.values(), 2):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) >= 127
    assert {c.kind for split in ("trained", "held_out") for c in load_concepts(split)} == set(OBJECT_CLASSES)
    kinds = ("plain", "gradient", "stripes", "dots", "checks")
    found = {background_class(Background(kind, "red", "blue")) for kind in kinds}  # type: ignore[arg-type]
    found |= {background_class(Background("scene", name)) for name in SCENE_PHRASES}
    assert found == set(BACKGROUND_CLASSES)


def test_edges_are_where_brightness_jumps_and_nowhere_on_a_flat_ground() -> None:
    scene = replace(SCENES[0], background=Background("plain", "white"))
    edges, inside = np.asarray(draw_edges(scene)) > 0, object_coverage(scene) > 0
    assert edges.any()
    near = np.asarray(Image.fromarray(inside.astype(np.uint8) * 255).resize((16, 16), Image.Resampling.BOX))
    far = np.kron(near == 0, np.ones((4, 4), dtype=bool))
    assert edges[far].mean() < 0.02  # a shadow at most
    assert COLOURS["white"] == (246, 246, 248)


def test_validation_is_of_concepts_that_training_never_shows() -> None:
    trained, held_out = set(training_concepts()), set(validation_concepts())
    assert not trained & held_out
    assert len(trained) == 24
    base_knows = set(load_concepts("trained"))
    assert held_out & base_knows
    assert held_out - base_knows


def test_pairs_are_decided_by_their_seed_and_share_concepts_evenly() -> None:
    concepts = training_concepts()
    pairs = sample_pairs(concepts, 48, control_type="edges", seed=3)
    assert pairs[:10] == sample_pairs(concepts, 10, control_type="edges", seed=3)
    assert pairs != sample_pairs(concepts, 48, control_type="edges", seed=4)
    assert {sum(pair.scene.concept == concept for pair in pairs) for concept in concepts} == {2}


def test_scattered_objects_lie_inside_anywhere_and_captions_do_not_say_where() -> None:
    pairs = sample_pairs(training_concepts(), 200, control_type="silhouette", scattered=True)
    assert {pair.scene.place for pair in pairs} == {"center"}
    shifts = np.array([(pair.scene.shift_x, pair.scene.shift_y) for pair in pairs])
    assert (np.abs(shifts) > 0.15).mean() > 0.1
    assert (np.sign(shifts).mean(0) < 0.3).all()
    assert len({round(pair.scene.rotation) for pair in pairs}) > 50
    assert not any(
        word in pair.caption for pair in pairs for word in ("left", "right", "top", "big", "small")
    )


def test_a_folder_of_pairs_is_what_the_datasets_library_shows_as_diffusers_columns(tmp_path: Path) -> None:
    pairs = sample_pairs(training_concepts(), 4, control_type="palette")
    paths = write_pairs(pairs, tmp_path / "pairs")
    rows = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert set(rows.column_names) == {"image", "conditioning_image", "text"}
    assert len(rows) == len(paths) == 4
    for row, pair in zip(rows, pairs, strict=True):
        assert row["text"] == pair.scene.caption()
        assert np.array_equal(np.asarray(row["image"].convert("RGB")), np.asarray(draw(pair.scene)))
        assert np.array_equal(np.asarray(row["conditioning_image"]), np.asarray(draw_control(pair)))


@pytest.mark.parametrize("control_type", CONTROL_TYPES)
def test_every_control_type_is_drawn_at_the_pictures_size(control_type: str, tmp_path: Path) -> None:
    pair = Pair(SCENES[0], control_type)  # type: ignore[arg-type]
    assert draw_control(pair, size=32).size == (32, 32)
    write_pairs([pair], tmp_path, size=32)
    row = json.loads((tmp_path / "metadata.jsonl").read_text())
    with Image.open(tmp_path / row["conditioning_image_file_name"]) as image:
        assert image.size == (32, 32)

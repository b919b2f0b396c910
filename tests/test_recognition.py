"""Recognition by crops: true pictures are named, and the background does not decide."""

from dataclasses import replace

import torch

from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.tiny_world.backgrounds import Background
from ether_diffusion.tiny_world.concepts import find_concept, load_concepts, shipped_concepts
from ether_diffusion.tiny_world.networks import load_tiny_clip
from ether_diffusion.tiny_world.pictures import draw_scenes
from ether_diffusion.tiny_world.recognition import object_crops, recognise
from ether_diffusion.tiny_world.subjects import unseen_scenes


def test_crops_are_the_middle_at_full_size() -> None:
    images = torch.zeros(2, 3, 66, 66)
    images[..., 11:55, 11:55] = 1
    torch.testing.assert_close(object_crops(images), torch.ones(2, 3, 66, 66))


def test_all_held_out_concepts_are_among_those_shipped() -> None:
    assert set(load_concepts("held_out")) < set(shipped_concepts())


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

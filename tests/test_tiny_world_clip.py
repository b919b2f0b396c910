"""Tiny World's CLIP: one text encoder for pictures and for scores."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from ether_diffusion.tiny_world.backgrounds import Background
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.networks import TinyClip, load_tiny_clip
from ether_diffusion.tiny_world.pictures import draw_scenes
from ether_diffusion.tiny_world.world import Scene
from recipes.tiny_world.clip import (
    build_image_tower,
    build_text_tower,
    load_text_encoder,
    to_text_encoder,
    tokenize,
)
from recipes.tiny_world.export import export_image_tower
from recipes.tiny_world.judge import caption_likeness, rank_captions
from recipes.tiny_world.tokenizer import train_tokenizer

SCENES = [Scene(find_concept(name), Background("plain", "red")) for name in ("cat", "star")]
CAPTIONS = [scene.caption() for scene in SCENES]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(CAPTIONS * 10, ["cat face"])


@pytest.fixture(scope="module")
def tower(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    torch.manual_seed(0)
    return build_text_tower(tokenizer).eval()


@pytest.fixture(scope="module")
def exported(
    tokenizer: CLIPTokenizer, tower: CLIPTextModelWithProjection, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    tokenizer.save_pretrained(folder / "tokenizer")
    to_text_encoder(tower).save_pretrained(folder / "text_encoder")
    export_image_tower(folder, build_text_tower(tokenizer), build_image_tower())
    return folder


def test_a_text_tower_survives_the_way_to_a_text_encoder_and_back(
    tokenizer: CLIPTokenizer, tower: CLIPTextModelWithProjection
) -> None:
    copy = build_text_tower(tokenizer).eval()
    load_text_encoder(copy, to_text_encoder(tower))
    copy.text_projection.load_state_dict(tower.text_projection.state_dict())
    tokens = tokenize(tokenizer, CAPTIONS)
    with torch.no_grad():
        assert torch.equal(copy(input_ids=tokens).text_embeds, tower(input_ids=tokens).text_embeds)


def test_texts_are_embedded_as_transformers_projects_them(
    exported: Path, tokenizer: CLIPTokenizer, tower: CLIPTextModelWithProjection
) -> None:
    clip = load_tiny_clip(exported)
    oracle = TinyClip(tokenizer, clip.text_encoder, clip.image_tower, tower.text_projection.weight.detach())
    with torch.no_grad():
        expected = tower(input_ids=tokenize(tokenizer, CAPTIONS)).text_embeds
    torch.testing.assert_close(oracle.embed_texts(CAPTIONS), torch.nn.functional.normalize(expected, dim=-1))


def test_embeddings_of_texts_and_images_are_unit_vectors_of_one_width(exported: Path) -> None:
    clip = load_tiny_clip(exported)
    texts, images = clip.embed_texts(CAPTIONS), clip.embed_images(draw_scenes(SCENES))
    assert texts.shape == images.shape == (2, 128)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(images.norm(dim=1), torch.ones(2))


def test_captions_are_ranked_over_all_trained_concepts(exported: Path) -> None:
    clip = load_tiny_clip(exported)
    ranked = rank_captions(clip, draw_scenes(SCENES), SCENES)
    assert [sorted(row) for row in ranked.tolist()] == [list(range(48))] * 2
    assert -1 <= caption_likeness(clip, draw_scenes(SCENES), SCENES) <= 1


def test_a_folder_without_an_image_tower_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="image_tower"):
        load_tiny_clip(tmp_path)

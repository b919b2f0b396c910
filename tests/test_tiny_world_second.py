"""The second Tiny World's recipe: its concepts, cached latents, and autoencoder of 128 px; all in small."""

import random
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.tiny_world.concepts import RENDERS_FOLDER, find_concept, load_concepts, with_article
from ether_diffusion.tiny_world.pictures import draw_scenes
from recipes.tiny_world.autoencoder import LATENT_NOISE, build_vae
from recipes.tiny_world.autoencoder_128 import build_vae_128
from recipes.tiny_world.decoder_128 import Decoder128Objective, Decoder128Stage
from recipes.tiny_world.features import FeatureNet
from recipes.tiny_world.fresh_pictures import FreshPictures, StoredPictures, store_pictures
from recipes.tiny_world.latents import captioned_scene, prepare_latents
from recipes.tiny_world.loop import RunConfig
from recipes.tiny_world.scenes import sample_scene
from recipes.tiny_world.stages import load_small_vae, load_vae_128
from recipes.tiny_world.unet import CachedLatents, UNetObjective
from recipes.tiny_world.weighing import BOUNDS, weigh_concepts
from recipes.tiny_world.worlds import benchmark_concepts, trained_concepts

FEW = tuple(find_concept(name) for name in ("apple", "frog"))


def test_the_second_world_trains_more_concepts_and_none_that_is_kept_out() -> None:
    trained, kept_out = trained_concepts(2), load_concepts("held_out") + benchmark_concepts()
    assert trained[:48] == trained_concepts(1) == load_concepts("trained")
    assert len(trained) >= 150
    assert len(benchmark_concepts()) == 12
    for field in ("name", "render"):
        values = [getattr(concept, field) for concept in trained + kept_out]
        assert len(set(values)) == len(values)


def test_a_world_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no world 3"):
        trained_concepts(3)


@pytest.mark.parametrize(
    ("noun", "phrase"), [("grapes", "grapes"), ("french fries", "french fries"), ("eagle", "an eagle")]
)
def test_articles_of_the_second_world_are_english(noun: str, phrase: str) -> None:
    assert with_article(noun) == phrase


def test_the_shipped_tokenizer_tells_all_names_apart_and_cuts_no_caption() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(tiny_world_path() / "tokenizer")
    concepts = trained_concepts(2) + load_concepts("held_out") + benchmark_concepts()
    names = {tuple(tokenizer(concept.name).input_ids) for concept in concepts}
    assert len(names) == len(concepts)
    for concept in concepts:
        scenes = [sample_scene(concept, random.Random(seed)) for seed in range(20)]
        longest = max(len(tokenizer(scene.caption()).input_ids) for scene in scenes)
        assert longest <= tokenizer.model_max_length


def latents_of(folder: Path, vae: AutoencoderKL, per_concept: int, num_processes: int = 1) -> torch.Tensor:
    found = prepare_latents(
        folder,
        FEW,
        vae,
        per_concept=per_concept,
        renders_folder=RENDERS_FOLDER,
        num_processes=num_processes,
    )
    assert len(found.captions) == len(found.labels) == len(found.latents) == 2 * per_concept
    for label, concept in enumerate(FEW):
        captions = [caption for caption, of in zip(found.captions, found.labels, strict=True) if of == label]
        assert captions == [captioned_scene(concept, number, 0)[1] for number in range(per_concept)]
    return found.latents


def test_cached_latents_are_those_of_their_captions_pictures(tmp_path: Path) -> None:
    vae = build_vae().eval()
    latents = latents_of(tmp_path, vae, 2)
    scenes = [captioned_scene(concept, number, 0)[0] for concept in FEW for number in range(2)]
    with torch.no_grad():
        expected = vae.encode(draw_scenes(scenes)).latent_dist.mean
    torch.testing.assert_close(latents.float(), expected, atol=0.05, rtol=0.05)  # encoded in bfloat16


def test_latents_are_read_again_and_another_encoder_gets_its_own(tmp_path: Path) -> None:
    vae = build_vae().eval()
    first = latents_of(tmp_path, vae, 2)
    (file,) = tmp_path.rglob("*.safetensors")
    written = file.stat().st_mtime_ns
    assert torch.equal(latents_of(tmp_path, vae, 2), first)
    assert file.stat().st_mtime_ns == written
    latents_of(tmp_path, build_vae().eval(), 2)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_more_processes_draw_the_same(tmp_path: Path) -> None:
    vae = build_vae().eval()
    assert torch.equal(
        latents_of(tmp_path / "one", vae, 2), latents_of(tmp_path / "two", vae, 2, num_processes=2)
    )


def test_pictures_are_drawn_from_the_generator_and_kept_with_their_classes(tmp_path: Path) -> None:
    fresh = FreshPictures(FEW[:1], FEW[1:], RENDERS_FOLDER)
    images, labels = fresh.draw(6, 32, torch.Generator().manual_seed(3))
    again, _ = fresh.draw(6, 32, torch.Generator().manual_seed(3))
    assert torch.equal(images, again)
    assert set(labels.tolist()) == {0, 1}
    store_pictures(tmp_path / "some.safetensors", fresh, 6, 32, 1)
    stored = StoredPictures(fresh, tmp_path / "some.safetensors")
    assert load_file(tmp_path / "some.safetensors")["pixels"].shape == (6, 3, 32, 32)
    images, labels = stored.draw(40, 32, torch.Generator().manual_seed(1))
    by_label = {int(label): image for label, image in zip(labels, images, strict=True)}
    red, green = by_label[0].mean((1, 2)), by_label[1].mean((1, 2))
    assert images.shape == (40, 3, 32, 32)
    assert not torch.equal(red, green)


def test_the_large_autoencoder_is_a_plain_one_of_factor_8_with_the_small_ones_posterior() -> None:
    small, vae = load_small_vae(), build_vae_128(load_small_vae())
    assert type(vae) is AutoencoderKL
    posterior = vae.encode(torch.randn(1, 3, 128, 128)).latent_dist
    assert posterior.mean.shape == (1, 4, 16, 16)
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, LATENT_NOISE), atol=2e-3, rtol=0)
    assert vae.config.scaling_factor == small.config.scaling_factor
    assert vae.decode(posterior.mean).sample.shape == (1, 3, 128, 128)


def test_a_widened_level_computes_what_the_narrow_one_did() -> None:
    small, vae = load_small_vae(), build_vae_128(load_small_vae())
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        narrow = small.decoder.conv_in(small.post_quant_conv(latents))
        wide = vae.decoder.conv_in(vae.post_quant_conv(latents))
        narrow, wide = small.decoder.mid_block(narrow), vae.decoder.mid_block(wide)
    mean = (wide[:, 0::2] + wide[:, 1::2]) / 2
    # Noise of 2 % breaks the copies' symmetry.
    assert float((mean - narrow).norm() / narrow.norm()) < 0.1


def test_decoder_and_critic_are_each_trained_by_their_own_loss_and_latents_stay() -> None:
    torch.manual_seed(0)
    small = load_small_vae()
    vae = build_vae_128(small)
    pictures = FreshPictures(FEW, (), RENDERS_FOLDER)
    stage = Decoder128Stage(pictures, vae, small, FeatureNet(2))
    objective = stage.model
    assert isinstance(objective, Decoder128Objective)
    batch = stage.make_batch(1, torch.Generator().manual_seed(0))
    objective(**batch).backward()
    assert all(parameter.grad is None for parameter in vae.encoder.parameters())
    decoder = vae.decoder.conv_out.weight.grad
    with torch.no_grad():
        latents = vae.encode(batch["images"]).latent_dist.mean
        fake = vae.decode(latents + batch["strength"] * batch["noise"]).sample
    ours = [grad.clone() for p in objective.critic.parameters() if (grad := p.grad) is not None]
    objective.critic.zero_grad()
    scores = objective.critic(fake) - objective.critic(batch["images"])
    torch.nn.functional.softplus(scores).mean().backward()
    for found, parameter in zip(ours, objective.critic.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, atol=1e-5, rtol=1e-3)
    assert decoder is not None
    assert decoder.abs().sum() > 0


class PaintedUNet(torch.nn.Module):
    """Answers zero: its loss is the power of what it should have said."""

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> object:
        return type("Output", (), {"sample": torch.zeros_like(noisy)})


class NoText(torch.nn.Module):
    """Answers with states of zeros."""

    def forward(self, input_ids: torch.Tensor) -> object:
        return type("Output", (), {"last_hidden_state": torch.zeros(len(input_ids), 2, 4)})


def cached(latents: torch.Tensor, labels: list[int], weights: torch.Tensor | None) -> CachedLatents:
    tokens = torch.zeros(len(latents), 24, dtype=torch.long)
    return CachedLatents(latents, tokens, torch.tensor(labels), 1.0, 0.0, weights)


def test_harder_concepts_weigh_more_within_bounds() -> None:
    latents = torch.tensor([0.0] * 4 + [1.0] * 4 + [9.0] * 4).view(12, 1, 1, 1).expand(12, 4, 16, 16)
    data = cached(latents, [0] * 4 + [1] * 4 + [2] * 4, None)
    objective = UNetObjective(PaintedUNet(), NoText())
    easy, middle, hard = weigh_concepts(data, objective, 3, torch.device("cpu")).tolist()
    assert easy == middle == BOUNDS[0]
    assert hard == BOUNDS[1]


def test_a_concept_is_drawn_as_often_as_its_weight_says() -> None:
    labels = [0] * 100 + [1] * 300
    data = cached(torch.zeros(400, 4, 16, 16), labels, torch.tensor([3.0, 1.0]))
    drawn = data.labels[data.draw(4000, torch.Generator().manual_seed(0))]
    assert float((drawn == 0).float().mean()) == pytest.approx(0.5, abs=0.03)


def test_a_lost_run_goes_on_from_an_exported_autoencoder_of_128_px(tmp_path: Path) -> None:
    vae = build_vae_128(load_small_vae())
    vae.save_pretrained(tmp_path / "exported" / "vae")
    found = load_vae_128(RunConfig(run_folder=tmp_path, init_from=tmp_path / "exported"))
    assert found is not None
    assert all(torch.equal(vae.state_dict()[name], tensor) for name, tensor in found.state_dict().items())
    assert load_vae_128(RunConfig(run_folder=tmp_path, init_from=tiny_world_path())) is None
    assert load_vae_128(RunConfig(run_folder=tmp_path)) is None

"""How Tiny World is trained: stages resume, objectives are those of diffusers, another world is larger."""

import copy
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from ether_diffusion.bases import open_base
from ether_diffusion.bases.stable_diffusion_3 import StableDiffusion3
from ether_diffusion.pipelines import EtherStableDiffusion3Pipeline
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.tiny_world.concepts import (
    RENDERS_FOLDER,
    find_concept,
    load_concepts,
    subject_concepts,
    trained_concepts,
)
from ether_diffusion.tiny_world.networks import TinyClip, load_tiny_clip
from ether_diffusion.tiny_world.pictures import draw_scenes
from ether_diffusion.tiny_world.world import Background, Scene
from recipes.tiny_world.autoencoder import LATENT_NOISE, DecoderStage, build_vae
from recipes.tiny_world.autoencoder_128 import build_vae_128
from recipes.tiny_world.average import Average
from recipes.tiny_world.checkpoint import newest_checkpoint
from recipes.tiny_world.clip import (
    build_image_tower,
    build_text_tower,
    load_text_encoder,
    to_text_encoder,
    tokenize,
)
from recipes.tiny_world.data import Composites
from recipes.tiny_world.decoder_128 import Decoder128Objective, Decoder128Stage
from recipes.tiny_world.export import export_flow_pipeline, export_image_tower
from recipes.tiny_world.features import FeatureNet
from recipes.tiny_world.flow import (
    NUM_ZEROS,
    CountedZeros,
    FlowObjective,
    FlowStage,
    build_transformer,
    embed_captions,
)
from recipes.tiny_world.fresh_pictures import FreshPictures, StoredPictures, store_pictures
from recipes.tiny_world.gpu import PLAN
from recipes.tiny_world.latents import Latents, captioned_scene, prepare_latents
from recipes.tiny_world.loop import Batch, RunConfig, Trainer
from recipes.tiny_world.scenes import sample_scene
from recipes.tiny_world.stages import STAGES, load_small_vae, load_vae_128, untrained_flow
from recipes.tiny_world.tokenizer import IDENTIFIERS, train_tokenizer
from recipes.tiny_world.unet import SCHEDULE, CachedLatents, UNetObjective
from recipes.tiny_world.weighing import BOUNDS, weigh_concepts

CAPTIONS = ["a cat on a red background", "a small apple in the snow", "an animal in space", "a dog"] * 50


class LineObjective(torch.nn.Linear):
    """Fits y = 2 x + 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = (super().forward(x) - 2 * x - 1).square().mean()
        return loss


class LineStage:
    """The smallest stage."""

    name, batch_size, learning_rate, average_decay = "line", 4, 0.05, 0.9

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: torch.nn.Module = LineObjective(1, 1)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, object]]:
        return [{"params": list(self.model.parameters()), "lr": learning_rate}]

    def make_batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        return {"x": torch.randn((batch_size, 1), generator=generator)}

    def write_sheet(self, path: Path, device: torch.device) -> None:
        path.touch()


def config_for(folder: Path, max_steps: int) -> RunConfig:
    return RunConfig(run_folder=folder, max_steps=max_steps, mixed_precision="no")


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(folder / "line")
    assert checkpoint is not None
    average = load_file(checkpoint / "average.safetensors")
    return load_file(checkpoint / "model.safetensors") | {f"average.{k}": v for k, v in average.items()}


def test_a_run_in_two_pieces_ends_with_the_bytes_of_a_run_in_one(tmp_path: Path) -> None:
    Trainer(LineStage(), config_for(tmp_path / "one", 30)).run()
    Trainer(LineStage(), config_for(tmp_path / "two", 13)).run()
    Trainer(LineStage(), config_for(tmp_path / "two", 30)).run()
    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_unfinished_checkpoint_is_never_resumed_from_and_only_the_newest_kept(tmp_path: Path) -> None:
    Trainer(LineStage(), config_for(tmp_path, 5)).run()
    unfinished = tmp_path / "line" / "unfinished"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half of a file")
    trainer = Trainer(LineStage(), config_for(tmp_path, 8))
    assert trainer.step == 5
    trainer.run()
    assert trainer.step == 8
    assert [path.name for path in (tmp_path / "line").glob("step-*")] == ["step-00000008"]


def test_sheets_are_drawn_with_averaged_weights_that_are_taken_back_after() -> None:
    model = torch.nn.Linear(2, 2)
    average = Average(model, 0.5)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(model, 1000)
    with average.swapped_in(model):
        torch.testing.assert_close(model.weight.detach(), before + 0.5)
    torch.testing.assert_close(model.weight.detach(), before + 1.0)


def test_identifiers_are_single_tokens_any_text_survives_and_the_text_tower_pools_at_the_first_end() -> None:
    tokenizer = train_tokenizer(CAPTIONS, ["cat face", "red apple", "rocket"])
    for identifier in IDENTIFIERS:
        assert len(tokenizer(identifier, add_special_tokens=False).input_ids) == 1
    kept = tokenizer.decode(tokenizer("teapot ohwx 漢").input_ids, skip_special_tokens=True)
    assert kept == "teapot ohwx 漢"
    tower, bare = build_text_tower(tokenizer).eval(), tokenizer("a cat", return_tensors="pt").input_ids
    with torch.no_grad():
        padded, short = (tower(input_ids=each).text_embeds for each in (tokenize(tokenizer, ["a cat"]), bare))
    torch.testing.assert_close(padded, short, atol=1e-5, rtol=1e-4)


class PerfectUNet(torch.nn.Module):
    """Answers with the velocity that diffusers' scheduler computes."""

    def __init__(self, latents: torch.Tensor, noise: torch.Tensor) -> None:
        super().__init__()
        self.latents, self.noise = latents, noise
        self.scheduler = DDPMScheduler(**SCHEDULE)

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> object:
        expected = self.scheduler.add_noise(self.latents, self.noise, timesteps)
        torch.testing.assert_close(noisy, expected, atol=1e-5, rtol=1e-5)
        return SimpleNamespace(sample=self.scheduler.get_velocity(self.latents, self.noise, timesteps))


def test_the_unet_objective_is_zero_for_the_velocity_of_diffusers() -> None:
    latents, noise = torch.randn(6, 4, 16, 16), torch.randn(6, 4, 16, 16)
    objective = UNetObjective(PerfectUNet(latents, noise), NoText())
    timesteps = torch.tensor([0, 1, 300, 700, 998, 999])
    loss = objective(latents, noise, timesteps, torch.zeros(6, 24, dtype=torch.long))
    assert float(loss) < 1e-8


@pytest.fixture(scope="module")
def flow() -> StableDiffusion3Pipeline:
    """The flow stage's pipeline, with weights everywhere: some begin at zero."""
    pipeline = untrained_flow()
    for parameter in pipeline.transformer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_one_counted_zero_is_all_that_the_pipeline_reads_in_place_of_t5(
    flow: StableDiffusion3Pipeline,
) -> None:
    captions, inputs = (
        ["a cat in the snow", "a dog"],
        (torch.randn(2, 4, 16, 16), torch.tensor([300.0, 700.0])),
    )
    stock, _, pooled, _ = flow.encode_prompt(*[captions] * 3, do_classifier_free_guidance=False)
    few, _ = embed_captions(flow, captions)
    assert (stock.shape[1], few.shape[1]) == (24 + NUM_ZEROS, 24 + 1)
    torch.testing.assert_close(few[:, :24].float(), stock[:, :24], rtol=1e-2, atol=1e-4)  # bfloat16
    own = flow.transformer.attn_processors
    with torch.no_grad():
        expected = flow.transformer(inputs[0], stock, pooled, inputs[1]).sample
        flow.transformer.set_attn_processor(CountedZeros())
        found = flow.transformer(inputs[0], stock[:, :25], pooled, inputs[1]).sample
    flow.transformer.set_attn_processor(own)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_velocity_of_zero_costs_what_the_flow_from_latents_to_noise_measures() -> None:
    latents, noise = torch.randn(6, 4, 16, 16), torch.randn(6, 4, 16, 16)
    objective = FlowObjective(build_transformer())  # which begins at zero
    loss = objective(latents, noise, torch.rand(6) * 1000, torch.randn(6, 25, 384), torch.randn(6, 256))
    torch.testing.assert_close(loss, (noise - latents).square().mean())


def test_a_batch_of_the_flow_stage_has_latents_with_their_captions_or_with_none() -> None:
    captions = ["a dog", "a cat"]
    stage = FlowStage(
        Latents(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 4, 16, 16), torch.arange(2), captions),
        untrained_flow(),
        captions,
    )
    batch = stage.make_batch(400, torch.Generator().manual_seed(0))
    of_cat = batch["latents"].mean((1, 2, 3)) > 0.5
    embedded, _ = embed_captions(stage.pipeline, ["", *captions])
    shown = torch.stack([(batch["sequence"] == each).all((1, 2)) for each in embedded])
    assert shown.sum(0).eq(1).all()
    assert 20 < int(shown[0].sum()) < 60
    assert torch.equal(shown[2], of_cat & ~shown[0])
    assert float(batch["timesteps"].min()) > 0
    assert batch["timesteps"].mean() == pytest.approx(500, abs=30)  # logit-normal around the middle, no shift


def test_the_flow_stage_is_exported_as_a_stock_pipeline_that_is_opened_as_stable_diffusion_3(
    flow: StableDiffusion3Pipeline, tmp_path: Path
) -> None:
    def draw(pipeline: StableDiffusion3Pipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        how = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
        return pipeline("a cat in the snow", generator=generator, **how).images

    export_flow_pipeline(tmp_path, copy.deepcopy(flow))
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None}
    stock = StableDiffusion3Pipeline.from_pretrained(tmp_path, dtype=torch.float32, **without_t5)
    stock.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(stock), draw(flow), atol=0.02, rtol=0)  # float16
    own = EtherStableDiffusion3Pipeline.from_pretrained(tmp_path, dtype=torch.float32)  # told of no T5
    own.set_progress_bar_config(disable=True)
    assert torch.equal(draw(own), draw(stock))
    base = open_base(tmp_path)
    assert (type(base), base.native_size) == (StableDiffusion3, 64)
    embeddings = base.load_text_encoders().encode(["a cat in the snow"])
    assert tuple(embeddings.sequence.shape) == (1, 24 + NUM_ZEROS, 384)


def test_the_posterior_has_a_constant_deviation_and_training_the_decoder_on_leaves_latents(
    tmp_path: Path,
) -> None:
    vae, images = build_vae(), torch.randn(1, 3, 64, 64)
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, LATENT_NOISE))
    pictures = vae.decode(posterior.mean).sample.detach()
    pixels = torch.randint(0, 255, (4, 3, 1, 1), dtype=torch.uint8).expand(4, 3, 64, 64).contiguous()
    stage = DecoderStage(Composites(pixels, torch.arange(4), [""] * 4), vae)
    Trainer(stage, config_for(tmp_path, 1).replace(batch_size=1)).train_step(0.0)
    assert torch.equal(vae.encode(images).latent_dist.mean, posterior.mean)
    assert not torch.equal(vae.decode(posterior.mean).sample, pictures)


def test_tiny_worlds_clip_embeds_texts_as_transformers_projects_them_and_survives_its_export(
    tmp_path: Path,
) -> None:
    scenes = [Scene(find_concept(name), Background("plain", "red")) for name in ("cat", "star")]
    captions = [scene.caption() for scene in scenes]
    tokenizer = train_tokenizer(captions * 10, ["cat face"])
    torch.manual_seed(0)
    tower = build_text_tower(tokenizer).eval()
    with pytest.raises(FileNotFoundError, match="image_tower"):
        load_tiny_clip(tmp_path)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    to_text_encoder(tower).save_pretrained(tmp_path / "text_encoder")
    export_image_tower(tmp_path, build_text_tower(tokenizer), build_image_tower())
    clip = load_tiny_clip(tmp_path)
    oracle = TinyClip(tokenizer, clip.text_encoder, clip.image_tower, tower.text_projection.weight.detach())
    copy = build_text_tower(tokenizer).eval()
    load_text_encoder(copy, to_text_encoder(tower))
    copy.text_projection.load_state_dict(tower.text_projection.state_dict())
    tokens = tokenize(tokenizer, captions)
    with torch.no_grad():
        expected = tower(input_ids=tokens).text_embeds
        assert torch.equal(copy(input_ids=tokens).text_embeds, expected)
    torch.testing.assert_close(oracle.embed_texts(captions), torch.nn.functional.normalize(expected, dim=-1))
    for vectors in (clip.embed_texts(captions), clip.embed_images(draw_scenes(scenes))):
        assert vectors.shape == (2, 128)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


FEW = tuple(find_concept(name) for name in ("apple", "frog"))


def test_the_second_world_trains_more_concepts_and_none_that_is_kept_out() -> None:
    trained, kept_out = trained_concepts(2), subject_concepts()
    assert trained[:48] == trained_concepts(1) == load_concepts("trained")
    assert len(trained) >= 150
    assert len(load_concepts("benchmark")) == 12
    for field in ("name", "render"):
        values = [getattr(concept, field) for concept in trained + kept_out]
        assert len(set(values)) == len(values)


def test_the_shipped_tokenizer_tells_all_names_apart_and_cuts_no_caption() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(tiny_world_path() / "tokenizer")
    concepts = trained_concepts(2) + subject_concepts()
    names = {tuple(tokenizer(concept.name).input_ids) for concept in concepts}
    assert len(names) == len(concepts)
    for concept in concepts:
        scenes = [sample_scene(concept, random.Random(seed)) for seed in range(20)]
        longest = max(len(tokenizer(scene.caption()).input_ids) for scene in scenes)
        assert longest <= tokenizer.model_max_length


def test_cached_latents_are_of_their_captions_pictures_read_again_and_of_one_encoder(tmp_path: Path) -> None:
    vae = build_vae().eval()

    def latents(folder: Path, vae: AutoencoderKL, **how: int) -> torch.Tensor:
        return prepare_latents(folder, FEW, vae, per_concept=2, renders_folder=RENDERS_FOLDER, **how).latents

    found = prepare_latents(tmp_path, FEW, vae, per_concept=2, renders_folder=RENDERS_FOLDER)
    scenes, captions = zip(*(captioned_scene(each, n, 0) for each in FEW for n in range(2)), strict=True)
    assert (list(found.captions), list(found.labels)) == (list(captions), [0, 0, 1, 1])
    with torch.no_grad():
        expected = vae.encode(draw_scenes(scenes)).latent_dist.mean
    torch.testing.assert_close(found.latents.float(), expected, atol=0.05, rtol=0.05)  # encoded in bfloat16
    (file,) = tmp_path.rglob("*.safetensors")
    written = file.stat().st_mtime_ns
    assert torch.equal(latents(tmp_path, vae), found.latents)
    assert file.stat().st_mtime_ns == written
    latents(tmp_path, build_vae().eval())
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert torch.equal(latents(tmp_path / "shared", vae, num_processes=2), found.latents)


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
        return SimpleNamespace(sample=torch.zeros_like(noisy))


class NoText(torch.nn.Module):
    """Answers with states of zeros."""

    def forward(self, input_ids: torch.Tensor) -> object:
        return SimpleNamespace(last_hidden_state=torch.zeros(len(input_ids), 2, 4))


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


SCRIPT = Path(__file__).parent.parent / "recipes" / "tiny_world" / "train_on_gpu.sh"


def test_the_plan_for_a_gpu_has_stages_that_exist_and_shares_that_sum_to_one() -> None:
    assert {part.stage for part in PLAN} <= set(STAGES)
    assert sum(part.share for part in PLAN) == pytest.approx(1.0)
    assert all(RunConfig(decay_fraction=part.decay_fraction) for part in PLAN)


def test_the_script_is_bash_and_refuses_to_start_without_its_folders() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    refused = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, check=False)
    assert refused.returncode != 0

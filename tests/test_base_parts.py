"""A base's parts, loaded one at a time, do what the whole pipeline of diffusers does with them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from tiny_pipelines import tiny_sd, tiny_sdxl

from ether_diffusion.bases import open_base
from ether_diffusion.bases.images import encode_images, scale_latents
from ether_diffusion.bases.stable_diffusion import SDXL, DiscreteNoise, StableDiffusion
from ether_diffusion.tiny_world import tiny_world_path

PROMPTS = ["a cat", "", "two dogs on a hill"]


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_sdxl().save_pretrained(folder)
    return folder


def changed(folder: Path, target: Path, file: str, **changes: object) -> Path:
    shutil.copytree(folder, target)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


def encoded_by_diffusers(folder: Path) -> tuple[torch.Tensor, ...]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    encoded: tuple[torch.Tensor, ...] = pipe.encode_prompt(
        PROMPTS, device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return encoded


@torch.no_grad()
def test_prompts_become_the_embeddings_of_diffusers(sd: Path) -> None:
    embeddings = open_base(sd).load_text_encoders().encode(PROMPTS)
    assert torch.equal(embeddings.sequence, encoded_by_diffusers(sd)[0])
    assert embeddings.pooled is None


@torch.no_grad()
def test_prompts_of_sdxl_become_sequences_and_pooled_embeddings(sdxl: Path) -> None:
    embeddings = open_base(sdxl).load_text_encoders().encode(PROMPTS)
    sequence, _, pooled, _ = encoded_by_diffusers(sdxl)
    assert torch.equal(embeddings.sequence, sequence)
    assert embeddings.pooled is not None
    assert torch.equal(embeddings.pooled, pooled)


def test_each_part_is_the_pipelines_own_and_frozen(sd: Path) -> None:
    base, pipe = open_base(sd), StableDiffusionPipeline.from_pretrained(sd)
    for mine, theirs in ((base.load_denoiser(), pipe.unet), (base.load_vae(), pipe.vae)):
        assert not any(parameter.requires_grad for parameter in mine.parameters())
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[name], tensor), name


def test_latents_are_those_that_diffusers_image_to_image_starts_from(sd: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sd)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    mean, std = encode_images(pipe.vae, images)
    posterior = pipe.vae.encode(images).latent_dist
    drawn = posterior.sample(torch.Generator().manual_seed(0)) * pipe.vae.config.scaling_factor
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scale_latents(pipe.vae, mean + std * noise), drawn)


def test_the_embedded_base_is_known_by_its_alias() -> None:
    base = open_base("tiny_world")
    assert (base.name, base.folder) == ("tiny_world", tiny_world_path())
    assert (type(base), base.is_inpainting, base.prediction_type) == (StableDiffusion, False, "v_prediction")
    assert (base.native_size, base.vae_scale_factor, base.size_multiple) == (64, 4, 8)


def test_noise_is_added_as_the_bases_own_scheduler_says() -> None:
    noise = open_base("tiny_world").load_noise()
    assert isinstance(noise, DiscreteNoise)
    scheduler = noise.scheduler
    own = StableDiffusionPipeline.from_pretrained(tiny_world_path()).scheduler
    assert scheduler.config.prediction_type == own.config.prediction_type
    assert scheduler.config.rescale_betas_zero_snr
    assert scheduler.alphas_cumprod[-1] == 0  # nothing is left of the picture at the last timestep


def test_families_are_told_by_their_configs(sdxl: Path, tmp_path: Path) -> None:
    assert isinstance(open_base(sdxl), SDXL)
    pipe = tiny_sd()
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)
    pipe.save_pretrained(tmp_path / "inpainting")
    assert open_base(tmp_path / "inpainting").is_inpainting


def test_a_vae_of_another_folder_takes_the_bases_place(sd: Path, tmp_path: Path) -> None:
    other = tiny_sd(seed=7).vae
    other.save_pretrained(tmp_path / "vae")
    vae = open_base(sd, vae=str(tmp_path / "vae")).load_vae()
    assert torch.equal(vae.encoder.conv_in.weight, other.encoder.conv_in.weight)


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("unet/config.json", {"in_channels": 7}, "takes 7 channels; use one of 4"),
        (
            "unet/config.json",
            {"addition_embed_type": "text_time"},
            "use Stable Diffusion 1.x",
        ),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "flow"},
            "predicts .flow.; use one of",
        ),
    ],
)
def test_what_is_no_stable_diffusion_is_refused(
    sd: Path, tmp_path: Path, file: str, changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_base(changed(sd, tmp_path / "other", file, **changes))


def test_a_folder_without_a_pipeline_is_refused(sd: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no model_index\.json"):
        open_base(sd / "unet")


def test_a_missing_part_is_named(sd: Path, tmp_path: Path) -> None:
    shutil.copytree(sd, tmp_path / "base", ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(ValueError, match=r"has no vae/config\.json"):
        open_base(tmp_path / "base")


def test_a_damaged_part_is_named(sd: Path, tmp_path: Path) -> None:
    shutil.copytree(sd, tmp_path / "base")
    weights = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"unet in .* is damaged; fetch or save it again"):
        open_base(tmp_path / "base").load_denoiser()


def test_an_empty_unet_has_the_modules_and_shapes_and_no_weights(sd: Path) -> None:
    base = open_base(sd)
    empty, whole = base.empty_denoiser(), base.load_denoiser()
    assert {name: p.shape for name, p in empty.named_parameters()} == {
        name: p.shape for name, p in whole.named_parameters()
    }
    assert all(parameter.is_meta for parameter in empty.parameters())

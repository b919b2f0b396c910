"""Parts of a class, a form or a noise that is not handled are refused by name, before one is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    MotionAdapter,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
    VQModel,
)
from test_base_parts import changed
from tiny_pipelines import tiny_sd, tiny_sdxl
from training_runs import config, write_photos
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from ether_diffusion.bases import decode_latents, load_base, open_base
from ether_diffusion.bases.images import encode_images
from ether_diffusion.bases.stable_diffusion import DiscreteNoise
from ether_diffusion.pipelines.opening import open_pipeline
from ether_diffusion.strict_json import Json
from ether_diffusion.training.run import train_dreambooth

BERT = {
    "vocab_size": 54,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
}


def unet_with(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(tiny_sd().unet.config, **changes)


def motion_unet() -> UNetMotionModel:
    form = {"block_out_channels": (32, 64), "motion_layers_per_block": 1, "motion_norm_num_groups": 8}
    adapter = MotionAdapter(**form, motion_num_attention_heads=2)
    return UNetMotionModel.from_unet2d(tiny_sd().unet, motion_adapter=adapter)


def vae_with(**changes: Any) -> AutoencoderKL:
    return AutoencoderKL(**{"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 4} | changes)


def with_part(folder: Path, name: str, part: Any) -> Path:
    """Save a base with another part; its other weights are not whole, so nothing of it can be loaded."""
    pipe = tiny_sd()
    pipe.register_modules(**{name: part})
    pipe.save_pretrained(folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:100])
    return folder


OTHER_PARTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "text encoder .* BertModel": ("text_encoder", lambda: BertModel(BertConfig(**BERT))),
    "text encoder .* XLMRobertaModel": ("text_encoder", lambda: XLMRobertaModel(XLMRobertaConfig(**BERT))),
    "text encoder .* T5EncoderModel": (
        "text_encoder",
        lambda: T5EncoderModel(
            T5Config(vocab_size=54, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
    ),
    "text encoder .* CLIPTextModelWithProjection": (
        "text_encoder",
        lambda: CLIPTextModelWithProjection(tiny_sdxl().text_encoder_2.config),
    ),
    "VAE .* VQModel": ("vae", lambda: VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)),
    "VAE .* AsymmetricAutoencoderKL": (
        "vae",
        lambda: AsymmetricAutoencoderKL(
            down_block_out_channels=(8,), up_block_out_channels=(8,), norm_num_groups=4
        ),
    ),
    "latent_channels=16; use one with 4": ("vae", lambda: vae_with(latent_channels=16)),
    "in_channels=6; use one with 3": ("vae", lambda: vae_with(in_channels=6, out_channels=6)),
    "UNet .* UNetMotionModel": ("unet", motion_unet),
    "UNet .* wants num_class_embeds=10": ("unet", lambda: unet_with(num_class_embeds=10)),
    "UNet .* wants class_embed_type=timestep": ("unet", lambda: unet_with(class_embed_type="timestep")),
    "UNet .* wants addition_embed_type=image": (
        "unet",
        lambda: unet_with(addition_embed_type="image", encoder_hid_dim=32),
    ),
    "UNet .* wants encoder_hid_dim_type=image_proj": (
        "unet",
        lambda: unet_with(encoder_hid_dim_type="image_proj", encoder_hid_dim=32),
    ),
    "UNet .* takes 8 channels": ("unet", lambda: unet_with(in_channels=8)),
    "UNet .* gives 8 channels": ("unet", lambda: unet_with(out_channels=8)),
    "reads text of width 48, .* give 32": ("unet", lambda: unet_with(cross_attention_dim=48)),
    "scheduler .* FlowMatchEulerDiscreteScheduler": (
        "scheduler",
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    ),
    "scheduler .* KarrasVeScheduler": ("scheduler", lambda: diffusers.KarrasVeScheduler()),
}


@pytest.mark.parametrize("sentence", OTHER_PARTS)
def test_a_part_of_another_kind_is_refused_by_name_before_any_is_loaded(
    tmp_path: Path, sentence: str
) -> None:
    name, make = OTHER_PARTS[sentence]
    folder = with_part(tmp_path, name, make())
    for load in (open_base, load_base):
        with pytest.raises(ValueError, match=sentence):
            load(folder)


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("text_encoder/config.json", {"model_type": "xlm-roberta", "architectures": ["A"]}, "class A,"),
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "UNet .* UNet3DConditionModel"),
        (
            "tokenizer/tokenizer_config.json",
            {"tokenizer_class": "BertTokenizer"},
            "tokenizer .* BertTokenizer",
        ),
        ("model_index.json", {"tokenizer": ["transformers", "T5Tokenizer"]}, "tokenizer .* T5Tokenizer"),
        ("scheduler/scheduler_config.json", {"_class_name": "IPNDMScheduler"}, "scheduler .* IPNDMScheduler"),
    ],
)
def test_a_part_is_what_its_own_config_and_the_index_both_say(
    tmp_path: Path, file: str, changes: dict[str, object], sentence: str
) -> None:
    tiny_sd().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=sentence):
        open_base(changed(tmp_path / "base", tmp_path / "other", file, **changes))


def test_a_class_that_the_libraries_do_not_know_is_named(tmp_path: Path) -> None:
    tiny_sd().save_pretrained(tmp_path / "base")
    parts = {"text_encoder": ["transformers", "ChineseCLIPReader"]}
    folder = changed(tmp_path / "base", tmp_path / "other", "model_index.json", **parts)
    with pytest.raises(ValueError, match="ChineseCLIPReader, which is not handled here"):
        load_base(folder)


def test_a_refiner_of_other_size_conditions_is_refused(tmp_path: Path) -> None:
    pipe = tiny_sdxl()
    pipe.unet = UNet2DConditionModel.from_config(
        pipe.unet.config, projection_class_embeddings_input_dim=5 * 8 + 32
    )
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reads 72 numbers of sizes and pooled text, and there are 80"):
        open_base(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"time_cond_proj_dim": 16},
        {"mid_block_type": None},
        {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 32},
    ],
)
def test_unets_that_need_nothing_further_are_opened_and_drawn_with(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    pipe = tiny_sd()
    pipe.unet = unet_with(**changes)
    pipe.save_pretrained(tmp_path)
    ours = open_pipeline(open_base(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    ours.set_progress_bar_config(disable=True)
    assert ours("a", num_inference_steps=1, height=16, width=16, seed=0).images[0].size == (16, 16)


def tiny_vae() -> AutoencoderTiny:
    torch.manual_seed(6)
    sides = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,)}
    return AutoencoderTiny(**sides, num_encoder_blocks=(1,), num_decoder_blocks=(1,)).eval()


def test_taesd_encodes_and_decodes_as_it_does_by_itself(tmp_path: Path) -> None:
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "taesd")
    tiny_sd().save_pretrained(tmp_path / "base")
    ours = open_base(tmp_path / "base", vae=str(tmp_path / "taesd")).load_vae()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(images).latents
        expected = (vae.decode(latents).sample * 127.5 + 127.5).clamp(0, 255).round()
    mean, std = encode_images(ours, images)
    assert torch.equal(mean, latents)
    assert not std.any()
    for picture, values in zip(decode_latents(ours, latents), expected, strict=True):
        found = torch.tensor(np.array(picture)).permute(2, 0, 1)
        torch.testing.assert_close(found.float(), values, rtol=0, atol=1)  # a step of rounding


@pytest.mark.parametrize("place", ["in the base", "beside it"])
def test_a_run_trains_and_draws_with_taesd(tmp_path: Path, place: str) -> None:
    pipe = tiny_sd()
    flags: dict[str, Json] = {"max_train_steps": 1, "validation_prompt": ["a sks cat"]}
    flags |= {"num_validation_images": 1, "validation_num_inference_steps": 1}
    if place == "in the base":
        pipe.vae = tiny_vae()
    else:
        tiny_vae().save_pretrained(tmp_path / "taesd")
        flags["pretrained_vae_model_name_or_path"] = str(tmp_path / "taesd")
    pipe.save_pretrained(tmp_path / "base")
    assert train_dreambooth(config(tmp_path, **flags)) == 0


def test_a_vae_that_divides_sides_otherwise_says_the_size_of_latents(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    AutoencoderTiny().save_pretrained(tmp_path / "taesd")
    tiny_sd().save_pretrained(tmp_path / "base")
    assert open_base(tmp_path / "base", vae=str(tmp_path / "taesd")).vae_scale_factor == 8
    assert "divides sides by 8, and the base's own by 1" in caplog.text


SAME_NOISE: dict[str, Callable[[], Any]] = {
    "LCM": lambda: diffusers.LCMScheduler(),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(),
    "TCD": lambda: diffusers.TCDScheduler(beta_schedule="linear"),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(beta_end=0.012, timestep_spacing="trailing"),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="v_prediction", use_karras_sigmas=True
    ),
    "DPM++": lambda: diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2"),
    "PNDM of its own betas": lambda: diffusers.PNDMScheduler(trained_betas=[0.01] * 1000),
    "DDIM to zero": lambda: diffusers.DDIMScheduler(rescale_betas_zero_snr=True, num_train_timesteps=500),
}


@pytest.mark.parametrize("is_pruned", [False, True], ids=["whole", "without defaults"])
@pytest.mark.parametrize("name", SAME_NOISE)
def test_noise_is_that_of_the_bases_scheduler_whatever_its_class(
    tmp_path: Path, name: str, is_pruned: bool
) -> None:
    own = SAME_NOISE[name]()
    pipe = tiny_sd()
    pipe.scheduler = own
    pipe.save_pretrained(tmp_path)
    if is_pruned:  # as written by hand: what the class has by default is left out
        file = tmp_path / "scheduler" / "scheduler_config.json"
        kept = type(own)().config
        values = {key: v for key, v in json.loads(file.read_text()).items() if kept.get(key) != v}
        file.write_text(json.dumps(values))
    noise = open_base(tmp_path).load_noise()
    assert isinstance(noise, DiscreteNoise)
    ours = noise.scheduler
    assert torch.equal(ours.alphas_cumprod, own.alphas_cumprod)
    assert ours.config.prediction_type == own.config.prediction_type
    assert ours.config.num_train_timesteps == own.config.num_train_timesteps


OTHER_NOISE: dict[str, Callable[[], Any]] = {
    "the noise of EDMEulerScheduler": lambda: diffusers.EDMEulerScheduler(),
    "the noise of EDMDPMSolverMultistepScheduler": lambda: diffusers.EDMDPMSolverMultistepScheduler(),
    "EulerDiscreteScheduler with timestep_type=continuous": lambda: diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction"
    ),
    "UniPCMultistepScheduler with use_flow_sigmas=True": lambda: diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True
    ),
    "10 trained_betas for num_train_timesteps=1000": lambda: diffusers.DDIMScheduler(
        trained_betas=[0.1] * 10
    ),
}


@pytest.mark.parametrize("sentence", OTHER_NOISE)
def test_noise_of_another_kind_is_not_trained_on(tmp_path: Path, sentence: str) -> None:
    pipe = tiny_sd()
    pipe.scheduler = OTHER_NOISE[sentence]()
    pipe.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=sentence):
        train_dreambooth(config(tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_noise_of_edm_is_drawn_with_as_diffusers_does(tmp_path: Path, kind: str) -> None:
    pipe = tiny_sd()
    pipe.scheduler = getattr(diffusers, kind)()
    pipe.save_pretrained(tmp_path)
    ours = open_pipeline(open_base(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path)
    options: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    drawn = []
    for each in (ours, theirs):
        each.set_progress_bar_config(disable=True)
        drawn.append(each("a", generator=torch.Generator().manual_seed(0), **options).images)
    assert (drawn[0] == drawn[1]).all()


def test_a_run_on_foreign_parts_says_so_and_writes_nothing(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    with_part(tmp_path / "base", "text_encoder", BertModel(BertConfig(**BERT)))
    with pytest.raises(ValueError, match=r"text encoder of .* is of the class BertModel"):
        train_dreambooth(config(tmp_path))
    assert not (tmp_path / "run").exists()

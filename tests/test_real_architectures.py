"""SD 1.5 and SDXL train, save, load and export with their real UNets: every width, every kind of layer.

The UNets are those of the published configs, at random weights: SD 1.5's 860 million in float32; SDXL's in
bfloat16 with two of the ten equal layers in a stack, whose whole names and counts test_tuner and
test_export_factors hold. Text encoders and autoencoder have the right widths and one layer; photos are 64 px,
latents 8 × 8. One update is done, and nothing is said about pictures.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from real_configs import CONFIGS
from safetensors.torch import load_file
from tiny_pipelines import tiny_tokenizer
from torch import nn
from training_runs import config, log_of, write_photos
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ether_diffusion import load_ether
from ether_diffusion.strict_json import Json
from ether_diffusion.training.run import train_dreambooth

UNETS = {"sd15": CONFIGS["sd15"], "sdxl": CONFIGS["sdxl"] | {"transformer_layers_per_block": [1, 2, 2]}}
NUM_PROJECTIONS = {"sd15": 128, "sdxl": 176}
NUM_PARAMETERS = {"sd15": 398_592, "sdxl": 789_504}
"""Of ETHER+ on both sides: twice the widths in and out of every projection."""
DTYPES = {"sd15": torch.float32, "sdxl": torch.bfloat16}


def random_unet(name: str) -> UNet2DConditionModel:
    """Build a UNet whose weights repeat a million random numbers: billions would take minutes to draw."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name]).to(DTYPES[name])
    unet.to_empty(device="cpu")
    numbers = torch.randn(2**20 + 7)
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            flat = module.weight.data.view(-1)
            scaled = (numbers / math.sqrt(module.weight[0].numel())).to(flat.dtype)
            for start in range(0, len(flat), len(scaled)):
                flat[start : start + len(scaled)] = scaled[: len(flat) - start]
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return unet


def encoder(kind: Any, width: int) -> Any:
    tokenizer = tiny_tokenizer()
    return kind(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=width,
            projection_dim=width,
            num_hidden_layers=1,
            num_attention_heads=width // 64,
            vocab_size=len(tokenizer),
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def save_base(name: str, folder: Path) -> None:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=4,
        latent_channels=4,
    )
    parts = {
        "vae": vae,
        "unet": random_unet(name),
        "text_encoder": encoder(CLIPTextModel, 768),
        "tokenizer": tiny_tokenizer(),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
    }
    if name == "sdxl":
        second = encoder(CLIPTextModelWithProjection, 1280)
        pipe: Any = StableDiffusionXLPipeline(
            **parts, text_encoder_2=second, tokenizer_2=tiny_tokenizer(), add_watermarker=False
        )
    else:
        absent = {"safety_checker": None, "feature_extractor": None}
        pipe = StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)
    pipe.save_pretrained(folder)


@pytest.fixture(params=NUM_PROJECTIONS)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def base(name: str, tmp_path: Path) -> Iterator[Path]:
    """A base of gigabytes, which is gone after the test."""
    save_base(name, tmp_path / "base")
    yield tmp_path / "base"
    shutil.rmtree(tmp_path / "base")


def answer(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(unet.dtype)

    context = unet.config.cross_attention_dim
    conditions = {"text_embeds": draw(1, 1280), "time_ids": torch.full((1, 6), 64).to(unet.dtype)}
    with torch.no_grad():
        sample: torch.Tensor = unet(
            draw(1, 4, 8, 8), torch.tensor([500]), draw(1, 16, context), added_cond_kwargs=conditions
        ).sample
    return sample.float()


def test_a_step_is_done_saved_loaded_and_exported(name: str, base: Path, tmp_path: Path) -> None:
    flags: dict[str, Json] = {
        "instance_data_dir": str(write_photos(tmp_path / "photos", count=1)),
        "resolution": 64,
        "max_train_steps": 1,
        "num_blocks": 4,
        "learning_rate": 0.1,
        "export_lora": True,
        "mixed_precision": "no" if name == "sd15" else "bf16",
    }
    assert train_dreambooth(config(tmp_path, **flags)) == 0
    run = tmp_path / "run"
    (line,) = log_of(run)
    assert math.isfinite(line["loss"])
    tensors = load_file(run / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == NUM_PARAMETERS[name]

    pipe = DiffusionPipeline.from_pretrained(base, dtype=DTYPES[name])
    plain = answer(pipe.unet)
    assert load_ether(pipe, run).components == {"unet": NUM_PROJECTIONS[name]}
    adapted = answer(pipe.unet)
    assert adapted.isfinite().all()
    pipe.unload_lora_weights()
    assert torch.equal(answer(pipe.unet), plain)
    pipe.load_lora_weights(run)
    exported = answer(pipe.unet)
    change = (adapted - plain).abs().max()
    assert change > 0.1
    rounding = 0.01 if name == "sd15" else 0.1  # bfloat16's, over 22 transformer blocks
    assert (adapted - exported).abs().max() < rounding * change

"""A picture that shows nothing is named with the reason, wherever it is drawn; one drawn black is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Capture, Log
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from tiny_pipelines import tiny_sd, tiny_sdxl
from training_runs import config
from transformers import CLIPConfig, CLIPImageProcessor

from ether_diffusion.bases import Fault, decode_latents, fault_of, to_pictures
from ether_diffusion.metrics.scores import find_fault
from ether_diffusion.pipelines import EtherStableDiffusionPipeline, EtherStableDiffusionXLPipeline
from ether_diffusion.scripts import ether
from ether_diffusion.strict_json import Json
from ether_diffusion.training.run import train_dreambooth

DRAWN = {"num_inference_steps": 1, "height": 16, "width": 16, "seed": 3}


def checked_sd() -> StableDiffusionPipeline:
    """A pipeline whose safety checker takes everything for unsafe."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, text_config=tower, projection_dim=16)
    )
    checker.concept_embeds_weights.data.fill_(-9)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    parts = {
        **tiny_sd().components,
        "safety_checker": checker,
        "feature_extractor": CLIPImageProcessor(**size),
    }
    return StableDiffusionPipeline(**parts)


def overflowing(pipe: Any) -> Any:
    """Make a VAE whose activations float16 cannot hold, and float32 can, as SDXL's first."""
    for resnet in pipe.vae.decoder.up_blocks[0].resnets:
        resnet.conv2.weight.data *= 3e5
    return pipe


def broken_sd() -> Any:
    """A pipeline whose UNet gives what no number format holds."""
    pipe = tiny_sd()
    pipe.unet.conv_out.bias.data.fill_(torch.inf)
    return pipe


def colour_sd(value: float) -> Any:
    """A pipeline that draws one colour, -1 to 1 from black to white, whatever it is asked for."""
    pipe = tiny_sd()
    pipe.vae.decoder.conv_out.weight.data.zero_()
    pipe.vae.decoder.conv_out.bias.data.fill_(value)
    return pipe


def generate(folder: Path, pipe: Any, *more: str) -> int:
    pipe.save_pretrained(folder / "base")
    arguments = ["--base", str(folder / "base"), "--prompt", "a fox", "--steps", "1", "--size", "16", *more]
    return ether.main(["generate", *arguments, "--output", str(folder / "x.png")])


FAULTY: dict[str, tuple[Callable[[], Any], Fault]] = {
    "safety checker": (checked_sd, Fault.BLACKENED),
    "not finite": (broken_sd, Fault.NOT_FINITE),
    "grey": (lambda: colour_sd(0.0), Fault.EMPTY),
    "brown": (lambda: colour_sd(-0.5), Fault.EMPTY),
}


@pytest.mark.parametrize("name", FAULTY)
def test_generate_names_what_shows_nothing(tmp_path: Path, caplog: Log, capsys: Capture, name: str) -> None:
    make, fault = FAULTY[name]
    assert generate(tmp_path, make(), "--seed", "3") == 3
    assert f"the picture of seed 3 {fault}" in caplog.text
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "x.png")
    assert "no picture shows anything" in said.err
    with Image.open(tmp_path / "x.png") as image:  # it is written, as diffusers would
        assert image.size == (16, 16)


@pytest.mark.parametrize("value", [-1.0, -4.0, 4.0])
def test_a_picture_drawn_black_or_white_is_good(tmp_path: Path, caplog: Log, value: float) -> None:
    assert generate(tmp_path, colour_sd(value)) == 0
    assert not caplog.text


def test_a_good_picture_beside_a_faulty_one_is_a_success(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((3, 4, 4, 3), np.float32)
    values[1, 2, 2, 0] = np.nan
    faults = [fault_of(picture) for picture in to_pictures(values, [True, False, False])]
    assert faults == [Fault.BLACKENED, Fault.NOT_FINITE, None]


@pytest.mark.parametrize("kind", [EtherStableDiffusionPipeline, EtherStableDiffusionXLPipeline])
def test_a_vae_that_overflows_in_float16_decodes_in_float32(tmp_path: Path, caplog: Log, kind: Any) -> None:
    is_xl = kind is EtherStableDiffusionXLPipeline
    pipe = overflowing(tiny_sdxl() if is_xl else tiny_sd())
    pipe.vae.register_to_config(force_upcast=False)  # else diffusers' SDXL casts it itself
    pipe.save_pretrained(tmp_path)
    half, full = (kind.from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.float16, torch.float32))
    pictures = []
    for each in (half, full):
        each.set_progress_bar_config(disable=True)
        pictures.append(np.asarray(each("a fox", **DRAWN).images[0]).astype(int))
    assert "the VAE overflows in float16; it decodes in float32 instead" in caplog.text
    assert half.vae.dtype == torch.float16
    assert not half.vae.decoder._forward_hooks
    assert np.abs(pictures[0] - pictures[1]).mean() < 2  # of 255: the UNet worked in float16
    assert pictures[1].std() > 5


def test_latents_are_decoded_in_float32_where_half_precision_overflows() -> None:
    vae = overflowing(tiny_sd()).vae
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = np.asarray(decode_latents(vae, latents)[0]).astype(int)
    found = decode_latents(vae.to(torch.float16), latents)[0]
    assert fault_of(found) is None
    assert np.abs(np.asarray(found).astype(int) - expected).max() <= 2


def test_arrays_are_as_diffusers_gives_them_and_tuples_have_pictures(tmp_path: Path) -> None:
    checked_sd().save_pretrained(tmp_path)
    pipe = EtherStableDiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    images, flagged = pipe("a fox", return_dict=False, **DRAWN)
    assert flagged == [True]
    assert fault_of(images[0]) is Fault.BLACKENED
    assert pipe("a fox", **DRAWN).nsfw_content_detected == [True]
    assert isinstance(pipe("a fox", output_type="np", **DRAWN).images, np.ndarray)


def test_evaluation_sets_a_blackened_picture_aside_by_its_reason(tmp_path: Path) -> None:
    checked_sd().save_pretrained(tmp_path)
    pipe = EtherStableDiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert find_fault(pipe("a fox", **DRAWN).images[0]) == Fault.BLACKENED


def test_a_validation_picture_that_shows_nothing_is_named(tmp_path: Path, caplog: Log) -> None:
    colour_sd(0.2).save_pretrained(tmp_path / "base")
    flags: dict[str, Json] = {
        "validation_prompt": ["a sks cat"],
        "num_validation_images": 2,
        "max_train_steps": 1,
        "seed": 5,
    }
    assert train_dreambooth(config(tmp_path, **flags)) == 0
    for seed in (5, 6):
        assert f'the picture of "a sks cat" with seed {seed} {Fault.EMPTY}' in caplog.text

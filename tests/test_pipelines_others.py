"""Any pipeline of diffusers with a UNet takes an adapter through load_ether, as text-to-image does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from tiny_pipelines import tiny_sd, tiny_sdxl
from torch import Tensor
from trained_adapters import CONFIGS, save_adapter

from ether_diffusion import load_ether
from ether_diffusion.adapters.export import export_lora, export_merged

SIZE = 16


def image(seed: int) -> Tensor:
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def controlnet(pipe: StableDiffusionPipeline) -> StableDiffusionControlNetPipeline:
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4,))
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.1)  # they start at zero, which would hide them
    return StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=net.eval(), requires_safety_checker=False
    )


PIPELINES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], dict[str, Any]]] = {
    "img2img": (
        tiny_sd,
        lambda pipe: StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False),
        {"image": image(1), "strength": 0.9},
    ),
    "inpaint": (
        tiny_sd,
        lambda pipe: StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False),
        {"image": image(1), "mask_image": image(2)[:, :1].round(), "height": SIZE, "width": SIZE},
    ),
    "controlnet": (tiny_sd, controlnet, {"image": image(3)}),
    "sdxl_img2img": (
        tiny_sdxl,
        lambda pipe: StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False),
        {"image": image(1), "strength": 0.9},
    ),
}


def draw(pipe: Any, options: dict[str, Any]) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    images: Tensor = pipe(
        "abc", num_inference_steps=3, guidance_scale=3.0, generator=generator, output_type="pt", **options
    ).images
    return images


@pytest.fixture(params=PIPELINES)
def drawer(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A function that makes a fresh pipeline of a kind, and its options; an adapter lies in fox."""
    make, wrap, options = PIPELINES[request.param]
    torch.manual_seed(0)
    save_adapter(make(), CONFIGS["ether_plus"], tmp_path / "fox")

    def fresh() -> Any:
        torch.manual_seed(0)
        return wrap(make())

    return fresh, options


def test_an_adapter_draws_as_its_exported_lora_and_its_merged_model(
    drawer: tuple[Callable[[], Any], dict[str, Any]], tmp_path: Path
) -> None:
    fresh, options = drawer
    adapted, lora = fresh(), fresh()
    load_ether(adapted, tmp_path / "fox", adapter_name="fox")
    adapted.set_adapters(["fox"], [0.7])
    drawn = draw(adapted, options)
    export_lora(tmp_path / "fox", lora, tmp_path / "lora", dtype=torch.float32)
    lora.load_lora_weights(tmp_path / "lora", adapter_name="fox")
    lora.set_adapters(["fox"], [0.7])
    torch.testing.assert_close(drawn, draw(lora, options), rtol=0, atol=2e-5)  # two float32 paths
    merged = fresh()
    export_merged(tmp_path / "fox", merged.unet, tmp_path / "merged", scale=0.7)
    merged.unet = type(merged.unet).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(drawn, draw(merged, options), rtol=0, atol=2e-5)  # as above
    assert (drawn - draw(fresh(), options)).abs().max() > 1e-4


def test_strength_0_and_unloading_give_the_base_bit_for_bit(
    drawer: tuple[Callable[[], Any], dict[str, Any]], tmp_path: Path
) -> None:
    fresh, options = drawer
    pipe, base = fresh(), draw(fresh(), options)
    load_ether(pipe, tmp_path / "fox", adapter_name="fox")
    pipe.set_adapters(["fox"], [0.0])
    assert torch.equal(draw(pipe, options), base)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe, options), base)

"""The control pipelines are ours with a control image: apart in strength, composable, and said in PNGs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from control_encoders import control_images, random_encoder
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from tiny_pipelines import tiny_sd, tiny_sdxl
from torch import Tensor, nn
from trained_adapters import CONFIGS, save_adapter, train

from ether_diffusion import load_ether
from ether_diffusion.adapters import detach_adapter
from ether_diffusion.control import control_image_sha256, controlled, save_control
from ether_diffusion.pipelines import (
    EtherControlPipeline,
    EtherControlXLPipeline,
    EtherStableDiffusionPipeline,
    EtherStableDiffusionXLPipeline,
    parse_metadata,
)
from ether_diffusion.pipelines.metadata import KEYWORD

KINDS: dict[str, Any] = {
    "sd": (tiny_sd, StableDiffusionPipeline, EtherStableDiffusionPipeline, EtherControlPipeline),
    "sdxl": (tiny_sdxl, StableDiffusionXLPipeline, EtherStableDiffusionXLPipeline, EtherControlXLPipeline),
}
SIDE = 16


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def saved(kind: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a control adapter and its encoder."""
    torch.manual_seed(0)
    trained, folder = kind[0](), tmp_path_factory.mktemp("saved") / "control"
    train(trained.unet, CONFIGS["ether_plus"])
    encoder = random_encoder(trained.unet, factor=1, control_type="silhouette")
    save_control(folder, encoder, adapter=detach_adapter(trained.unet, "default"))
    return folder


@pytest.fixture
def pipe(kind: Any, saved: Path) -> Any:
    """A pipeline with both, "control", which is active."""
    pipe = quiet(kind[3].from_pipe(kind[0]()))
    pipe.load_control_weights(saved)
    return pipe


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: Any = "abc", **options: Any) -> Tensor:
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt", "seed": 7} | options
    images: Tensor = pipe(prompt, height=SIDE, width=SIDE, **options).images
    return images


def image(seed: int = 3) -> Tensor:
    return control_images(1, side=SIDE, seed=seed)[0].mul(255).round().div(255)


def drawn_by_diffusers(pipe: Any) -> Tensor:
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    generator = torch.Generator().manual_seed(7)
    images: Tensor = quiet(pipe)("abc", height=SIDE, width=SIDE, generator=generator, **options).images
    return images


def test_it_draws_what_diffusers_draws_without_a_control_image_and_inside_controlled(
    pipe: Any, kind: Any, saved: Path
) -> None:
    stock = kind[0]()
    load_ether(stock, saved)
    assert torch.equal(draw(pipe), drawn_by_diffusers(stock))
    with torch.no_grad(), controlled(stock.unet, pipe.controls["control"], image()[None]):
        assert torch.equal(draw(pipe, control_image=image()), drawn_by_diffusers(stock))
    pipe.unload()
    assert not pipe.controls
    assert not pipe.active_adapters
    assert torch.equal(draw(pipe), drawn_by_diffusers(kind[0]()))
    with pytest.raises(ValueError, match="no control encoder with control=None; loaded are none"):
        draw(pipe, control_image=image())


def test_the_image_and_its_strength_matter_for_a_call_alone_and_apart_from_the_adapters(pipe: Any) -> None:
    without = draw(pipe)
    one, other = draw(pipe, control_image=image(1)), draw(pipe, control_image=image(2))
    assert not torch.allclose(one, other, atol=1e-4)
    assert not torch.allclose(one, draw(pipe, control_image=image(1), control_strength=0.5), atol=1e-4)
    assert torch.equal(draw(pipe, control_image=image(1), control_strength=0.0), without)
    only_encoder = draw(pipe, control_image=image(1), adapters={})
    assert not torch.allclose(only_encoder, draw(pipe, adapters={}), atol=1e-4)
    assert not torch.allclose(only_encoder, one, atol=1e-4)
    assert torch.equal(draw(pipe), without)
    values = image(1).mul(255).round().byte().permute(1, 2, 0).numpy()
    assert torch.equal(draw(pipe, control_image=Image.fromarray(values)), one)


def test_each_prompt_follows_its_own_image_or_one_for_all(pipe: Any) -> None:
    seeds = [1, 2, 3, 4]
    together = draw(
        pipe, ["ab", "cd"], control_image=[image(1), image(2)], num_images_per_prompt=2, seed=seeds
    )
    alone = [
        draw(pipe, prompt, control_image=image(which), seed=seed)
        for prompt, which, seed in zip(["ab", "ab", "cd", "cd"], [1, 1, 2, 2], seeds, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)  # batches round differently
    one = draw(pipe, ["ab", "cd"], control_image=image())
    each = draw(pipe, ["ab", "cd"], control_image=[image(), image()])
    torch.testing.assert_close(one, each, atol=1e-4, rtol=1e-4)  # encoded alone or in a batch


def test_a_subject_adapter_and_a_control_adapter_compose(pipe: Any, kind: Any, tmp_path: Path) -> None:
    make, _, _, _ = kind
    save_adapter(make(), CONFIGS["ether"], tmp_path / "fox")
    pipe.load_ether_weights(tmp_path / "fox", adapter_name="fox", activate=False)
    both = draw(pipe, control_image=image(), adapters={"control": 1.0, "fox": 0.7})
    assert not torch.allclose(both, draw(pipe, control_image=image(), adapters={"control": 1.0}), atol=1e-4)
    assert not torch.allclose(both, draw(pipe, control_image=image(), adapters={"fox": 0.7}), atol=1e-4)
    assert not torch.allclose(both, draw(pipe, adapters={"control": 1.0, "fox": 0.7}), atol=1e-4)


def test_a_picture_says_which_control_made_it(pipe: Any) -> None:
    images = pipe(
        ["ab", "cd"],
        control_image=[image(1), image(2)],
        control_strength=0.5,
        num_inference_steps=1,
        height=SIDE,
        width=SIDE,
        seed=0,
    ).images
    found = [parse_metadata(picture.info[KEYWORD], "it") for picture in images]
    assert [one.prompt for one in found] == ["ab", "cd"]
    assert [one.options["control_strength"] for one in found] == [0.5, 0.5]
    assert [one.options["control"] for one in found] == ["control", "control"]
    assert [one.options["control_image_sha256"] for one in found] == [
        control_image_sha256(image(1)),
        control_image_sha256(image(2)),
    ]
    assert [use.name for use in found[0].adapters] == ["control"]
    made = pipe("ab", control_image=image(), num_inference_steps=1, seed=0).images[0]
    assert made.size == (8, 8)  # the base's own, where none is given


def test_an_encoder_by_itself_draws_too(kind: Any, tmp_path: Path) -> None:
    make, _, _, ours = kind
    save_control(tmp_path, random_encoder(make().unet, factor=1))
    pipe = quiet(ours.from_pipe(make()))
    assert pipe.load_control_weights(tmp_path) is None
    assert not torch.allclose(draw(pipe, control_image=image()), draw(pipe), atol=1e-4)
    pipe.unload("control")
    assert not pipe.controls


def test_several_encoders_are_told_apart_by_name(pipe: Any, kind: Any, tmp_path: Path) -> None:
    make, _, _, _ = kind
    save_control(tmp_path / "edges", random_encoder(make().unet, factor=1, seed=9))
    pipe.load_control_weights(tmp_path / "edges", adapter_name="edges")
    with pytest.raises(ValueError, match="already is a control encoder named 'edges'"):
        pipe.load_control_weights(tmp_path / "edges", adapter_name="edges")
    with pytest.raises(ValueError, match="no control encoder with control=None; loaded are control, edges"):
        draw(pipe, control_image=image())
    with pytest.raises(
        ValueError, match="no control encoder with control='depth'; loaded are control, edges"
    ):
        draw(pipe, control_image=image(), control="depth")
    one = draw(pipe, control_image=image(), control="control")
    assert not torch.allclose(one, draw(pipe, control_image=image(), control="edges"), atol=1e-4)


def test_an_encoder_for_another_vae_is_refused_before_the_adapter_is_loaded(
    kind: Any, tmp_path: Path
) -> None:
    make, _, _, ours = kind
    trained = make()
    train(trained.unet, CONFIGS["ether"])
    save_control(
        tmp_path, random_encoder(trained.unet, factor=8), adapter=detach_adapter(trained.unet, "default")
    )
    pipe = ours.from_pipe(make())
    with pytest.raises(ValueError, match="divides sides by 8 and this VAE by 1"):
        pipe.load_control_weights(tmp_path)
    assert not pipe.active_adapters
    assert not pipe.controls


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"control_strength": 0.5}, "need a control_image"),
        ({"control": "control"}, "need a control_image"),
        ({"control_image": image(), "control_strength": float("nan")}, "is not a finite number"),
        ({"control_image": [image()] * 3}, "found 3 control images for 1 prompts"),
        ({"control_image": Image.new("RGB", (32, 16))}, "crop it to the same proportions"),
    ],
)
def test_what_cannot_be_meant_is_refused(pipe: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw(pipe, **options)
    assert not pipe.unet.conv_in._forward_hooks


def test_a_saved_pipeline_is_diffusers_own(kind: Any, tmp_path: Path) -> None:
    make, stock, _, ours = kind
    ours.from_pipe(make()).save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is stock
    assert isinstance(ours.from_pretrained(tmp_path).unet, nn.Module)

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


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]


@pytest.fixture
def pipe(kind: Any, tmp_path: Path) -> Any:
    """A pipeline with a control adapter and its encoder, "control", which is active."""
    make, _, _, ours = kind
    torch.manual_seed(0)
    trained = make()
    train(trained.unet, CONFIGS["ether_plus"])
    encoder = random_encoder(trained.unet, factor=1, control_type="silhouette")
    save_control(tmp_path / "control", encoder, adapter=detach_adapter(trained.unet, "default"))
    pipe = quiet(ours.from_pipe(make()))
    pipe.load_control_weights(tmp_path / "control")
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


def test_without_a_control_image_it_draws_what_the_adapter_draws(
    pipe: Any, kind: Any, tmp_path: Path
) -> None:
    make, _, without, _ = kind
    plain = quiet(without.from_pipe(make()))
    plain.load_ether_weights(tmp_path / "control")
    assert torch.equal(draw(pipe), draw(plain))


def test_a_control_image_is_what_diffusers_draws_inside_controlled(
    pipe: Any, kind: Any, tmp_path: Path
) -> None:
    make, _, _, _ = kind
    stock = quiet(make())
    load_ether(stock, tmp_path / "control")
    with torch.no_grad(), controlled(stock.unet, pipe.controls["control"], image()[None]):
        expected = stock(
            "abc",
            height=SIDE,
            width=SIDE,
            num_inference_steps=2,
            guidance_scale=3.0,
            output_type="pt",
            generator=torch.Generator().manual_seed(7),
        ).images
    assert torch.equal(draw(pipe, control_image=image()), expected)


def test_the_image_and_its_strength_matter_and_strength_zero_is_without(pipe: Any) -> None:
    without = draw(pipe)
    one, other = draw(pipe, control_image=image(1)), draw(pipe, control_image=image(2))
    assert not torch.allclose(one, other, atol=1e-4)
    assert not torch.allclose(one, draw(pipe, control_image=image(1), control_strength=0.5), atol=1e-4)
    assert torch.equal(draw(pipe, control_image=image(1), control_strength=0.0), without)


def test_nothing_of_the_control_stays_after_a_call(pipe: Any) -> None:
    before = draw(pipe)
    draw(pipe, control_image=image())
    assert torch.equal(draw(pipe), before)


def test_the_strength_of_the_adapter_is_apart_from_that_of_the_control(pipe: Any) -> None:
    only_encoder = draw(pipe, control_image=image(), adapters={})
    assert not torch.allclose(only_encoder, draw(pipe, adapters={}), atol=1e-4)
    assert not torch.allclose(only_encoder, draw(pipe, control_image=image()), atol=1e-4)


def test_a_pil_image_is_the_tensor_of_its_values(pipe: Any) -> None:
    values = image().mul(255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(values)
    assert torch.equal(draw(pipe, control_image=picture), draw(pipe, control_image=image()))


def test_each_prompt_follows_its_own_image_also_with_several_pictures_each(pipe: Any) -> None:
    seeds = [1, 2, 3, 4]
    together = draw(
        pipe, ["ab", "cd"], control_image=[image(1), image(2)], num_images_per_prompt=2, seed=seeds
    )
    alone = [
        draw(pipe, prompt, control_image=image(which), seed=seed)
        for prompt, which, seed in zip(["ab", "ab", "cd", "cd"], [1, 1, 2, 2], seeds, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)  # batches round differently


def test_one_image_serves_all_prompts(pipe: Any) -> None:
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


def test_the_picture_is_of_the_bases_own_size_where_none_is_given(pipe: Any) -> None:
    made = pipe("ab", control_image=image(), num_inference_steps=1, seed=0).images[0]
    assert made.size == (8, 8)


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
    with pytest.raises(ValueError, match="several control encoders; name one of control, edges"):
        draw(pipe, control_image=image())
    with pytest.raises(ValueError, match="no control encoder depth; name one of control, edges"):
        draw(pipe, control_image=image(), control="depth")
    one = draw(pipe, control_image=image(), control="control")
    assert not torch.allclose(one, draw(pipe, control_image=image(), control="edges"), atol=1e-4)


def test_unloading_takes_adapter_and_encoder(pipe: Any, kind: Any) -> None:
    make, _, _, _ = kind
    pipe.unload()
    assert not pipe.controls
    assert not pipe.active_adapters
    with pytest.raises(ValueError, match="no control encoder is loaded"):
        draw(pipe, control_image=image())
    stock = quiet(make())
    expected = stock(
        "abc",
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(7),
    ).images
    assert torch.equal(draw(pipe), expected)


def test_a_name_is_taken_once(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already is a control encoder named 'control'"):
        pipe.load_control_weights(tmp_path / "control")


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

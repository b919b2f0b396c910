"""Control adapters of every method draw what training draws, weigh in as they can, and go without trace."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from control_encoders import control_images
from method_adapters import METHODS, save_method
from tiny_pipelines import tiny_sd
from torch import Tensor
from trained_adapters import CONFIGS, save_adapter

from ether_diffusion.control import controlled
from ether_diffusion.pipelines import EtherControlPipeline, parse_metadata
from ether_diffusion.pipelines.metadata import KEYWORD

SIDE = 16
OPTIONS: dict[str, Any] = {
    "height": SIDE,
    "width": SIDE,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "output_type": "pt",
}
STRENGTHLESS = ("oft", "hra", "boft", "ia3")


def image() -> Tensor:
    return control_images(1, side=SIDE)[0].mul(255).round().div(255)


def empty() -> Any:
    pipe = EtherControlPipeline.from_pipe(tiny_sd())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loaded(folder: Path, **options: Any) -> Any:
    pipe = empty()
    pipe.load_control_weights(folder, **options)
    return pipe


def draw(pipe: Any, **options: Any) -> Tensor:
    images: Tensor = pipe("abc", **OPTIONS, seed=7, **options).images
    return images


def drawn_in_training(pipe: Any, encoder: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad(), controlled(pipe.unet, encoder, image()[None]):
        images: Tensor = pipe("abc", **OPTIONS, generator=torch.Generator().manual_seed(7)).images
    return images


Saved = Callable[[str], tuple[Path, Tensor]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A control folder of each method, and what the model in training draws with it."""

    @cache
    def saved_by(method: str) -> tuple[Path, Tensor]:
        folder = tmp_path_factory.mktemp(method)
        return folder, drawn_in_training(*save_method(folder, method))

    return saved_by


@pytest.fixture(scope="module")
def base() -> Tensor:
    return draw(empty())


@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_a_loaded_adapter_draws_what_the_model_in_training_draws_and_is_named_in_the_picture(
    saved: Saved, base: Tensor, method: str
) -> None:
    folder, expected = saved(method)
    pipe = loaded(folder)
    assert torch.equal(draw(pipe, control_image=image()), expected)
    assert not torch.allclose(base, expected, atol=1e-4)
    if method != "none":
        made = pipe("ab", **OPTIONS | {"output_type": "pil"}, control_image=image(), seed=0).images[0]
        (use,) = parse_metadata(made.info[KEYWORD], "it").adapters
        assert (use.name, use.strength) == ("control", 1.0)
        assert len(use.sha256["unet"]) == 64


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_is_not_activated_changes_nothing_until_it_is_chosen(
    saved: Saved, base: Tensor, method: str
) -> None:
    folder, expected = saved(method)
    pipe = loaded(folder, activate=False)
    assert not pipe.active_adapters
    assert torch.equal(draw(pipe), base)
    assert torch.equal(draw(pipe, control_image=image(), adapters={"control": 1.0}), expected)
    assert torch.equal(draw(pipe, adapters={"control": 0.0}), base)
    assert torch.equal(draw(pipe), base)
    pipe.set_adapters(["control"])
    assert torch.equal(draw(pipe, control_image=image()), expected)


@pytest.mark.parametrize("method", METHODS)
def test_unloading_leaves_the_base_bit_for_bit(saved: Saved, method: str) -> None:
    folder, pipe = saved(method)[0], empty()
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    modules = dict(pipe.unet.named_modules())
    pipe.load_control_weights(folder)
    pipe.load_control_weights(folder, adapter_name="again")
    pipe.unload("again")
    assert not pipe.active_adapters
    pipe.unload("control")
    assert not pipe.controls
    assert dict(pipe.unet.named_modules()) == modules
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("method", ["lora", "delora"])
def test_a_strength_multiplies_what_is_added_to_the_weights(tmp_path: Path, method: str) -> None:
    trained, encoder = save_method(tmp_path, method)
    name = "lora_B" if method == "lora" else "delora_lambda"
    with torch.no_grad():
        for key, parameter in trained.unet.named_parameters():
            if name in key:
                parameter.mul_(0.5)
    expected = drawn_in_training(trained, encoder)
    pipe = loaded(tmp_path)
    whole = draw(pipe, control_image=image())
    half = draw(pipe, control_image=image(), adapters={"control": 0.5})
    torch.testing.assert_close(half, expected)
    assert torch.equal(draw(pipe, control_image=image()), whole)


def test_a_strength_of_a_lora_is_diffusers_own(saved: Saved) -> None:
    pipe = loaded(saved("lora")[0])
    chosen = draw(pipe, adapters={"control": 0.3})
    pipe.set_adapters(["control"], [0.3])
    torch.testing.assert_close(draw(pipe), chosen)
    assert pipe.adapters_in_use[0].strength == pytest.approx(0.3)


@pytest.mark.parametrize("method", STRENGTHLESS)
def test_a_strength_that_a_method_has_not_is_refused(saved: Saved, method: str) -> None:
    pipe = loaded(saved(method)[0])
    before = draw(pipe)
    with pytest.raises(ValueError, match=r"control is an adapter of (OFT|HRA|BOFT|IA3), which has no"):
        draw(pipe, adapters={"control": 0.5})
    with pytest.raises(ValueError, match="control has no strength that could be set for all calls"):
        pipe.set_adapters(["control"], [0.5])
    with pytest.raises(ValueError, match="scale does not reach control"):
        draw(pipe, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(draw(pipe), before)


def test_what_only_adapters_of_ether_can_do_is_refused(saved: Saved) -> None:
    pipe = loaded(saved("lora")[0])
    with pytest.raises(ValueError, match="control is not of ETHER, so not for one prompt alone"):
        pipe(["ab", "cd"], **OPTIONS, adapters=["control", None])
    with pytest.raises(ValueError, match="control is not of ETHER, and the base's weights would not"):
        pipe.fuse()
    assert pipe.active_adapters == ["control"]


@pytest.mark.parametrize("order", ["control, then ETHER", "ETHER, then control"])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "hra"])
def test_an_ether_works_with_an_adapter_of_another_method_in_any_order_and_goes_again(
    saved: Saved, tmp_path: Path, method: str, order: str
) -> None:
    folder, expected = saved(method)
    save_adapter(tiny_sd(), CONFIGS["ether"], tmp_path / "fox")
    pipe = empty()
    pipe.load_ether_weights(tmp_path / "fox", adapter_name="fox")
    fox = draw(pipe)
    if order == "ETHER, then control":
        pipe.load_control_weights(folder)
        assert pipe.active_adapters == ["control"]
    else:
        pipe = loaded(folder)
        pipe.load_ether_weights(tmp_path / "fox", adapter_name="fox", activate=False)
    assert torch.equal(draw(pipe, control_image=image()), expected)
    pipe.set_adapters(["control", "fox"])
    assert set(pipe.active_adapters) == {"control", "fox"}
    both = draw(pipe, control_image=image())
    assert torch.equal(draw(pipe, control_image=image(), adapters={"control": 1.0, "fox": 1.0}), both)
    pipe.set_adapters(["fox"])
    assert torch.equal(draw(pipe), fox)
    assert not torch.allclose(both, expected, atol=1e-4)
    assert not torch.allclose(both, fox, atol=1e-4)
    pipe.set_adapters(["control"])
    pipe.unload("fox")
    assert torch.equal(draw(pipe, control_image=image()), expected)


def test_hra_and_another_method_are_refused_in_either_order(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved("hra")
    save_adapter(tiny_sd(), CONFIGS["ether"], tmp_path / "fox")
    over, under = loaded(folder), empty()
    under.load_ether_weights(tmp_path / "fox", adapter_name="fox")
    before = draw(over, control_image=image()), draw(under)
    with pytest.raises(ValueError, match="HRALinear, which reads its weight past ETHER"):
        over.load_ether_weights(tmp_path / "fox", adapter_name="fox")
    with pytest.raises(ValueError, match="past which HRA reads the weights; unload it first"):
        under.load_control_weights(folder)
    assert torch.equal(draw(over, control_image=image()), before[0])
    assert torch.equal(draw(under), before[1])


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_another_save_is_refused(saved: Saved, tmp_path: Path, method: str) -> None:
    save_method(tmp_path, method, seed=1)
    shutil.copy(saved(method)[0] / "adapter_model.safetensors", tmp_path)
    pipe = empty()
    with pytest.raises(ValueError, match="were not saved together"):
        pipe.load_control_weights(tmp_path)
    assert not pipe.controls
    assert not pipe.active_adapters

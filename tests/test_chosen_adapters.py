"""Adapters chosen for a while: those and no others, and everything is put back after."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from trained_adapters import CONFIGS

from ether_diffusion.tuner import chosen_adapters

Predict = Callable[[nn.Module], Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT


@pytest.fixture
def adapted(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    for name in ("dog", "cat"):
        unet.add_adapter(replace(CONFIGS["ether"]), name)
    return unet


def test_those_and_no_others_are_in_force(
    unet: UNet2DConditionModel, adapted: UNet2DConditionModel, predict: Predict
) -> None:
    adapted.set_adapters(["cat"], [0.5])
    expected = predict(adapted)
    adapted.set_adapters(["dog"], [0.3])
    with chosen_adapters(adapted, {"cat": 0.5}):
        assert torch.equal(predict(adapted), expected)


def test_none_is_the_base(unet: UNet2DConditionModel, predict: Predict) -> None:
    base = predict(unet)
    with chosen_adapters(unet, {}):
        assert torch.equal(predict(unet), base)
    unet.add_adapter(replace(CONFIGS["ether"]), "dog")
    assert not torch.equal(predict(unet), base)
    with chosen_adapters(unet, {}):
        assert torch.equal(predict(unet), base)


def test_everything_is_put_back_also_after_an_error(adapted: UNet2DConditionModel, predict: Predict) -> None:
    adapted.set_adapters(["dog", "cat"], [0.3, 0.6])
    before, flags = predict(adapted), [p.requires_grad for p in adapted.parameters()]
    with pytest.raises(RuntimeError), chosen_adapters(adapted, {"cat": 2.0}):
        raise RuntimeError
    assert torch.equal(predict(adapted), before)
    assert [p.requires_grad for p in adapted.parameters()] == flags
    assert sorted(adapted.active_adapters()) == ["cat", "dog"]


def test_adapters_that_were_disabled_are_disabled_again(
    adapted: UNet2DConditionModel, predict: Predict
) -> None:
    expected = predict(adapted)
    adapted.disable_adapters()
    base = predict(adapted)
    with chosen_adapters(adapted, {"cat": 1.0}):
        assert torch.equal(predict(adapted), expected)
    assert torch.equal(predict(adapted), base)


def test_a_lora_is_left_out_too(unet: UNet2DConditionModel, predict: Predict) -> None:
    base = predict(unet)
    unet.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=False), "lora")
    with_lora = predict(unet)
    with chosen_adapters(unet, {}):
        assert torch.equal(predict(unet), base)
    assert torch.equal(predict(unet), with_lora)


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ({"fox": 1.0}, "no adapter named fox; loaded are cat, dog"),
        ({"dog": float("nan")}, "needs finite scales; found"),
    ],
)
def test_unknown_names_and_scales_that_are_not_finite_are_refused(
    adapted: UNet2DConditionModel, strengths: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message), chosen_adapters(adapted, strengths):
        pass


def test_merged_adapters_are_refused(adapted: UNet2DConditionModel) -> None:
    adapted.fuse_lora()
    with pytest.raises(ValueError, match="unmerge"), chosen_adapters(adapted, {}):
        pass

"""ETHER and PEFT's LoRA in one model, whichever comes first; and projections that diffusers fuses."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DConditionModel
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor
from torch.testing import assert_close

from ether_diffusion import EtherConfig, mixed_adapters
from ether_diffusion.tuner import chosen_adapters

Predict = Callable[..., Tensor]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`:UserWarning"
)  # PEFT, at a second adapter
either_order = pytest.mark.parametrize("order", [("ether", "lora"), ("lora", "ether")], ids="-".join)


def config(name: str) -> PeftConfig:
    if name == "ether":
        return EtherConfig(variant="ether_plus", init_weights=False)
    return LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)


def with_adapters(*names: str) -> UNet2DConditionModel:
    unet = tiny_unet()
    for name in names:
        torch.manual_seed(5)
        unet.add_adapter(config(name), name)
    return unet


@either_order
def test_what_is_added_last_is_in_force_alone(order: tuple[str, str], predict: Predict) -> None:
    assert torch.equal(predict(with_adapters(*order)), predict(with_adapters(order[1])))


@either_order
@torch.no_grad()
def test_their_changes_add_up_in_one_way(order: tuple[str, str], predict: Predict) -> None:
    unet = with_adapters(*order)
    for name in order:
        unet.set_adapters(name)
        assert torch.equal(predict(unet), predict(with_adapters(name)))
    unet.set_adapters(["ether", "lora"], [0.5, 2.0])
    added = predict(unet)
    module = unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    weight = tiny_unet().get_parameter("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight")
    layers = [layer for layer in module.modules() if hasattr(layer, "get_delta_weight")]
    assert len(layers) == 2
    by_name = {type(layer).__name__: layer for layer in layers}
    change = 0.5 * by_name["EtherLinear"].get_delta_weight("ether") + by_name["Linear"].get_delta_weight(
        "lora"
    )
    x = torch.randn(3, weight.shape[1])
    assert_close(module(x), x @ (weight + change).t(), atol=1e-5, rtol=1e-5)
    other = with_adapters(*order[::-1])
    other.set_adapters(["lora", "ether"], [2.0, 0.5])
    assert torch.equal(predict(other), added)


@either_order
def test_one_is_chosen_for_a_while_or_none(order: tuple[str, str], predict: Predict) -> None:
    unet = with_adapters(*order)
    for strengths, expected in (({}, tiny_unet()), ({"ether": 1.0}, with_adapters("ether"))):
        with chosen_adapters(unet, strengths):
            assert torch.equal(predict(unet), predict(expected))


@either_order
def test_both_are_fused_and_unfused(order: tuple[str, str], predict: Predict) -> None:
    unet = with_adapters(*order)
    unet.set_adapters(["ether", "lora"])
    both = predict(unet)
    for _ in range(2):
        unet.fuse_lora()
        assert_close(predict(unet), both, atol=1e-5, rtol=1e-5)
        unet.unfuse_lora()
        assert_close(predict(unet), both, atol=1e-5, rtol=1e-5)
    unet.unload_lora()
    assert_close(predict(unet), predict(tiny_unet()), atol=1e-5, rtol=1e-5)  # PEFT subtracts what it added


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")  # PEFT's LoRA, of itself
@either_order
def test_ether_alone_comes_out_bit_for_bit_beside_a_lora(order: tuple[str, str], predict: Predict) -> None:
    unet = with_adapters(*order)
    unet.set_adapters(["ether", "lora"])
    both = predict(unet)
    unet.fuse_lora(adapter_names=["ether"])
    unet.unfuse_lora()
    assert torch.equal(predict(unet), both)
    unet.unload_lora()
    assert torch.equal(predict(unet), predict(tiny_unet()))


@either_order
def test_a_file_names_the_modules_that_it_adapts(order: tuple[str, str], predict: Predict) -> None:
    alone = get_peft_model_state_dict(with_adapters("ether"), adapter_name="ether")
    found = get_peft_model_state_dict(with_adapters(*order), adapter_name="ether")
    assert found.keys() == alone.keys()
    fresh = with_adapters(*order)
    changed = {name: tensor + 1 for name, tensor in found.items()}
    assert not set_peft_model_state_dict(fresh, changed, "ether").unexpected_keys
    again = get_peft_model_state_dict(fresh, adapter_name="ether")
    assert all(torch.equal(again[name], tensor) for name, tensor in changed.items())


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
def test_a_peft_model_saved_over_a_lora_loads_without_it(predict: Predict, tmp_path: Path) -> None:
    beneath = with_adapters("lora")
    torch.manual_seed(5)
    model = get_peft_model(beneath, config("ether"), adapter_name="fox")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_unet(), str(tmp_path / "fox"), adapter_name="fox")
    assert torch.equal(predict(loaded), predict(with_adapters("ether")))


def fused_pair(first: bool) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    """Return a UNet with fused projections and an adapter, fused before or after it came, and one without."""
    unet = tiny_unet()
    if first:
        unet.fuse_qkv_projections()
    for model in (unet, plain := tiny_unet()):
        torch.manual_seed(5)
        model.add_adapter(config("ether"), "ether")
    if not first:
        unet.fuse_qkv_projections()
    return unet, plain


fused_before_or_after = pytest.mark.parametrize("first", [True, False])


@fused_before_or_after
@torch.no_grad()
def test_an_adapter_works_where_projections_are_fused(first: bool, predict: Predict) -> None:
    unet, plain = fused_pair(first)
    assert torch.equal(predict(unet), predict(plain))
    for strength in (0.4, 1.0):
        for model in (unet, plain):
            model.set_adapters("ether", strength)
        assert torch.equal(predict(unet), predict(plain))
    with mixed_adapters(unet, ["ether", None]):
        mixed = predict(unet)
    with mixed_adapters(plain, ["ether", None]):
        assert torch.equal(mixed, predict(plain))
    assert torch.equal(predict(copy.deepcopy(unet)), predict(plain))


@fused_before_or_after
def test_fused_projections_without_an_adapter_are_diffusers_own(first: bool, predict: Predict) -> None:
    base = tiny_unet()
    base.fuse_qkv_projections()
    expected = predict(base)
    unet, _ = fused_pair(first)
    predict(unet)
    with chosen_adapters(unet, {}):
        assert torch.equal(predict(unet), expected)
    unet.set_adapters("ether", 0.0)
    assert torch.equal(predict(unet), expected)
    unet.unload_lora()
    assert torch.equal(predict(unet), expected)
    assert unet.state_dict().keys() == base.state_dict().keys()


@fused_before_or_after
def test_merging_reaches_fused_projections(first: bool, predict: Predict) -> None:
    unet, plain = fused_pair(first)
    for model in (unet, plain):
        model.fuse_lora()
    assert torch.equal(predict(unet), predict(plain))
    for model in (unet, plain):
        model.unfuse_lora()
    assert torch.equal(predict(unet), predict(plain))


def test_projections_fused_with_a_merged_adapter_do_not_keep_it(predict: Predict) -> None:
    unet, plain = tiny_unet(), with_adapters("ether")
    torch.manual_seed(5)
    unet.add_adapter(config("ether"), "ether")
    unet.fuse_lora()
    unet.fuse_qkv_projections()
    assert_close(predict(unet), predict(plain), atol=1e-5, rtol=1e-5)
    unet.unfuse_lora()
    assert torch.equal(predict(unet), predict(plain))
    unet.unload_lora()
    assert_close(predict(unet), predict(tiny_unet()), atol=1e-6, rtol=1e-6)


@fused_before_or_after
def test_unfused_projections_carry_the_adapter_too(first: bool, predict: Predict) -> None:
    unet, plain = fused_pair(first)
    for fuse_again in (unet.unfuse_qkv_projections, unet.fuse_qkv_projections):
        fuse_again()
        assert torch.equal(predict(unet), predict(plain))


def test_gradients_pass_through_fused_projections() -> None:
    unet, plain = fused_pair(first=False)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 7, 32)
    found = []
    for model in (unet, plain):
        model.set_adapter("ether")
        model(*inputs)[0].square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))

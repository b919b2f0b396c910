"""Adapters chosen for a while or mixed by sample, against each alone; and ETHER beside PEFT's LoRA."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DConditionModel as UNet
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

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`:UserWarning"
)  # PEFT, at a second adapter

Predict = Callable[..., Tensor]
Context = Callable[[UNet], AbstractContextManager[None]]
CONFIGS: dict[str, PeftConfig] = {
    "ether": EtherConfig(init_weights=False),
    "plus": EtherConfig(variant="ether_plus", init_weights=False, num_blocks=2),
    "output": EtherConfig(sides="output", num_blocks=1),
    "self": EtherConfig(variant="ether_plus", init_weights=False, exclude_modules=r".*attn2.*"),
    "lora": LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False),
}
TOLERANCE = 1e-5


def with_adapters(*names: str) -> UNet:
    unet = tiny_unet()
    for name in names:
        torch.manual_seed(5)
        unet.add_adapter(replace(CONFIGS[name]), name)
    return unet


@pytest.fixture
def unet() -> UNet:
    return with_adapters("ether", "plus", "output", "self")


def inputs(batch: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, size, size), torch.randint(0, 1000, (batch,)), torch.randn(batch, 7, 32)


@torch.no_grad()
def merged_row(unet: UNet, name: str | None, scale: float, row: tuple[Tensor, ...]) -> Tensor:
    """The row alone, with the adapter merged at the scale (None: with nothing)."""
    alone = copy.deepcopy(unet)
    if name is not None:
        alone.set_adapters([name], [scale])
        alone.fuse_lora()
    alone.unload_lora()
    sample: Tensor = alone(*row)[0]
    return sample


@pytest.mark.parametrize("size", [8, 32])  # below and above where per-sample weights become the faster way
@torch.no_grad()
def test_each_row_is_its_adapter_merged(unet: UNet, size: int) -> None:
    names, scales = ["ether", None, "plus", "output", "self", "plus"], [1.0, 1.0, 0.5, 1.5, 1.0, 0.0]
    unet.set_adapters(["plus"])  # which plays no part, also where "self" has no projection
    given = inputs(len(names), size)
    with mixed_adapters(unet, names, scales=scales):
        mixed = unet(*given)[0]
    for i, (name, scale) in enumerate(zip(names, scales, strict=True)):
        row = tuple(x[i : i + 1] for x in given)
        assert_close(mixed[i : i + 1], merged_row(unet, name, scale, row), atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_a_batch_doubled_for_guidance_repeats_the_adapters(unet: UNet) -> None:
    given = inputs(4)
    with mixed_adapters(unet, ["ether", "plus", "ether", "plus"]):
        named = unet(*given)[0]
    with mixed_adapters(unet, ["ether", "plus"]):
        assert torch.equal(unet(*given)[0], named)


@pytest.mark.parametrize("how", [torch.bfloat16, torch.float16, "autocast"], ids=str)
@torch.no_grad()
def test_a_mixture_in_sixteen_bits_stays_close(unet: UNet, how: torch.dtype | str) -> None:
    given, dtype = inputs(3), how if isinstance(how, torch.dtype) else torch.bfloat16
    with mixed_adapters(unet, ["ether", None, "plus"]):
        expected = unet(*given)[0]
        if how != "autocast":
            unet.to(dtype)
            given = given[0].to(dtype), given[1], given[2].to(dtype)
    with (
        mixed_adapters(unet, ["ether", None, "plus"]),
        torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"),
    ):
        found = unet(*given)[0]
    assert found.dtype == dtype
    assert (found.float() - expected).norm() / expected.norm() < 12 * torch.finfo(dtype).eps


def test_those_that_are_chosen_and_no_others_are_in_force(unet: UNet, predict: Predict) -> None:
    unet.set_adapters(["plus"], [0.5])
    expected = predict(unet)
    unet.set_adapters(["ether"], [0.3])
    for strengths, wanted in (({"plus": 0.5}, expected), ({}, predict(tiny_unet()))):
        with chosen_adapters(unet, strengths):
            assert torch.equal(predict(unet), wanted)
    plain = tiny_unet()
    with chosen_adapters(plain, {}):
        assert torch.equal(predict(plain), predict(tiny_unet()))


CONTEXTS: dict[str, Context] = {
    "chosen": lambda unet: chosen_adapters(unet, {"ether": 2.0}),
    "mixed": lambda unet: mixed_adapters(unet, ["ether", None]),
}


@pytest.mark.parametrize(("name", "is_disabled"), [("chosen", False), ("chosen", True), ("mixed", False)])
def test_everything_is_put_back_also_after_an_error(
    name: str, is_disabled: bool, unet: UNet, predict: Predict
) -> None:
    context = CONTEXTS[name]
    unet.set_adapters(["plus", "self"], [0.5, 0.3])
    if is_disabled:
        unet.disable_adapters()
    before, flags = predict(unet), [p.requires_grad for p in unet.parameters()]
    with context(unet):
        assert not torch.equal(predict(unet), before)
    assert torch.equal(predict(unet), before)
    with pytest.raises(RuntimeError, match="on purpose"), context(unet):
        raise RuntimeError("on purpose")
    assert torch.equal(predict(unet), before)
    assert [p.requires_grad for p in unet.parameters()] == flags
    if not is_disabled:
        assert sorted(unet.active_adapters()) == ["plus", "self"]


REFUSED: dict[str, Context] = {
    "no adapter named nobody; loaded are ether, output, plus, self": lambda unet: mixed_adapters(
        unet, ["ether", "nobody"]
    ),
    "needs one adapter name .or None. per sample; found none": lambda unet: mixed_adapters(unet, []),
    "needs 2 finite scales, one per name": lambda unet: mixed_adapters(unet, ["ether", None], scales=[1.0]),
    "needs 1 finite scales, one per name": lambda unet: mixed_adapters(
        unet, ["ether"], scales=[float("nan")]
    ),
    "no adapter named fox; loaded are ether, output, plus, self": lambda unet: chosen_adapters(
        unet, {"fox": 1.0}
    ),
    "needs finite scales": lambda unet: chosen_adapters(unet, {"ether": float("nan")}),
    "carries no ETHER adapter": lambda unet: mixed_adapters(tiny_unet(), [None]),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_is_refused(unet: UNet, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence), REFUSED[sentence](unet):
        pass


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_merged_adapters_and_batches_of_another_size_are_refused(context: Context, unet: UNet) -> None:
    with (
        mixed_adapters(unet, ["ether", None]),
        pytest.raises(ValueError, match="the batch has 3 rows and mixed_adapters names 2 adapters"),
    ):
        unet(*inputs(3))
    unet.fuse_lora()
    with pytest.raises(ValueError, match="merged into the base; unmerge"), context(unet):
        pass


either_order = pytest.mark.parametrize("order", [("plus", "lora"), ("lora", "plus")], ids="-".join)


@either_order
@torch.no_grad()
def test_ether_and_a_lora_are_chosen_alone_and_add_up_whichever_came_first(
    order: tuple[str, str], predict: Predict
) -> None:
    unet = with_adapters(*order)
    assert torch.equal(predict(unet), predict(with_adapters(order[1])))
    for strengths, expected in (({}, tiny_unet()), ({"plus": 1.0}, with_adapters("plus"))):
        with chosen_adapters(unet, strengths):
            assert torch.equal(predict(unet), predict(expected))
    for name in order:
        unet.set_adapters(name)
        assert torch.equal(predict(unet), predict(with_adapters(name)))
    unet.set_adapters(["plus", "lora"], [0.5, 2.0])
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    module, weight = unet.get_submodule(path), tiny_unet().get_parameter(f"{path}.weight")
    made = {type(m).__name__: m for m in module.modules() if hasattr(m, "get_delta_weight")}
    # PEFT's update has its scale within
    ours, lora = made["EtherLinear"].get_delta_weight("plus"), made["Linear"].get_delta_weight("lora")
    x = torch.randn(3, weight.shape[1])
    assert_close(module(x), x @ (weight + 0.5 * ours + lora).t(), atol=TOLERANCE, rtol=TOLERANCE)
    other = with_adapters(*order[::-1])
    other.set_adapters(["lora", "plus"], [2.0, 0.5])
    assert torch.equal(predict(other), predict(unet))


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")  # PEFT's LoRA, of itself
@either_order
def test_ether_and_a_lora_are_fused_and_ether_comes_out_bit_for_bit(
    order: tuple[str, str], predict: Predict
) -> None:
    unet = with_adapters(*order)
    unet.set_adapters(["plus", "lora"])
    both = predict(unet)
    unet.fuse_lora(adapter_names=["plus"])
    unet.unfuse_lora()
    assert torch.equal(predict(unet), both)
    apart = copy.deepcopy(unet)
    apart.unload_lora()
    assert torch.equal(predict(apart), predict(tiny_unet()))
    for _ in range(2):
        unet.fuse_lora()
        assert_close(predict(unet), both, atol=TOLERANCE, rtol=TOLERANCE)
        unet.unfuse_lora()
        assert_close(predict(unet), both, atol=TOLERANCE, rtol=TOLERANCE)  # PEFT subtracts what it added
    unet.unload_lora()
    assert_close(predict(unet), predict(tiny_unet()), atol=TOLERANCE, rtol=TOLERANCE)


@either_order
def test_a_file_beside_a_lora_names_the_modules_that_it_adapts(order: tuple[str, str]) -> None:
    alone = get_peft_model_state_dict(with_adapters("plus"), adapter_name="plus")
    found = get_peft_model_state_dict(with_adapters(*order), adapter_name="plus")
    assert found.keys() == alone.keys()
    fresh = with_adapters(*order)
    changed = {name: tensor + 1 for name, tensor in found.items()}
    assert not set_peft_model_state_dict(fresh, changed, "plus").unexpected_keys
    again = get_peft_model_state_dict(fresh, adapter_name="plus")
    assert all(torch.equal(again[name], tensor) for name, tensor in changed.items())


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
def test_a_peft_model_saved_over_a_lora_loads_without_it(predict: Predict, tmp_path: Path) -> None:
    beneath = with_adapters("lora")
    torch.manual_seed(5)
    model = get_peft_model(beneath, replace(CONFIGS["plus"]), adapter_name="fox")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_unet(), str(tmp_path / "fox"), adapter_name="fox")
    assert torch.equal(predict(loaded), predict(with_adapters("plus")))

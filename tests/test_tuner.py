"""What is adapted, how many numbers that is, and what is refused by name before anything is touched."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DConditionModel
from peft import HRAConfig, OFTConfig, PeftConfig, get_peft_model
from real_configs import meta_unet
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.tuner import EtherLinear

COUNTS = {  # projections, ETHER, ETHER+ on both sides: the paper's arithmetic on the published configs
    "sd15": (128, 99_456, 398_592),
    "sd21": (128, 107_648, 414_976),
    "sdxl": (560, 785_920, 2_903_040),
}


def count(model: nn.Module) -> tuple[int, int]:
    layers = [module for module in model.modules() if isinstance(module, EtherLinear)]
    return len(layers), sum(p.numel() for p in model.parameters() if p.requires_grad)


def attach(model: nn.Module, **fields: Any) -> Any:
    return get_peft_model(model, EtherConfig(**fields))


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("num_blocks", [1, 4, 16])
def test_real_unets_have_the_papers_parameter_counts(name: str, num_blocks: int) -> None:
    projections, ether, ether_plus = COUNTS[name]
    unet = meta_unet(name)
    unet.add_adapter(EtherConfig(num_blocks=num_blocks))
    assert count(unet) == (projections, ether)
    unet.unload_lora()
    unet.add_adapter(EtherConfig(variant="ether_plus", num_blocks=num_blocks))
    assert count(unet) == (projections, ether_plus)


def test_one_sided_ether_plus_has_half_the_numbers_on_sd15() -> None:
    unet = meta_unet("sd15")
    unet.add_adapter(EtherConfig(variant="ether_plus", sides="input"))
    assert count(unet) == (128, 198_912)


def test_the_feedforward_preset_adds_geglu_as_control_uses_it() -> None:
    unet = meta_unet("sd15")
    unet.add_adapter(EtherConfig(target_modules="attention_and_feedforward"))
    assert count(unet) == (144, 111_936)  # the count of the paper's controllable generation


def test_an_adapter_on_the_meta_device_is_on_the_meta_device() -> None:
    unet = meta_unet("sd15")
    unet.add_adapter(EtherConfig(variant="ether_plus"))
    assert {p.device.type for p in unet.parameters()} == {"meta"}


def test_the_default_targets_are_the_attention_projections(unet: UNet2DConditionModel) -> None:
    attach(unet)
    names = {re.sub(r".*(attn\d\.)", r"\1", n) for n, m in unet.named_modules() if isinstance(m, EtherLinear)}
    assert names == {f"attn{a}.{p}" for a in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")}


def test_no_targets_given_means_the_default_ones(unet: UNet2DConditionModel) -> None:
    assert count(attach(unet, target_modules=None))[0] == 32


def test_excluded_modules_are_left_alone(unet: UNet2DConditionModel) -> None:
    attach(unet, exclude_modules=r".*attn2.*")
    assert {".attn1." in n for n, m in unet.named_modules() if isinstance(m, EtherLinear)} == {True}


def test_modules_to_save_are_trained_whole(unet: UNet2DConditionModel) -> None:
    model = attach(unet, modules_to_save=["conv_out"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "ether_" not in n}
    assert {n.split("conv_out.")[1] for n in trained} == {
        "modules_to_save.default.weight",
        "modules_to_save.default.bias",
    }


def test_num_blocks_can_differ_by_module(unet: UNet2DConditionModel) -> None:
    attach(unet, num_blocks=4, num_blocks_pattern={"mid_block.*": 2, "to_out.0": 8})
    blocks = {n: m.r["default"] for n, m in unet.named_modules() if isinstance(m, EtherLinear)}
    assert {b for n, b in blocks.items() if n.startswith("mid_block")} == {2}
    assert {b for n, b in blocks.items() if n.startswith("up") and n.endswith("to_out.0")} == {8}
    assert {b for n, b in blocks.items() if n.startswith("up") and n.endswith("to_q")} == {4}


@pytest.mark.parametrize("order", [1, -1])
def test_the_longest_matching_pattern_holds_whatever_the_order(
    unet: UNet2DConditionModel, order: int
) -> None:
    patterns = [("mid_block.*", 2), ("mid_block.*to_q", 8)][::order]
    attach(unet, num_blocks_pattern=dict(patterns))
    blocks = {n: m.r["default"] for n, m in unet.named_modules() if isinstance(m, EtherLinear)}
    assert {b for n, b in blocks.items() if n.startswith("mid_block") and n.endswith("to_q")} == {8}
    assert {b for n, b in blocks.items() if n.startswith("mid_block") and n.endswith("to_k")} == {2}


def test_an_adapter_added_to_a_model_in_use_drops_nothing_out(unet: UNet2DConditionModel) -> None:
    attach(unet.eval(), dropout=0.5)
    assert not any(module.training for module in unet.modules())


def test_a_target_that_is_excluded_is_not_called_misspelt(unet: UNet2DConditionModel) -> None:
    attach(unet, target_modules=["to_q", "to_k"], exclude_modules=["to_k"])
    assert {n.rpartition(".")[2] for n, m in unet.named_modules() if isinstance(m, EtherLinear)} == {"to_q"}


def test_layers_to_transform_selects_by_index() -> None:
    layers = [nn.ModuleDict({"to_q": nn.Linear(8, 8)}) for _ in range(3)]
    attach(
        nn.ModuleDict({"decoder": nn.ModuleDict({"layers": nn.ModuleList(layers)})}),
        target_modules=["to_q"],
        layers_to_transform=[0, 2],
    )
    assert [isinstance(layer["to_q"], EtherLinear) for layer in layers] == [True, False, True]


def test_dropout_zeroes_inputs_in_training_only() -> None:
    model = attach(nn.Sequential(nn.Linear(64, 64, bias=False)), target_modules=["0"], dropout=0.5)
    x = torch.ones(1, 64)
    torch.manual_seed(0)
    trained = model(x)
    torch.manual_seed(0)
    layer = model.base_model.model[0].eval()
    assert torch.allclose(trained, layer(nn.functional.dropout(x, 0.5)))
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"variant": "eter"}, "variant='eter' is not known; use one of 'ether', 'ether_plus'"),
        ({"sides": "left"}, "sides='left' is not known; use one of 'input', 'output', 'both'"),
        ({"num_blocks": 0}, "num_blocks=0 is not a number of blocks; use a whole number from 1"),
        ({"num_blocks": 2.5}, "num_blocks=2.5 is not a number of blocks"),
        ({"num_blocks_pattern": {"mid_block.*": -1}}, "mid_block.*=-1 is not a number of blocks"),
        ({"dropout": 1.0}, "dropout=1.0 is not a probability; use a number from 0 to below 1"),
        ({"dropout": float("nan")}, "dropout=nan is not a probability"),
        (
            {"target_modules": ".*to_q", "layers_to_transform": [0]},
            "layers_to_transform needs target_modules as a list",
        ),
        ({"layers_pattern": "layers"}, "give layers_to_transform too"),
        ({"layers_pattern": ["layers"]}, "give layers_to_transform too"),
    ],
)
def test_a_config_outside_its_range_is_refused_in_a_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        EtherConfig(**fields)


@pytest.mark.parametrize("empty", [[], "", None])
def test_an_empty_layers_pattern_is_none_as_for_pefts_methods(empty: list[str] | str | None) -> None:
    assert EtherConfig(layers_pattern=empty).layers_pattern == empty


def refused(model: nn.Module, sentence: str, **fields: Any) -> None:
    """Assert that attaching is refused with the sentence and leaves every module in place."""
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        attach(model, **fields)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_blocks_that_do_not_divide_are_refused_with_those_that_do(unet: UNet2DConditionModel) -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    refused(
        unet,
        f"num_blocks=3 does not divide in_features=32 of {name}; use one of 1, 2, 4, 8, 16, 32",
        num_blocks=3,
    )


@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
def test_blocks_of_one_number_are_refused_where_there_are_any(variant: str) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
    sides = "both"
    refused(
        model,
        "num_blocks=2 leaves blocks of one number in out_features=2 of 1, where a reflection has nothing to",
        variant=variant,
        sides=sides,
        num_blocks=2,
        target_modules=["0", "1"],
    )
    attach(
        model, variant=variant, sides=sides, num_blocks=2, num_blocks_pattern={"1": 1}, target_modules=["1"]
    )


def test_a_refusal_late_in_the_model_leaves_the_early_layers_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(8, 8, 1))
    refused(
        model,
        "2 is a torch.nn.modules.conv.Conv2d with torch.float32 weights",
        target_modules=["0", "1", "2"],
    )


class Int8Linear(nn.Linear):
    """As quantization libraries do it: an nn.Linear whose weight holds integers."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)


class OwnForwardLinear(nn.Linear):
    """As others do it: an nn.Linear with a forward of its own."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


@pytest.mark.parametrize("quantized", [Int8Linear, OwnForwardLinear])
def test_a_quantized_base_layer_is_refused_by_name(quantized: type[Int8Linear | OwnForwardLinear]) -> None:
    model = nn.ModuleDict({"to_q": quantized()})
    refused(
        model,
        f"test_tuner.{quantized.__name__} with {quantized().weight.dtype} weights; ETHER adapts",
        target_modules=["to_q"],
    )


@pytest.mark.parametrize(
    "config",
    [HRAConfig(r=2, target_modules=["to_q"]), OFTConfig(oft_block_size=4, target_modules=["to_v"])],
    ids=["HRA", "OFT"],
)
def test_a_layer_with_another_methods_adapter_is_refused(
    unet: UNet2DConditionModel, config: PeftConfig
) -> None:
    unet.add_adapter(config, "other")
    with (
        pytest.warns(UserWarning, match="Already found a `peft_config`"),
        pytest.raises(ValueError, match="already carries an adapter of another method"),
    ):
        unet.add_adapter(EtherConfig(), "ether")


def test_a_target_that_matches_nothing_is_named(unet: UNet2DConditionModel) -> None:
    with pytest.warns(UserWarning, match="no adapted module matches to_queue; check the spelling"):
        attach(unet, target_modules=["to_q", "to_queue"])


def test_a_block_pattern_that_matches_nothing_is_named(unet: UNet2DConditionModel) -> None:
    with pytest.warns(UserWarning, match=re.escape("no adapted module matches middle.*; check the spelling")):
        attach(unet, num_blocks_pattern={"middle.*": 2})


def test_targets_that_all_match_nothing_are_an_error(unet: UNet2DConditionModel) -> None:
    refused(unet, "not found in the base model", target_modules=["to_queue"])


def test_pefts_own_config_reader_gives_the_same_config(tmp_path: Path) -> None:
    config = EtherConfig(
        variant="ether_plus", num_blocks=8, num_blocks_pattern={"mid_block.*": 2}, dropout=0.1
    )
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)) == config


def test_the_second_adapter_does_not_disturb_the_first(unet: UNet2DConditionModel) -> None:
    unet.add_adapter(EtherConfig(), "first")
    before = {n: p.clone() for n, p in unet.named_parameters() if ".first" in n}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that there are now two
        unet.add_adapter(EtherConfig(num_blocks=8, variant="ether_plus"), "second")
    after = {n: p for n, p in unet.named_parameters() if ".first" in n}
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_equal_seeds_give_equal_adapters() -> None:
    made = []
    for _ in range(2):
        unet = tiny_unet()
        torch.manual_seed(5)
        unet.add_adapter(EtherConfig())
        made.append([p for p in unet.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))

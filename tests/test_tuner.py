"""What is adapted, how many numbers that is, and what is refused by name before anything is touched."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DConditionModel
from peft import (
    BOFTConfig,
    DeloraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    ShiraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from real_configs import meta_unet
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.tuner import EtherLinear

ONE_SIDED = {"variant": "ether_plus", "sides": "input"}
FEEDFORWARD = {"target_modules": "attention_and_feedforward"}


def adapted(model: nn.Module) -> dict[str, EtherLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, EtherLinear)}


def attach(model: nn.Module, **fields: Any) -> Any:
    return get_peft_model(model, EtherConfig(**fields))


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [  # projections and numbers: the paper's arithmetic on the published configs
        ("sd15", {}, (128, 99_456)),
        ("sd15", {"num_blocks": 1}, (128, 99_456)),
        ("sd15", {"variant": "ether_plus", "num_blocks": 16}, (128, 398_592)),
        ("sd15", ONE_SIDED, (128, 198_912)),
        ("sd15", FEEDFORWARD, (144, 111_936)),  # as the paper's controllable generation
        ("sd15", FEEDFORWARD | {"variant": "ether_plus"}, (144, 623_232)),
        ("sd21", {}, (128, 107_648)),
        ("sd21", {"variant": "ether_plus"}, (128, 414_976)),
        ("sdxl", {}, (560, 785_920)),
        ("sdxl", {"variant": "ether_plus"}, (560, 2_903_040)),
    ],
)
def test_real_unets_have_the_papers_parameter_counts(
    name: str, fields: dict[str, Any], expected: tuple[int, int]
) -> None:
    unet = meta_unet(name)
    unet.add_adapter(EtherConfig(**fields))
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert (len(adapted(unet)), trained) == expected
    assert {p.device.type for p in unet.parameters()} == {"meta"}


ATTENTION = {f"attn{a}.{p}" for a in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ATTENTION),
        ({"target_modules": None}, ATTENTION),
        ({"exclude_modules": r".*attn2.*"}, {name for name in ATTENTION if name.startswith("attn1")}),
        ({"target_modules": ["to_q", "to_k"], "exclude_modules": ["to_k"]}, {"attn1.to_q", "attn2.to_q"}),
    ],
)
def test_targets_select_projections(
    unet: UNet2DConditionModel, fields: dict[str, Any], expected: set[str]
) -> None:
    attach(unet, **fields)
    assert {re.sub(r".*(attn\d\.)", r"\1", name) for name in adapted(unet)} == expected


def test_modules_to_save_are_trained_whole(unet: UNet2DConditionModel) -> None:
    model = attach(unet, modules_to_save=["conv_out"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "ether_" not in n}
    own = {"modules_to_save.default.weight", "modules_to_save.default.bias"}
    assert {n.split("conv_out.")[1] for n in trained} == own


@pytest.mark.parametrize("order", [1, -1])
def test_num_blocks_can_differ_by_module_and_the_longest_pattern_holds(
    unet: UNet2DConditionModel, order: int
) -> None:
    patterns = [("mid_block.*", 2), ("mid_block.*to_q", 8), ("to_out.0", 16)][::order]
    attach(unet, num_blocks=4, num_blocks_pattern=dict(patterns))
    blocks = {name: layer.r["default"] for name, layer in adapted(unet).items()}
    for place, end, expected in (
        ("mid", "to_k", 2),
        ("mid", "to_q", 8),
        ("up", "to_out.0", 16),
        ("up", "to_q", 4),
    ):
        assert {b for n, b in blocks.items() if n.startswith(place) and n.endswith(end)} == {expected}


def test_layers_to_transform_selects_by_index() -> None:
    layers = [nn.ModuleDict({"to_q": nn.Linear(8, 8)}) for _ in range(3)]
    model = nn.ModuleDict({"decoder": nn.ModuleDict({"layers": nn.ModuleList(layers)})})
    attach(model, target_modules=["to_q"], layers_to_transform=[0, 2])
    assert [isinstance(layer["to_q"], EtherLinear) for layer in layers] == [True, False, True]


def test_dropout_zeroes_inputs_in_training_only(unet: UNet2DConditionModel) -> None:
    attach(unet.eval(), dropout=0.5)
    assert not any(module.training for module in unet.modules())  # as a model in use was
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
        ({"sides": "left"}, "sides='left' is not known"),
        ({"num_blocks": 0}, "num_blocks=0 is not a number of blocks; use a whole number from 1"),
        ({"num_blocks": 2.5}, "num_blocks=2.5 is not a number of blocks"),
        ({"num_blocks_pattern": {"mid_block.*": -1}}, "mid_block.*=-1 is not a number of blocks"),
        ({"dropout": 1.0}, "dropout=1.0 is not a probability"),
        ({"dropout": float("nan")}, "dropout=nan is not a probability"),
        ({"target_modules": ".*to_q", "layers_to_transform": [0]}, "needs target_modules as a list"),
        ({"layers_pattern": "layers"}, "give layers_to_transform too"),
        ({"layers_pattern": ["layers"]}, "give layers_to_transform too"),
    ],
)
def test_a_config_outside_its_range_is_refused_in_a_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        EtherConfig(**fields)


def test_an_empty_layers_pattern_is_none_as_for_pefts_methods() -> None:
    nothings: tuple[list[str] | str | None, ...] = ([], "", None)
    for empty in nothings:
        assert EtherConfig(layers_pattern=empty).layers_pattern == empty


class Int8Linear(nn.Linear):
    """As quantization libraries do it: an nn.Linear whose weight holds integers."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)


class OwnForwardLinear(nn.Linear):
    """As others do it: an nn.Linear with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


NARROW = {"target_modules": ["0", "1"], "sides": "both", "num_blocks": 2}
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "blocks that do not divide": (
        tiny_unet,
        {"num_blocks": 3},
        "num_blocks=3 does not divide in_features=32 of down_blocks.0.attentions.0.transformer_blocks.0"
        ".attn1.to_q; use one of 1, 2, 4, 8, 16, 32",
    ),
    "blocks of one number": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)),
        NARROW,
        "num_blocks=2 leaves blocks of one number in out_features=2 of 1",
    ),
    "late in the model": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(8, 8, 1)),
        {"target_modules": ["0", "1", "2"]},
        "2 is a torch.nn.modules.conv.Conv2d with torch.float32 weights",
    ),
    "integers": (
        lambda: nn.ModuleDict({"to_q": Int8Linear()}),
        {"target_modules": ["to_q"]},
        "test_tuner.Int8Linear with torch.int8 weights; ETHER adapts",
    ),
    "another forward": (
        lambda: nn.ModuleDict({"to_q": OwnForwardLinear(8, 8)}),
        {"target_modules": ["to_q"]},
        "test_tuner.OwnForwardLinear with torch.float32 weights; ETHER adapts",
    ),
    "nothing": (tiny_unet, {"target_modules": ["to_queue"]}, "not found in the base model"),
}


@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_adapted_is_refused_by_name_and_every_module_stays(reason: str, variant: str) -> None:
    make, fields, sentence = REFUSED[reason]
    model = make()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        attach(model, variant=variant, **fields)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_one_block_is_taken_where_two_would_be_of_one_number() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
    assert len(adapted(attach(model, **NARROW, num_blocks_pattern={"1": 1}))) == 2


FOREIGN = {
    "LoRA": LoraConfig(r=2, init_lora_weights=False),
    "OFT": OFTConfig(oft_block_size=4, init_weights=False),
    "BOFT": BOFTConfig(boft_block_size=4, init_weights=False),
    "DeLoRA": DeloraConfig(r=2, init_weights=False),
    "LoHa": LoHaConfig(r=2, init_weights=False),
    "LoKr": LoKrConfig(r=2, init_weights=False),
    "IA3": IA3Config(feedforward_modules=[], init_ia3_weights=False),
    "FourierFT": FourierFTConfig(n_frequency=8, init_weights=False),
    "MiSS": MissConfig(r=2, init_weights=False),
}


@pytest.mark.parametrize("method", FOREIGN)
@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`", "ignore:Setting boft|Failed to load the CUDA"
)
def test_ether_and_another_method_give_the_same_in_either_order(method: str) -> None:
    config, x = copy.copy(FOREIGN[method]), torch.randn(3, 16)
    config.target_modules = {"0"}
    ours = EtherConfig(target_modules=["0"], num_blocks=2, variant="ether_plus", init_weights=False)
    results = []
    for order in ((config,), (config, ours), (ours, config)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)).eval()
        for each in order:
            torch.manual_seed(1)
            inject_adapter_in_model(copy.copy(each), model, each.peft_type.value)
        results.append(model.eval()(x))
    alone, over, under = results
    assert torch.equal(over, under)  # PEFT lays the other method over ETHER, and ETHER goes there by itself
    assert (over - alone).abs().max() > 0.01


@pytest.mark.parametrize(
    "config",
    [
        HRAConfig(r=2, target_modules=["to_q"]),
        ShiraConfig(r=2, target_modules=["to_v"]),
        MissConfig(r=2, init_weights="bat", target_modules=["to_k"]),
    ],
    ids=["HRA", "SHiRA", "MiSS bat"],
)
def test_a_layer_that_would_read_its_weight_past_ether_is_refused(
    unet: UNet2DConditionModel, config: PeftConfig
) -> None:
    unet.add_adapter(config, "other")
    with (
        pytest.warns(UserWarning, match="Already found a `peft_config`"),
        pytest.raises(ValueError, match="reads its weight past ETHER"),
    ):
        unet.add_adapter(EtherConfig(), "ether")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"target_modules": ["to_q", "to_queue"]}, "to_queue"),
        ({"num_blocks_pattern": {"middle.*": 2}}, "middle.*"),
    ],
)
def test_a_target_or_a_pattern_that_matches_nothing_is_named(
    unet: UNet2DConditionModel, fields: dict[str, Any], name: str
) -> None:
    with pytest.warns(UserWarning, match=re.escape(f"no adapted module matches {name}; check the spelling")):
        attach(unet, **fields)


def test_pefts_own_config_reader_gives_the_same_config(tmp_path: Path) -> None:
    config = EtherConfig(variant="ether_plus", num_blocks_pattern={"mid_block.*": 2}, dropout=0.1)
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)) == config


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT, at a second adapter
def test_equal_seeds_give_equal_adapters_which_a_second_does_not_disturb() -> None:
    made = []
    for second in (False, True):
        unet = tiny_unet()
        torch.manual_seed(5)
        unet.add_adapter(EtherConfig(), "first")
        if second:
            unet.add_adapter(EtherConfig(num_blocks=8, variant="ether_plus"), "second")
        made.append([p for name, p in unet.named_parameters() if ".first" in name])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))

"""The laws of an adapter, for every variant × sides × number of blocks × dtype of the base."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from oracles import dense_weight, in_float64
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.testing import assert_close

from ether_diffusion import EtherConfig
from ether_diffusion.tuner import EtherLinear

WIDTH, HEIGHT = 32, 48
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CASES = list(itertools.product(["ether", "ether_plus"], ["input", "output", "both"], [1, 4, 16], DTYPES))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
# in 16 bits W' is rounded when merged, y when not

all_cases = pytest.mark.parametrize(
    ("variant", "sides", "num_blocks", "dtype"),
    CASES,
    ids=[f"{v}-{s}-{n}-{str(d)[6:]}" for v, s, n, d in CASES],
)


class Base(nn.Module):
    """Two projections, one adapted, so that an adapter is only part of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, HEIGHT)
        self.head = nn.Linear(HEIGHT, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.to_q(x))


def make_config(variant: str, sides: str, num_blocks: int, *, init_weights: bool = False) -> EtherConfig:
    return EtherConfig(
        variant=variant,  # type: ignore[arg-type]
        sides=sides,  # type: ignore[arg-type]
        num_blocks=num_blocks,
        target_modules=["to_q"],
        init_weights=init_weights,
    )


def make(variant: str, sides: str, num_blocks: int, dtype: torch.dtype) -> tuple[Any, EtherLinear, Tensor]:
    model = get_peft_model(Base().to(dtype).eval(), make_config(variant, sides, num_blocks))
    if dtype == torch.float64:
        model.double()  # the vectors too: they follow upwards, never downwards
    return model, model.base_model.model.to_q, torch.randn(5, WIDTH, dtype=dtype)


@all_cases
@torch.no_grad()
def test_forward_is_the_dense_oracle(variant: str, sides: str, num_blocks: int, dtype: torch.dtype) -> None:
    _, layer, x = make(variant, sides, num_blocks, dtype)
    wide = [None if side is None else in_float64(side) for side in layer.vectors("default")]
    base = layer.base_linear
    expected = nn.functional.linear(x.double(), dense_weight(base.weight.double(), *wide), base.bias.double())
    assert_close(layer(x).double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@all_cases
@torch.no_grad()
def test_merging_changes_nothing_but_rounding(
    variant: str, sides: str, num_blocks: int, dtype: torch.dtype
) -> None:
    _, layer, x = make(variant, sides, num_blocks, dtype)
    before = layer(x)
    layer.merge(safe_merge=True)
    assert_close(layer(x), before, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@all_cases
@torch.no_grad()
def test_unmerging_gives_the_base_back_bit_for_bit(
    variant: str, sides: str, num_blocks: int, dtype: torch.dtype
) -> None:
    _, layer, _ = make(variant, sides, num_blocks, dtype)
    weight = layer.base_linear.weight.clone()
    for _ in range(3):
        layer.merge()
        assert not torch.equal(layer.base_linear.weight, weight)
        layer.unmerge()
    assert torch.equal(layer.base_linear.weight, weight)


@all_cases
@torch.no_grad()
def test_a_scale_is_a_straight_line_from_w_to_its_image(
    variant: str, sides: str, num_blocks: int, dtype: torch.dtype
) -> None:
    _, layer, x = make(variant, sides, num_blocks, dtype)
    whole, base = layer(x), layer.base_linear(x)
    layer.set_scale("default", 0.3)
    expected = base.double() + 0.3 * (whole.double() - base.double())
    assert_close(layer(x).double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@all_cases
@torch.no_grad()
def test_a_scale_of_zero_is_the_base_bit_for_bit(
    variant: str, sides: str, num_blocks: int, dtype: torch.dtype
) -> None:
    _, layer, x = make(variant, sides, num_blocks, dtype)
    weight = layer.base_linear.weight.clone()
    layer.set_scale("default", 0.0)
    assert torch.equal(layer(x), layer.base_linear(x))
    layer.merge()
    assert torch.equal(layer.base_linear.weight, weight)


@all_cases
def test_only_the_adapters_vectors_train_and_in_float32(
    variant: str, sides: str, num_blocks: int, dtype: torch.dtype
) -> None:
    model, _, x = make(variant, sides, num_blocks, dtype)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("ether_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    width = {"input": WIDTH, "output": HEIGHT, "both": WIDTH + HEIGHT}[sides]
    assert sum(p.numel() for p in trained.values()) == width * (2 if variant == "ether_plus" else 1)
    model(x).float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in trained.values())


@all_cases
@torch.no_grad()
def test_ether_plus_starts_at_the_base_bit_for_bit_and_ether_never_does(
    variant: str, sides: str, num_blocks: int, dtype: torch.dtype
) -> None:
    base, x = Base().to(dtype).eval(), torch.randn(100, WIDTH, dtype=dtype)
    expected = base(x)
    model = get_peft_model(base, make_config(variant, sides, num_blocks, init_weights=True))
    assert torch.equal(model(x), expected) == (variant == "ether_plus")


@pytest.mark.filterwarnings(
    "ignore:Could not find a config file:UserWarning"
)  # the base has none: it is a toy
@all_cases
@torch.no_grad()
def test_saved_and_loaded_is_the_same_model_bit_for_bit(
    variant: str, sides: str, num_blocks: int, dtype: torch.dtype, tmp_path: object
) -> None:
    model, _, x = make(variant, sides, num_blocks, dtype)
    pristine = copy.deepcopy(model).unload()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(pristine, str(tmp_path)).to(dtype)
    assert torch.equal(loaded(x), model.float().to(dtype)(x))  # PEFT loads float64 into float32 vectors


@all_cases
@torch.no_grad()
def test_copies_and_pickles_are_the_same_model_bit_for_bit(
    variant: str, sides: str, num_blocks: int, dtype: torch.dtype
) -> None:
    _, layer, x = make(variant, sides, num_blocks, dtype)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@all_cases
def test_unloading_gives_back_the_very_same_modules(
    variant: str, sides: str, num_blocks: int, dtype: torch.dtype
) -> None:
    base = Base().to(dtype)
    projection, weight = base.to_q, base.to_q.weight.clone()
    model = get_peft_model(base, make_config(variant, sides, num_blocks))
    assert model.unload().to_q is projection
    assert torch.equal(projection.weight, weight)


@all_cases
@torch.no_grad()
def test_merge_and_unload_is_a_plain_model_with_the_adapters_output(
    variant: str, sides: str, num_blocks: int, dtype: torch.dtype
) -> None:
    model, _, x = make(variant, sides, num_blocks, dtype)
    expected = model(x)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.to_q) is nn.Linear
    assert_close(merged(x), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_thousand_merges_leave_no_trace(dtype: torch.dtype) -> None:
    _, layer, _ = make("ether_plus", "both", 4, dtype)
    weight = layer.base_linear.weight.clone()
    for _ in range(1000):
        layer.merge()
        layer.unmerge()
    assert torch.equal(layer.base_linear.weight, weight)


@torch.no_grad()
def test_a_base_cast_while_merged_is_the_cast_base_after_unmerging() -> None:
    model, layer, _ = make("ether", "input", 4, torch.float32)
    expected = layer.base_linear.weight.bfloat16()
    layer.merge()
    model.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(layer.base_linear.weight, expected)


@torch.no_grad()
def test_casting_the_model_leaves_the_adapter_in_float32_untouched() -> None:
    model, layer, _ = make("ether_plus", "both", 4, torch.float32)
    before = [p.clone() for p in (layer.ether_input_u["default"], layer.ether_output_v["default"])]
    model.to(torch.bfloat16).float()
    after = [layer.ether_input_u["default"], layer.ether_output_v["default"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
@torch.no_grad()
def test_pefts_converter_finds_the_same_update(variant: str) -> None:
    model, layer, x = make(variant, "input", 4, torch.float32)
    expected = layer(x)
    config, tensors = convert_to_lora(model, rank=8)
    converted = get_peft_model(copy.deepcopy(model).unload(), config)
    set_peft_model_state_dict(converted, tensors)
    assert_close(converted.base_model.model.to_q(x), expected, atol=1e-5, rtol=1e-5)

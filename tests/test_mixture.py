"""A batch whose samples carry different adapters, row by row against each adapter merged."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.testing import assert_close

from ether_diffusion import EtherConfig, mixed_adapters

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`:UserWarning"
)  # PEFT, at a second adapter

CONFIGS = {
    "ether": EtherConfig(init_weights=False),
    "plus": EtherConfig(variant="ether_plus", init_weights=False, num_blocks=2),
    "output": EtherConfig(sides="output", num_blocks=1),
    "self": EtherConfig(variant="ether_plus", init_weights=False, exclude_modules=r".*attn2.*"),
}
TOLERANCE = 1e-5


@pytest.fixture
def unet() -> UNet2DConditionModel:
    unet = tiny_unet()
    for name, config in CONFIGS.items():
        unet.add_adapter(copy.deepcopy(config), name)
    return unet


def inputs(batch: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, size, size), torch.randint(0, 1000, (batch,)), torch.randn(batch, 7, 32)


@torch.no_grad()
def merged_row(unet: UNet2DConditionModel, name: str | None, scale: float, row: tuple[Tensor, ...]) -> Tensor:
    """The row alone, with the adapter merged at the scale (None: with nothing)."""
    alone = copy.deepcopy(unet)
    if name is None:
        alone.unload_lora()
    else:
        alone.set_adapters([name], [scale])
        alone.fuse_lora()
        alone.unload_lora()
    sample: Tensor = alone(*row)[0]
    return sample


@pytest.mark.parametrize("size", [8, 32])  # below and above where per-sample weights become the faster way
@torch.no_grad()
def test_each_row_is_its_adapter_merged(unet: UNet2DConditionModel, size: int) -> None:
    names, scales = ["ether", None, "plus", "output", "self", "plus"], [1.0, 1.0, 0.5, 1.5, 1.0, 0.0]
    given = inputs(len(names), size)
    with mixed_adapters(unet, names, scales=scales):
        mixed = unet(*given)[0]
    for i, (name, scale) in enumerate(zip(names, scales, strict=True)):
        row = tuple(x[i : i + 1] for x in given)
        assert_close(mixed[i : i + 1], merged_row(unet, name, scale, row), atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_a_batch_doubled_for_guidance_repeats_the_adapters(unet: UNet2DConditionModel) -> None:
    given = inputs(4)
    with mixed_adapters(unet, ["ether", "plus", "ether", "plus"]):
        named = unet(*given)[0]
    with mixed_adapters(unet, ["ether", "plus"]):
        doubled = unet(*given)[0]
    assert torch.equal(named, doubled)


@torch.no_grad()
def test_what_is_otherwise_active_plays_no_part(unet: UNet2DConditionModel) -> None:
    unet.set_adapters(["plus"])  # in force also where "self" has no projection
    given = inputs(2)
    with mixed_adapters(unet, ["self", None]):
        mixed = unet(*given)[0]
    for i, name in enumerate(["self", None]):
        row = tuple(x[i : i + 1] for x in given)
        assert_close(mixed[i : i + 1], merged_row(unet, name, 1.0, row), atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_what_was_active_is_active_again(unet: UNet2DConditionModel, predict: Callable[..., Tensor]) -> None:
    unet.set_adapters(["plus"], [0.5])
    before = predict(unet)
    with mixed_adapters(unet, ["ether", None]):
        assert not torch.equal(predict(unet), before)
    assert torch.equal(predict(unet), before)


@torch.no_grad()
def test_what_was_active_is_active_again_after_an_error(
    unet: UNet2DConditionModel, predict: Callable[..., Tensor]
) -> None:
    before = predict(unet)
    with pytest.raises(RuntimeError, match="on purpose"), mixed_adapters(unet, ["ether", None]):
        raise RuntimeError("on purpose")
    assert torch.equal(predict(unet), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_base_in_sixteen_bits_stays_close(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    given = inputs(3)
    with mixed_adapters(unet, ["ether", None, "plus"]):
        expected = unet(*given)[0]
    unet.to(dtype)
    with mixed_adapters(unet, ["ether", None, "plus"]):
        found = unet(given[0].to(dtype), given[1], given[2].to(dtype))[0]
    assert found.dtype == dtype
    assert (found.float() - expected).norm() / expected.norm() < 12 * torch.finfo(dtype).eps


@torch.no_grad()
def test_autocast_stays_close(unet: UNet2DConditionModel) -> None:
    given = inputs(2)
    with mixed_adapters(unet, ["ether", "plus"]):
        expected = unet(*given)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = unet(*given)[0]
    assert (found.float() - expected).norm() / expected.norm() < 12 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("names", "scales", "sentence"),
    [
        (["ether", "nobody"], None, "no adapter named nobody; loaded are ether, output, plus, self"),
        ([], None, "needs one adapter name (or None) per sample; found none"),
        (["ether", None], [1.0], "needs 2 finite scales, one per name; found [1.0]"),
        (["ether"], [float("nan")], "needs 1 finite scales, one per name; found [nan]"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(
    unet: UNet2DConditionModel, names: list[str | None], scales: list[float] | None, sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)), mixed_adapters(unet, names, scales=scales):
        pass


def test_a_batch_of_another_size_is_refused(unet: UNet2DConditionModel) -> None:
    with (
        mixed_adapters(unet, ["ether", None]),
        pytest.raises(ValueError, match="the batch has 3 rows and mixed_adapters names 2 adapters"),
    ):
        unet(*inputs(3))


def test_merged_adapters_are_refused(unet: UNet2DConditionModel) -> None:
    unet.fuse_lora()
    with (
        pytest.raises(ValueError, match="adapters are merged into the base"),
        mixed_adapters(unet, ["ether"]),
    ):
        pass


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="carries no ETHER adapter"), mixed_adapters(tiny_unet(), [None]):
        pass

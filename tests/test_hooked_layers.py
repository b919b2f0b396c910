"""Adapters on layers that are not at hand: offloaded, in float8, hooked, parametrised, or fused to one."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import tiny_unet
from diffusers import UNet2DConditionModel
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from peft import inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm as parametrized_weight_norm
from torch.testing import assert_close

from ether_diffusion import EtherConfig, load_ether, mixed_adapters, prepared_adapters, save_ether
from ether_diffusion.tuner import EtherLinear, chosen_adapters

CPU = torch.device("cpu")
Hang = Callable[[nn.Module, Path], object]
Predict = Callable[..., Tensor]


def by_leaf(model: nn.Module, folder: Path | None = None) -> None:
    apply_group_offloading(model, CPU, CPU, "leaf_level", offload_to_disk_path=folder and str(folder))


def by_block(model: nn.Module, folder: Path | None = None) -> None:
    disk = folder and str(folder)
    apply_group_offloading(model, CPU, CPU, "block_level", num_blocks_per_group=1, offload_to_disk_path=disk)


OFFLOADING: dict[str, Hang] = {
    "sequential": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "sequential, disk": lambda model, folder: disk_offload(model, str(folder), execution_device=CPU),
    "leaves": lambda model, folder: by_leaf(model),
    "leaves, disk": by_leaf,
    "blocks": lambda model, folder: by_block(model),
    "blocks, disk": by_block,
}


def plus() -> EtherConfig:
    return EtherConfig(variant="ether_plus", init_weights=False)


def adapted() -> UNet2DConditionModel:
    unet = tiny_unet()
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        unet.add_adapter(plus(), "plus")
        unet.add_adapter(EtherConfig(num_blocks=2), "ether")
    unet.set_adapters("plus")
    return unet


@pytest.mark.parametrize("way", OFFLOADING)
@torch.no_grad()
def test_an_offloaded_base_gives_the_same_bits(way: str, predict: Predict, tmp_path: Path) -> None:
    unet = adapted()
    cases: list[dict[str, float]] = [{}, {"plus": 1}, {"ether": 1}, {"plus": 0.5}, {"plus": 1, "ether": -1}]
    expected = []
    for case in cases:
        with chosen_adapters(unet, case):
            expected.append(predict(unet))
    with mixed_adapters(unet, ["plus", None], scales=[0.5, 1.0]):
        mixed = predict(unet)
    assert torch.equal(expected[0], predict(tiny_unet()))
    OFFLOADING[way](unet, tmp_path)
    for _ in range(2):  # what the first call left behind is what the second finds
        for case, before in zip(cases, expected, strict=True):
            with chosen_adapters(unet, case), prepared_adapters(unet):
                assert torch.equal(predict(unet), before), case
    if way == "blocks, disk":
        with pytest.raises(ValueError, match="whole blocks of them lie on disk"):
            mixed_adapters(unet, ["plus", None]).__enter__()
    else:
        with mixed_adapters(unet, ["plus", None], scales=[0.5, 1.0]):
            assert torch.equal(predict(unet), mixed)
    unet.disable_adapters()
    assert torch.equal(predict(unet), expected[0])


@pytest.mark.parametrize("way", ["sequential", "sequential, disk", "leaves", "blocks"])
@pytest.mark.parametrize("fused_first", [True, False])
def test_what_is_fused_is_unfused_before_and_after_offloading(
    way: str, fused_first: bool, predict: Predict, tmp_path: Path
) -> None:
    unet = adapted()
    whole = predict(unet)
    unet.fuse_lora(lora_scale=0.5)
    fused = predict(unet)
    if not fused_first:
        unet.unfuse_lora()
    OFFLOADING[way](unet, tmp_path)
    if not fused_first:
        unet.fuse_lora(lora_scale=0.5)
    for _ in range(2):
        assert torch.equal(predict(unet), fused)
    unet.unfuse_lora()
    for _ in range(2):
        assert torch.equal(predict(unet), whole)
    unet.unload_lora()
    assert torch.equal(predict(unet), predict(tiny_unet()))


@pytest.mark.parametrize("fused_first", [True, False])
def test_fusing_what_is_loaded_from_disk_for_each_call_is_refused(
    fused_first: bool, predict: Predict, tmp_path: Path
) -> None:
    unet = adapted()
    if fused_first:
        unet.fuse_lora()
    expected = predict(unet)
    OFFLOADING["leaves, disk"](unet, tmp_path)
    with pytest.raises(ValueError, match="so that fusing would be lost; fuse or unfuse before"):
        unet.unfuse_lora() if fused_first else unet.fuse_lora()
    assert torch.equal(predict(unet), expected)


@pytest.mark.parametrize(
    ("way", "is_loaded"), [*((way, False) for way in OFFLOADING), ("leaves", True), ("blocks", True)]
)
def test_an_adapter_added_to_or_loaded_into_an_offloaded_base_works(
    way: str, is_loaded: bool, predict: Predict, tmp_path: Path
) -> None:
    expected, late = adapted(), tiny_unet()
    save_ether(expected, tmp_path / "saved", adapter_name="plus")
    OFFLOADING[way](late, tmp_path / "weights")
    torch.manual_seed(3)
    if is_loaded:
        load_ether(late, tmp_path / "saved")
    else:
        late.add_adapter(plus(), "plus")
    assert torch.equal(predict(late), predict(expected))


CAST = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}


def rounded() -> UNet2DConditionModel:
    """Return the UNet with the weights that float8 storage leaves, in bfloat16."""
    stored, unet = tiny_unet().to(torch.bfloat16), tiny_unet().to(torch.bfloat16)
    stored.enable_layerwise_casting(**CAST)
    unet.load_state_dict({name: weight.bfloat16() for name, weight in stored.state_dict().items()})
    return unet


def attach(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    torch.manual_seed(3)
    unet.add_adapter(plus())
    return unet


@torch.no_grad()
def in_bfloat16(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    found: Tensor = unet(sample.bfloat16(), torch.tensor([3, 700]), text.bfloat16())[0]
    return found


@pytest.mark.parametrize("adapter_first", [True, False])
def test_float8_storage_gives_what_its_rounded_weights_give(adapter_first: bool) -> None:
    unet = tiny_unet().to(torch.bfloat16)
    if adapter_first:
        attach(unet)
    unet.enable_layerwise_casting(**CAST)
    if not adapter_first:
        attach(unet)
    assert {p.dtype for n, p in unet.named_parameters() if "ether" in n} == {torch.float32}
    whole, base = in_bfloat16(attach(rounded())), in_bfloat16(rounded())
    for _ in range(2):
        assert torch.equal(in_bfloat16(unet), whole)
    unet.set_adapters("default", [0.0])
    assert torch.equal(in_bfloat16(unet), base)
    unet.set_adapters("default")
    unet.fuse_lora(safe_fusing=True)
    error = (in_bfloat16(unet) - whole).norm() / (whole - base).norm()
    assert 0 < error < 0.2  # W' lies in float8 now: one rounding more
    unet.unfuse_lora()
    assert torch.equal(in_bfloat16(unet), whole)


def two_layers(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(4)
    layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).to(dtype)
    config = EtherConfig(target_modules=["0", "2"], variant="ether_plus", init_weights=False)
    return inject_adapter_in_model(config, layers)


def gradients(layers: nn.Module, x: Tensor) -> list[Tensor]:
    trained = [p for p in layers.parameters() if p.requires_grad]
    return list(torch.autograd.grad(layers(x).square().sum(), [x, *trained]))


HOOKS: dict[str, Hang] = {
    "none": lambda base, folder: None,
    "pre": lambda base, folder: base.register_forward_pre_hook(lambda module, inputs: None),
    "post": lambda base, folder: base.register_forward_hook(lambda module, inputs, output: output * 2),
    "backward": lambda base, folder: base.register_full_backward_hook(lambda *given: None),
    "weight_norm": lambda base, folder: parametrized_weight_norm(base),
}


@pytest.mark.parametrize("hang", HOOKS.values(), ids=HOOKS)
def test_a_hook_on_the_base_layer_is_called_and_changes_gradients_as_it_should(
    hang: Hang, tmp_path: Path
) -> None:
    layers, expected = two_layers(), two_layers()
    for one in (layers, expected):
        for index in (0, 2):
            hang(one[index].base_layer, tmp_path)
            one[index].base_layer.requires_grad_(False)
    for index in (0, 2):  # the same through autograd alone: W' dense, the hooks around the product with it
        base = expected[index].base_layer
        change = expected[index].get_delta_weight("default").detach()
        weight = base.weight.detach() + change
        if hasattr(base, "parametrizations"):
            torch.nn.utils.parametrize.remove_parametrizations(base, "weight")
        base.weight = nn.Parameter(weight, requires_grad=False)
        expected[index] = base
    x = torch.randn(5, 16, requires_grad=True)
    assert_close(layers(x), expected(x), atol=1e-5, rtol=1e-5)
    assert_close(gradients(layers, x)[0], gradients(expected, x)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("hang", list(OFFLOADING.values())[:4], ids=list(OFFLOADING)[:4])
def test_gradients_are_those_of_a_base_at_hand(hang: Hang, tmp_path: Path) -> None:
    layers, expected = two_layers(), two_layers()
    x = torch.randn(5, 16, requires_grad=True)
    hang(layers[0].base_layer, tmp_path / "0")
    hang(layers[2].base_layer, tmp_path / "2")
    for ours, theirs in zip(gradients(layers, x), gradients(expected, x), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_through_float8_storage_are_those_of_its_rounded_weights() -> None:
    layers, expected = two_layers(torch.bfloat16), two_layers(torch.bfloat16)
    for index in (0, 2):
        weight, bias = expected[index].base_layer.parameters()
        weight.data, bias.data = (
            weight.to(torch.float8_e4m3fn).bfloat16(),
            bias.to(torch.float8_e4m3fn).bfloat16(),
        )
    apply_layerwise_casting(layers, **CAST, skip_modules_pattern=())
    x = torch.randn(5, 16, dtype=torch.bfloat16, requires_grad=True)
    for ours, theirs in zip(gradients(layers, x), gradients(expected, x), strict=True):
        assert torch.equal(ours, theirs)


def test_casting_of_inputs_can_be_switched_off_and_on_as_for_any_method_of_peft() -> None:
    layers = two_layers()
    adapters = [layer for layer in layers if isinstance(layer, EtherLinear)]
    with disable_input_dtype_casting(layers):
        assert [layer.cast_input_dtype_enabled for layer in adapters] == [False, False]
    assert [layer.cast_input_dtype_enabled for layer in adapters] == [True, True]


def test_a_hook_that_computes_without_the_layer_is_an_error() -> None:
    layers = two_layers()
    layers[0].base_layer.forward = lambda x: x.new_zeros(len(x), 32)
    with pytest.raises(RuntimeError, match="computes without it, so that an adapter has no place there"):
        layers(torch.randn(5, 16))


def test_fusing_under_a_parametrization_is_refused() -> None:
    layers = two_layers()
    parametrized_weight_norm(layers[0].base_layer)
    with pytest.raises(ValueError, match="so that fusing would be lost"):
        layers[0].merge()


def fused_pair(first: bool) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    """Return a UNet with fused projections and an adapter, fused before or after it came, and one without."""
    unet, plain = tiny_unet(), attach(tiny_unet())
    if first:
        unet.fuse_qkv_projections()
    attach(unet)
    if not first:
        unet.fuse_qkv_projections()
    return unet, plain


fused_before_or_after = pytest.mark.parametrize("first", [True, False])


@fused_before_or_after
@torch.no_grad()
def test_an_adapter_works_where_projections_are_fused_and_unfused(first: bool, predict: Predict) -> None:
    unet, plain = fused_pair(first)

    def same(*more: UNet2DConditionModel) -> None:
        assert all(torch.equal(predict(each), predict(plain)) for each in (unet, *more))

    same()
    for strength in (0.4, 1.0):
        for model in (unet, plain):
            model.set_adapters("default", strength)
        same()
    with mixed_adapters(unet, ["default", None]), mixed_adapters(plain, ["default", None]):
        same()
    same(copy.deepcopy(unet))
    for what in ("fuse_lora", "unfuse_lora"):
        for model in (unet, plain):
            getattr(model, what)()
        same()
    for fuse_again in (unet.unfuse_qkv_projections, unet.fuse_qkv_projections):
        fuse_again()
        same()


@fused_before_or_after
def test_fused_projections_without_an_adapter_are_diffusers_own(first: bool, predict: Predict) -> None:
    base = tiny_unet()
    base.fuse_qkv_projections()
    expected = predict(base)
    unet, _ = fused_pair(first)
    predict(unet)
    with chosen_adapters(unet, {}):
        assert torch.equal(predict(unet), expected)
    unet.set_adapters("default", 0.0)
    assert torch.equal(predict(unet), expected)
    unet.unload_lora()
    assert torch.equal(predict(unet), expected)
    assert unet.state_dict().keys() == base.state_dict().keys()


def test_projections_fused_with_a_merged_adapter_do_not_keep_it(predict: Predict) -> None:
    unet, plain = attach(tiny_unet()), attach(tiny_unet())
    unet.fuse_lora()
    unet.fuse_qkv_projections()
    assert_close(predict(unet), predict(plain), atol=1e-5, rtol=1e-5)
    unet.unfuse_lora()
    assert torch.equal(predict(unet), predict(plain))
    unet.unload_lora()
    assert_close(predict(unet), predict(tiny_unet()), atol=1e-6, rtol=1e-6)


def test_gradients_pass_through_fused_projections() -> None:
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 7, 32)
    found = []
    for model in fused_pair(first=False):
        model.set_adapter("default")
        model(*inputs)[0].square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))

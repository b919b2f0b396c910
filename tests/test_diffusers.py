"""What diffusers' users do to a UNet: add, weigh, scale, fuse, unload, delete, compile, checkpoint."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from conftest import UNetInputs, tiny_unet
from diffusers import UNet2DConditionModel
from tiny_pipelines import tiny_sd
from torch import Tensor, nn
from torch.testing import assert_close

from ether_diffusion import EtherConfig, prepared_adapters
from ether_diffusion.tuner import EtherLinear

Predict = Callable[..., Tensor]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`:UserWarning"
)  # PEFT, at a second adapter


@pytest.fixture
def adapted(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet with an ETHER adapter "a" and an ETHER+ adapter "b", neither at the identity."""
    unet.add_adapter(EtherConfig(init_weights=False), "a")
    unet.add_adapter(EtherConfig(variant="ether_plus", init_weights=False, num_blocks=2), "b")
    return unet


def layers(unet: nn.Module) -> dict[str, EtherLinear]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, EtherLinear)}


def test_each_adapter_moves_the_prediction_its_own_way(
    adapted: UNet2DConditionModel, predict: Predict
) -> None:
    base = predict(tiny_unet())
    adapted.set_adapters(["a"])
    a = predict(adapted)
    adapted.set_adapters(["b"])
    b = predict(adapted)
    assert min((a - base).norm(), (b - base).norm(), (a - b).norm()) > 0.01 * base.norm()


def test_adapters_in_force_together_add_up_whatever_their_order(
    adapted: UNet2DConditionModel, predict: Predict
) -> None:
    adapted.set_adapters(["a", "b"], [0.7, 0.4])
    layer = next(iter(layers(adapted).values()))
    base = layer.base_linear
    x = torch.randn(3, layer.in_features)
    expected = base(x) + x @ (0.7 * layer.get_delta_weight("a") + 0.4 * layer.get_delta_weight("b")).t()
    assert_close(layer(x), expected)
    one_way = predict(adapted)
    adapted.set_adapters(["b", "a"], [0.4, 0.7])
    assert_close(predict(adapted), one_way)


def test_blockwise_weights_reach_their_blocks(adapted: UNet2DConditionModel) -> None:
    adapted.set_adapters(["a", "b"], [{"down": 0.25, "mid": 0.5, "up": 1.0}, 0.75])
    scales = {name.split("_")[0]: layer.scale("a") for name, layer in layers(adapted).items()}
    assert scales == {"down": 0.25, "mid": 0.5, "up": 1.0}
    assert {layer.scale("b") for layer in layers(adapted).values()} == {0.75}


@pytest.mark.parametrize("scale", [0.0, 0.3, 0.5, 1.0, 2.0])
def test_a_scale_in_the_call_is_the_same_scale_set_before(
    adapted: UNet2DConditionModel, predict: Predict, scale: float
) -> None:
    adapted.set_adapters(["b"])
    in_the_call = predict(adapted, cross_attention_kwargs={"scale": scale})
    adapted.set_adapters(["b"], [scale])
    assert torch.equal(predict(adapted), in_the_call)


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_scale_in_the_call_ends_with_it(
    adapted: UNet2DConditionModel, predict: Predict, scale: float
) -> None:
    adapted.set_adapters(["a", "b"], [0.1, 0.7])
    before = predict(adapted)
    predict(adapted, cross_attention_kwargs={"scale": scale})
    assert torch.equal(predict(adapted), before)


def test_a_scale_of_zero_in_the_call_is_the_base_bit_for_bit(
    adapted: UNet2DConditionModel, predict: Predict
) -> None:
    adapted.set_adapters(["a", "b"], [0.1, 0.7])
    assert torch.equal(predict(adapted, cross_attention_kwargs={"scale": 0.0}), predict(tiny_unet()))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(adapted: UNet2DConditionModel, scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be a finite number; found"):
        adapted.set_adapters(["a"], [scale])


def test_disabled_adapters_leave_the_base_bit_for_bit(
    adapted: UNet2DConditionModel, predict: Predict
) -> None:
    on = predict(adapted)
    adapted.disable_adapters()
    assert torch.equal(predict(adapted), predict(tiny_unet()))
    adapted.enable_adapters()
    assert torch.equal(predict(adapted), on)


def test_disabling_while_fused_unfuses(adapted: UNet2DConditionModel, predict: Predict) -> None:
    adapted.fuse_lora()
    adapted.disable_adapters()
    assert torch.equal(predict(adapted), predict(tiny_unet()))


@pytest.mark.parametrize("lora_scale", [1.0, 0.4])
def test_fusing_is_the_same_prediction_and_unfusing_the_same_bits(
    adapted: UNet2DConditionModel, predict: Predict, lora_scale: float
) -> None:
    adapted.set_adapters(["a", "b"], [0.8, 0.6])
    loose, scaled = predict(adapted), predict(adapted, cross_attention_kwargs={"scale": lora_scale})
    adapted.fuse_lora(lora_scale=lora_scale, safe_fusing=True)
    assert_close(predict(adapted), scaled)
    adapted.unfuse_lora()
    assert torch.equal(predict(adapted), loose)
    adapted.unload_lora()
    assert torch.equal(predict(adapted), predict(tiny_unet()))


def test_fusing_one_adapter_of_two_takes_that_one(adapted: UNet2DConditionModel, predict: Predict) -> None:
    adapted.set_adapters(["b"])
    expected = predict(adapted)
    adapted.set_adapters(["a", "b"])
    adapted.fuse_lora(adapter_names=["b"])
    assert_close(predict(adapted), expected)


def test_fusing_a_second_adapter_later_adds_it(adapted: UNet2DConditionModel, predict: Predict) -> None:
    adapted.set_adapters(["a", "b"])
    expected = predict(adapted)
    adapted.fuse_lora(adapter_names=["a"])
    with pytest.warns(UserWarning, match="You are now additionally merging b"):
        adapted.fuse_lora(adapter_names=["b"])
    assert_close(predict(adapted), expected)
    adapted.unfuse_lora()
    assert torch.equal(predict(adapted), expected)


def test_unloading_after_fusing_keeps_the_fused_weights(
    adapted: UNet2DConditionModel, predict: Predict
) -> None:
    adapted.set_adapters(["a"])
    adapted.fuse_lora()
    fused = predict(adapted)
    adapted.unload_lora()
    assert not layers(adapted)
    assert torch.equal(predict(adapted), fused)


def test_deleting_an_adapter_leaves_the_other(adapted: UNet2DConditionModel, predict: Predict) -> None:
    adapted.set_adapters(["b"])
    expected = predict(adapted)
    adapted.delete_adapters("a")
    assert torch.equal(predict(adapted), expected)
    assert not [name for name in adapted.state_dict() if name.endswith(".a")]


def test_deleting_the_active_adapter_activates_the_other(adapted: UNet2DConditionModel) -> None:
    adapted.set_adapters(["b"])
    with pytest.warns(UserWarning, match="Adapter b was active which is now deleted"):
        adapted.delete_adapters("b")
    assert adapted.active_adapters() == ["a"]


def test_copies_and_pickles_predict_the_same_bits(adapted: UNet2DConditionModel, predict: Predict) -> None:
    expected = predict(adapted)
    assert torch.equal(predict(copy.deepcopy(adapted)), expected)
    assert torch.equal(predict(pickle.loads(pickle.dumps(adapted))), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_sixteen_bits_predicts_close_to_float32(
    adapted: UNet2DConditionModel, predict: Predict, dtype: torch.dtype
) -> None:
    expected = predict(adapted)
    adapted.to(dtype)
    assert {p.dtype for n, p in adapted.named_parameters() if "ether_" in n} == {torch.float32}
    error = (predict(adapted).float() - expected).norm() / expected.norm()
    assert error < 12 * torch.finfo(dtype).eps  # the base alone: 3 to 5, through some 40 layers


def test_autocast_predicts_close_to_float32(
    adapted: UNet2DConditionModel, predict: Predict, unet_inputs: UNetInputs
) -> None:
    expected = predict(adapted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = predict(adapted)
    assert (found.float() - expected).norm() / expected.norm() < 12 * torch.finfo(torch.bfloat16).eps


def gradients(unet: nn.Module, inputs: UNetInputs) -> dict[str, Tensor]:
    unet.train().zero_grad()
    unet(*inputs)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient)


@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
def test_gradients_are_those_of_the_plain_form(
    unet: UNet2DConditionModel, unet_inputs: UNetInputs, variant: str
) -> None:
    unet.add_adapter(EtherConfig(variant=variant, init_weights=False))  # type: ignore[arg-type]
    fast = gradients(unet, unet_inputs)
    for layer in layers(unet).values():
        layer.base_linear.weight.requires_grad_(True)  # which selects plain autograd
    plain = {name: g for name, g in gradients(unet, unet_inputs).items() if "ether_" in name}
    assert_same_gradients(fast, plain)


@pytest.mark.parametrize("prepared", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    adapted: UNet2DConditionModel, unet_inputs: UNetInputs, prepared: bool
) -> None:
    expected = gradients(adapted, unet_inputs)
    adapted.enable_gradient_checkpointing()
    if prepared:
        with prepared_adapters(adapted):
            found = gradients(adapted, unet_inputs)
    else:
        found = gradients(adapted, unet_inputs)
    assert_same_gradients(found, expected)


def test_prepared_adapters_are_used_and_put_back(
    adapted: UNet2DConditionModel, unet_inputs: UNetInputs
) -> None:
    adapted.set_adapters(["b"])
    expected = gradients(adapted, unet_inputs)
    with prepared_adapters(adapted):
        assert all(set(layer.prepared_rows) == {"b"} for layer in layers(adapted).values())
        assert_same_gradients(gradients(adapted, unet_inputs), expected)
    assert not any(layer.prepared_rows for layer in layers(adapted).values())


def test_prepared_adapters_follow_autocast(adapted: UNet2DConditionModel, unet_inputs: UNetInputs) -> None:
    adapted.set_adapters(["a"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(adapted, unet_inputs)
        with prepared_adapters(adapted):
            found = gradients(adapted, unet_inputs)
    assert_same_gradients(found, expected)


def test_training_lowers_a_loss_and_touches_only_the_active_adapter(
    adapted: UNet2DConditionModel, unet_inputs: UNetInputs
) -> None:
    adapted.set_adapters(["b"])
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    optimizer = torch.optim.AdamW(
        [p for p in adapted.parameters() if p.requires_grad], lr=6e-3, weight_decay=0
    )
    target = torch.randn(2, 4, 8, 8)
    losses = []
    for _ in range(10):
        with prepared_adapters(adapted):
            loss = (adapted(*unet_inputs)[0] - target).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.endswith(".b") and "ether_" in name}


@pytest.mark.filterwarnings("ignore")  # the compiler's own, which change with every release
@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
def test_a_compiled_block_predicts_and_learns_the_same_without_a_graph_break(
    unet: UNet2DConditionModel, variant: str
) -> None:
    unet.add_adapter(EtherConfig(variant=variant, init_weights=False))  # type: ignore[arg-type]
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    hidden, text = torch.randn(2, 16, 64), torch.randn(2, 7, 32)

    def run(module: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
        vectors = [p for name, p in block.named_parameters() if "ether_" in name]
        y = module(hidden, encoder_hidden_states=text)
        return y, list(torch.autograd.grad(y.square().mean(), vectors))

    (y, expected), (compiled_y, found) = run(block), run(torch.compile(block, fullgraph=True))
    assert_close(compiled_y, y)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_a_pipelines_own_methods_weigh_fuse_and_unload(predict: Predict) -> None:
    pipe = tiny_sd()
    before = predict(pipe.unet)
    pipe.unet.add_adapter(EtherConfig(), "a")
    pipe.unet.add_adapter(EtherConfig(variant="ether_plus", init_weights=False), "b")
    pipe.set_adapters(["a", "b"], [0.5, 0.25])
    loose = predict(pipe.unet)
    pipe.fuse_lora(adapter_names=["a", "b"])
    assert_close(predict(pipe.unet), loose)
    pipe.unfuse_lora()
    assert pipe.get_active_adapters() == ["a", "b"]
    pipe.delete_adapters("a")
    assert pipe.get_list_adapters() == {"unet": ["b"]}
    pipe.unload_lora_weights()
    assert torch.equal(predict(pipe.unet), before)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_pipeline_samples_with_a_scale_in_the_call(scale: float) -> None:
    pipe = tiny_sd()
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.add_adapter(EtherConfig(), "a")

    def image(**options: object) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        latents: Tensor = pipe(
            "a b", num_inference_steps=2, output_type="latent", generator=generator, **options
        ).images
        return latents

    in_the_call = image(cross_attention_kwargs={"scale": scale})
    pipe.set_adapters(["a"], [scale])
    assert torch.equal(image(), in_the_call)

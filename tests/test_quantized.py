"""QETHER: adapters on a base whose weights are quantized, against the dense map of the dequantized ones.

bitsandbytes and torchao are tested where they are installed, which is not in `make test`, as PEFT and
diffusers then import them at every start: pip install -e '.[quantized]' torchao. A layer of the same form
always is.
"""

import importlib.util
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from flow_pipelines import FLOW_PIPELINES, SIDE, draw, flow_pipeline
from forked_runs import exit_code, fork, training, training_until_change
from oracles import dense_weight, in_float64
from peft import get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from training_runs import config, log_of, trained_files

from ether_diffusion import EtherConfig, load_ether, mixed_adapters, prepared_adapters, save_ether
from ether_diffusion.export import export_lora, export_merged
from ether_diffusion.training.run import train_dreambooth
from ether_diffusion.tuner import EtherLinear, quantized

WIDTH, HEIGHT = 64, 128  # bitsandbytes spoils widths that 64 does not divide, on a CPU


class Rounded(nn.Linear):
    """Weights as whole numbers of 2⁻¹⁰, in the form that PEFT dequantizes: `W_q` and `dequantize`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.bias = linear.bias
        self.W_q = nn.Parameter((linear.weight.detach() * 1024).round().to(torch.int16), requires_grad=False)
        self.weight = self.W_q

    def dequantize(self) -> Tensor:
        return self.W_q.float() / 1024

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantize().to(x.dtype), self.bias)


def bitsandbytes(kind: str, linear: nn.Linear) -> nn.Linear:
    import bitsandbytes as bnb

    size: Any = (linear.in_features, linear.out_features, linear.bias is not None)
    if kind == "nf4":
        made = bnb.nn.Linear4bit(*size, quant_type="nf4", compute_dtype=torch.float32)
    else:
        made = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    quantized: nn.Linear = made.to("cpu").requires_grad_(False)  # which quantizes
    return quantized


def torchao(linear: nn.Linear) -> nn.Linear:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig())
    return linear


def installed(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed: see the module's docstring")


MAKERS: dict[str, Any] = {
    "rounded": pytest.param(Rounded, id="rounded"),
    "nf4": pytest.param(
        lambda linear: bitsandbytes("nf4", linear), marks=installed("bitsandbytes"), id="nf4"
    ),
    "int8": pytest.param(
        lambda linear: bitsandbytes("int8", linear), marks=installed("bitsandbytes"), id="int8"
    ),
    "torchao": pytest.param(torchao, marks=installed("torchao"), id="torchao"),
}


@pytest.fixture(params=MAKERS.values())
def quantize(request: pytest.FixtureRequest) -> Callable[[nn.Linear], nn.Linear]:
    made: Callable[[nn.Linear], nn.Linear] = request.param
    return made


class Model(nn.Module):
    def __init__(self, quantize: Callable[[nn.Linear], nn.Linear] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_out = nn.Linear(WIDTH, HEIGHT), nn.Linear(HEIGHT, WIDTH, bias=False)
        self.requires_grad_(False)
        for linear in (self.to_q, self.to_out):
            nn.init.normal_(linear.weight, std=0.1)
        if quantize is not None:
            self.to_q, self.to_out = quantize(self.to_q), quantize(self.to_out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.to_out(torch.relu(self.to_q(x)))
        return y


def adapted(quantize: Callable[[nn.Linear], nn.Linear] | None, variant: str = "ether_plus") -> Any:
    config = EtherConfig(variant=variant, target_modules=["to_q", "to_out"], init_weights=False)  # type: ignore[arg-type]
    model = get_peft_model(Model(quantize), config)
    for seed, name in enumerate(("default", "other")):
        if name == "other":
            model.add_adapter("other", config)
        torch.manual_seed(seed)
        for key, vector in model.named_parameters():
            if key.endswith(f".{name}"):
                vector.data = torch.randn_like(vector)
    return model


def layers(model: nn.Module) -> list[EtherLinear]:
    return [module for module in model.modules() if isinstance(module, EtherLinear)]


def dense(layer: EtherLinear, scales: dict[str, float]) -> Tensor:
    """W' in float64 from the identity through the base's own product, less its bias."""
    base, eye = layer.base_linear, torch.eye(layer.in_features)
    with torch.no_grad():
        bias = base(torch.zeros(1, layer.in_features))
        weight = (base(eye) - bias).t().double()
    total = weight.clone()
    for name, scale in scales.items():
        sides = [None if side is None else in_float64(side) for side in layer.vectors(name)]
        total += scale * (dense_weight(weight, *sides).detach() - weight)
    return total


@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
@pytest.mark.parametrize("scales", [{"default": 1.0}, {"default": 0.5, "other": -0.7}, {}], ids=str)
def test_outputs_are_those_of_the_dequantized_weight(
    quantize: Callable[[nn.Linear], nn.Linear], variant: str, scales: dict[str, float]
) -> None:
    model, x = adapted(quantize, variant), torch.randn(2, 5, WIDTH)
    layer = layers(model)[0]
    model.base_model.set_adapter(list(scales) or ["default"])
    for name in ("default", "other"):
        layer.set_scale(name, scales.get(name, 0.0))
    expected = x.double() @ dense(layer, scales).t()
    found = layer(x) - layer.base_linear(torch.zeros(1, WIDTH))
    error = (found.double() - expected).norm() / expected.norm()
    assert (
        error < 8e-3 if isinstance(layer.base_linear, Rounded) is False else 1e-5
    )  # int8 rounds activations


def test_vectors_are_trained_and_nothing_else(quantize: Callable[[nn.Linear], nn.Linear]) -> None:
    model, x = adapted(quantize), torch.randn(7, WIDTH)
    target = torch.randn(7, WIDTH)
    model.train()
    model.base_model.set_adapter(["default"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    losses = []
    for _ in range(20):
        with prepared_adapters(model):
            loss = (model(x) - target).square().mean()
            loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_gradients_are_those_of_the_dequantized_weight(quantize: Callable[[nn.Linear], nn.Linear]) -> None:
    model, plain = adapted(quantize), adapted(None)
    for ours, theirs in zip(layers(model), layers(plain), strict=True):
        theirs.base_linear.weight.data = dense(ours, {}).float()
    x = torch.randn(7, WIDTH)
    grads = []
    for each in (model, plain):
        each.zero_grad()
        each(x).square().mean().backward()
        grads.append([p.grad for n, p in each.named_parameters() if n.endswith(".default")])
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 2e-2  # int8 rounds activations


def test_merging_gives_a_plain_weight_and_unmerging_the_quantized_layer(
    quantize: Callable[[nn.Linear], nn.Linear],
) -> None:
    model, x = adapted(quantize), torch.randn(3, WIDTH)
    layer = layers(model)[0]
    before, base = model(x), layer.base_linear
    model.merge_adapter(["default"])
    assert layer.base_linear is not base
    assert layer.base_linear.weight.dtype == torch.float32
    assert_close(layer.base_linear.weight.double(), dense_of(base, layer), atol=1e-4, rtol=1e-4)
    assert (model(x) - before).norm() / before.norm() < 2e-2
    model.unmerge_adapter()
    assert layer.base_linear is base
    assert torch.equal(model(x), before)
    merged = model.merge_and_unload()
    assert {type(module) for module in merged.children()} == {nn.Linear}


def dense_of(base: nn.Linear, layer: EtherLinear) -> Tensor:
    merged, layer.base_layer = layer.base_layer, base
    found = dense(layer, {"default": 1.0})
    layer.base_layer = merged
    return found


def test_quantize_replaces_linears_that_draw_train_and_are_read_as_before() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: see the module's docstring")
    for kind in ("nf4", "int8"):
        model, plain = Model(None), Model(None)
        assert quantized.quantize(model, kind, torch.float32) == 2
        model.to("cpu").eval()
        with torch.no_grad():
            x = torch.randn(3, WIDTH)
            found = model(x)
        assert (found - plain(x)).norm() / plain(x).norm() < 0.2
        for name in ("to_q", "to_out"):
            weight = getattr(plain, name).weight
            error = (quantized.dequantized(getattr(model, name)) - weight).norm() / weight.norm()
            assert error < {"nf4": 0.1, "int8": 0.01}[kind]


def test_each_row_of_a_batch_has_its_own_adapter(quantize: Callable[[nn.Linear], nn.Linear]) -> None:
    model, x = adapted(quantize), torch.randn(3, 4, WIDTH)
    layer = layers(model)[0]
    with torch.no_grad(), mixed_adapters(model, ["default", "other", None], scales=[1.0, 0.5, 1.0]):
        found = layer(x)
    bias = layer.base_linear(torch.zeros(1, WIDTH))
    for row, scales in enumerate(({"default": 1.0}, {"other": 0.5}, {})):
        expected = x[row].double() @ dense(layer, scales).t() + bias.double()
        assert (found[row].double() - expected).norm() / expected.norm() < 1e-2


def test_what_was_trained_on_quantized_weights_goes_onto_the_base_and_exports(
    quantize: Callable[[nn.Linear], nn.Linear], tmp_path: Path
) -> None:
    trained = adapted(quantize)
    save_ether(trained, tmp_path)
    for base in (Model(quantize), Model(None)):
        report = load_ether(base, tmp_path)
        assert report.base_match == "same"
    path = export_lora(tmp_path, Model(quantize), tmp_path, dtype=torch.float32)
    assert path.is_file()


@installed("bitsandbytes")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:the adapter was made for .* other weights:UserWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", FLOW_PIPELINES)
def test_a_quantized_transformer_trains_goes_on_after_a_kill_and_draws(
    family: str, kind: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    flow_pipeline(family, is_wide=True).save_pretrained(base)
    flags: dict[str, Any] = {"pretrained_model_name_or_path": str(base), "resolution": SIDE, "quantize": kind}
    flags |= {"max_train_steps": 4, "checkpointing_steps": 1, "learning_rate": 0.1, "export_lora": True}
    run = config(tmp_path, **flags)
    assert exit_code(fork(training_until_change(run, 60))) == -signal.SIGKILL
    assert 0 < len(log_of(tmp_path / "run")) < 4
    assert exit_code(fork(training(run), tmp_path / "said")) == 0, (tmp_path / "said").read_text()
    assert train_dreambooth(config(tmp_path, **flags, output_dir=str(tmp_path / "whole"))) == 0
    assert trained_files(tmp_path / "run") == trained_files(tmp_path / "whole")
    plain, native, lora, coarse, dense = (flow_pipeline(family, is_wide=True) for _ in range(5))
    assert quantized.quantize(coarse.transformer, kind, torch.float32)  # type: ignore[arg-type]
    coarse.transformer.to("cpu")
    for name, layer in coarse.transformer.named_modules():
        if isinstance(layer, nn.Linear) and not quantized.is_plain(layer):
            dense.transformer.get_submodule(name).weight.data = quantized.dequantized(layer)
    load_ether(dense, tmp_path / "run")
    assert {load_ether(pipe, tmp_path / "run").base_match for pipe in (native, coarse)} == {"same"}
    lora.load_lora_weights(tmp_path / "run")
    adapted, base_drawn = draw(native, family), draw(plain, family)
    assert_close(draw(lora, family), adapted, atol=1e-4, rtol=0)
    error = (draw(coarse, family) - draw(dense, family)).norm() / (adapted - base_drawn).norm()
    assert error < (0.1 if kind == "nf4" else 0.5)  # int8 rounds activations
    merged = export_merged(tmp_path / "run", plain, tmp_path / "merged")
    assert_close(draw(DiffusionPipeline.from_pretrained(merged), family), adapted, atol=1e-4, rtol=0)
    again = flow_pipeline(family, is_wide=True)
    quantized.quantize(again.transformer, kind, torch.float32)  # type: ignore[arg-type]
    again.transformer.to("cpu")
    before = draw(again, family)
    merged = export_merged(tmp_path / "run", again, tmp_path / "merged_dense")
    assert_close(
        draw(DiffusionPipeline.from_pretrained(merged), family), draw(dense, family), atol=1e-4, rtol=0
    )
    assert torch.equal(draw(again, family), before)

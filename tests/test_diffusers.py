"""What diffusers' users may rely on with LoRA holds for ETHER: in a UNet, in transformers, in pipelines.

Where ETHER differs, and why:
- Plain ETHER does not start at the base: a reflection keeps its distance. ETHER+ does, and so do these laws.
- Files are written by `save_ether` and read by `load_ether`: `save_lora_weights` and `load_lora_weights` know
  LoRA's factors only, and take the export. Hence no hotswapping, and no LoRA metadata.
- `set_lora_device` looks for LoRA's own parameters; an adapter moves with its model.
- DoRA, `lora_bias` and ranks have no counterpart.
- `unet.save_pretrained` with an adapter inside, as with a LoRA: diffusers' `from_pretrained` finds the base's
  weights under other names; `load_base` reads them (test_base.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNetInputs, tiny_unet
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from tiny_pipelines import tiny_sd, tiny_sdxl
from torch import Tensor, nn
from torch.testing import assert_close
from transformer_families import TRANSFORMERS

from ether_diffusion import EtherConfig, load_ether, prepared_adapters, save_ether
from ether_diffusion.export import export_lora
from ether_diffusion.tuner import EtherLinear

Predict = Callable[..., Tensor]

# PEFT, at a second adapter; and diffusers of its own embeddings
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]

ATTENTION, OF_TEXT = ["to_q", "to_k", "to_v", "to_out.0"], ["q_proj", "k_proj", "v_proj", "out_proj"]
TEXT = torch.linspace(-1, 1, 160).view(1, 5, 32)
IMAGE = torch.linspace(-1, 1, 256).view(1, 4, 8, 8)
POOLED = {"encoder_hidden_states": TEXT, "timestep": torch.ones(1), "pooled_projections": torch.ones(1, 16)}
IDS = {"img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(5, 3)}


@dataclass(frozen=True)
class Subject:
    """A model, or a pipeline and the components of it that are adapted."""

    make: Callable[[], Any]
    components: tuple[str, ...] = ()
    inputs: dict[str, Any] = field(default_factory=dict)
    key_of_scale: str = "cross_attention_kwargs"

    def models(self, whole: Any) -> dict[str, Any]:
        return {name: getattr(whole, name) for name in self.components} or {"transformer": whole}

    def __call__(self, *names: str, at_base: bool = False) -> Any:
        """Make one that carries adapters by these names, the last of them active."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            whole = self.make()
            for name in names:
                for component, model in self.models(whole).items():
                    torch.manual_seed(sum(map(ord, name + component)))
                    targets = OF_TEXT if "text" in component else ATTENTION
                    plus = EtherConfig(variant="ether_plus", target_modules=targets, init_weights=at_base)
                    model.add_adapter(plus, name)
            if names:
                whole.set_adapters(names[-1])
        return whole

    @torch.no_grad()
    def run(self, whole: Any, scale: float | None = None) -> Tensor:
        options: dict[str, Any] = {} if scale is None else {self.key_of_scale: {"scale": scale}}
        if not self.components:
            result: Tensor = whole(**self.inputs, **options)[0]
            return result
        whole.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        options |= {"height": 16, "width": 16, "generator": seed, "output_type": "latent"}
        latents: Tensor = whole("a b c", num_inference_steps=2, guidance_scale=3.0, **options).images
        return latents

    def fuse(self, whole: Any, **options: Any) -> None:
        of = {"components": list(self.components)} if self.components else {}
        whole.fuse_lora(**of, **options)

    def unfuse(self, whole: Any) -> None:
        whole.unfuse_lora(**({"components": list(self.components)} if self.components else {}))

    def switch(self, whole: Any, how: str) -> None:
        getattr(whole, f"{how}_lora" if self.components else f"{how}_adapters")()

    def unload(self, whole: Any) -> None:
        (whole.unload_lora_weights if self.components else whole.unload_lora)()


UNET = {"sample": IMAGE, "timestep": torch.tensor([500]), "encoder_hidden_states": TEXT}
SUBJECTS = {
    "unet": Subject(tiny_unet, inputs=UNET),
    "sd3": Subject(TRANSFORMERS["sd3"], (), POOLED | {"hidden_states": IMAGE}, "joint_attention_kwargs"),
    "flux": Subject(
        TRANSFORMERS["flux"],
        (),
        POOLED | IDS | {"hidden_states": torch.ones(1, 9, 4), "guidance": torch.ones(1)},
        "joint_attention_kwargs",
    ),
    "sd text encoder": Subject(tiny_sd, ("text_encoder",)),
    "sd": Subject(tiny_sd, ("unet", "text_encoder")),
    "sdxl": Subject(tiny_sdxl, ("unet", "text_encoder", "text_encoder_2")),
}


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-4)


def test_an_adapter_that_starts_at_the_base_gives_what_the_base_gives(subject: Subject) -> None:
    assert close(subject.run(subject("a", at_base=True)), subject.run(subject()))


def test_a_scale_in_the_call_is_that_of_set_adapters_ends_with_it_and_is_the_base_at_zero(
    subject: Subject,
) -> None:
    whole, base = subject("a"), subject.run(subject())
    full, half = subject.run(whole), subject.run(whole, 0.5)
    assert not any(close(*pair) for pair in ((full, base), (half, base), (half, full)))
    assert torch.equal(subject.run(whole, 0.0), base)
    assert torch.equal(subject.run(whole), full)
    whole.set_adapters("a", 0.5)
    assert torch.equal(subject.run(whole), half)


def test_disabling_is_the_base_enabling_the_adapter_and_unloading_leaves_no_trace(subject: Subject) -> None:
    whole, base = subject("b", "a"), subject.run(subject())
    full = subject.run(whole)
    subject.switch(whole, "disable")
    assert torch.equal(subject.run(whole), base)
    subject.switch(whole, "enable")
    assert torch.equal(subject.run(whole), full)
    subject.unload(whole)
    for model in subject.models(whole).values():
        assert not any(isinstance(module, EtherLinear) for module in model.modules())
    assert torch.equal(subject.run(whole), base)


def test_fusing_gives_the_same_and_unfusing_takes_it_back_exactly(subject: Subject) -> None:
    whole, base = subject("a", "b"), subject.run(subject())
    whole.set_adapters(["a", "b"], [0.8, 0.6])
    both = subject.run(whole)
    subject.fuse(whole)
    assert close(subject.run(whole), both)
    subject.unfuse(whole)
    half = subject.run(whole, 0.5)
    subject.fuse(whole, lora_scale=0.5, safe_fusing=True)
    assert close(subject.run(whole), half)
    subject.unfuse(whole)
    assert torch.equal(subject.run(whole), both)
    whole.set_adapters(["a", "b"])
    both = subject.run(whole)
    subject.fuse(whole, adapter_names=["a"])
    assert close(subject.run(whole), subject.run(subject("a")))
    with pytest.warns(UserWarning, match="You are now additionally merging b"):
        subject.fuse(whole, adapter_names=["b"])
    assert close(subject.run(whole), both)
    subject.switch(whole, "disable")  # which unfuses
    assert torch.equal(subject.run(whole), base)


def test_several_adapters_are_chosen_weighed_and_deleted(subject: Subject) -> None:
    whole, base = subject("a", "b"), subject.run(subject())
    b = subject.run(whole)
    whole.set_adapters("a")
    a = subject.run(whole)
    assert torch.equal(a, subject.run(subject("a")))
    whole.set_adapters(["a", "b"])
    both = subject.run(whole)
    whole.set_adapters(["a", "b"], [0.5, 0.6])
    weighed = subject.run(whole)
    found = [base, a, b, both, weighed]
    assert not any(close(x, y) for i, x in enumerate(found) for y in found[:i])
    whole.set_adapters(["b", "a"], [0.6, 0.5])
    assert close(subject.run(whole), weighed)
    whole.set_adapters(["a", "b"], [1.0, 0.0])
    assert torch.equal(subject.run(whole), a)
    whole.delete_adapters("a")
    whole.set_adapters("b")
    assert torch.equal(subject.run(whole), b)
    if subject.components:
        with pytest.raises(ValueError, match="not in the list of present adapters"):
            whole.set_adapters(["b", "nobody"])
    whole.delete_adapters(["b"])
    assert torch.equal(subject.run(whole), base)


def test_what_is_saved_and_what_is_exported_as_a_lora_give_the_same(subject: Subject, tmp_path: Path) -> None:
    whole, other, lora = subject("default"), subject(), subject()
    expected = subject.run(whole)
    save_ether(whole, tmp_path)
    report = load_ether(other, tmp_path, adapter_name="x")
    assert report.base_match == "same"
    assert torch.equal(subject.run(other), expected)
    other.delete_adapters("x")
    load_ether(other, tmp_path, adapter_name="x")
    assert torch.equal(subject.run(other), expected)
    path = export_lora(tmp_path, subject(), tmp_path, dtype=torch.float32)
    if subject.components:
        assert tuple(report.components) == subject.components
        lora.load_lora_weights(tmp_path, weight_name=path.name)
    elif isinstance(lora, UNet2DConditionModel):  # whose LoRAs a pipeline loads
        pipe = tiny_sd()
        pipe.register_modules(unet=lora)
        pipe.load_lora_weights(tmp_path, weight_name=path.name)
    else:
        lora.load_lora_adapter(tmp_path, weight_name=path.name)
    assert close(subject.run(lora), expected)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("name", ["unet", "sd3", "flux", "sd", "sdxl"])
def test_group_offloading_before_or_after_loading_changes_no_bit(
    name: str, level: str, tmp_path: Path
) -> None:
    subject = SUBJECTS[name]
    save_ether(subject("default"), tmp_path)
    expected = subject.run(subject("default"))
    options = {"offload_type": level, "num_blocks_per_group": 1 if level == "block_level" else None}
    for is_first in (True, False):
        whole = subject()
        for step in ("offload", "load") if is_first else ("load", "offload"):
            if step == "load":
                load_ether(whole, tmp_path)
                continue
            for model in subject.models(whole).values():
                apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), **options)
        assert torch.equal(subject.run(whole), expected)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_pipeline_lists_its_adapters_and_one_made_from_it_shares_them(name: str) -> None:
    subject = SUBJECTS[name]
    pipe = subject("a", "b")
    kind = StableDiffusionXLImg2ImgPipeline if name == "sdxl" else StableDiffusionImg2ImgPipeline
    other = kind.from_pipe(pipe)
    assert other.get_list_adapters() == {component: ["a", "b"] for component in subject.components}
    other.set_adapters("a")
    assert pipe.get_active_adapters() == ["a"]
    assert torch.equal(subject.run(type(pipe).from_pipe(other)), subject.run(subject("a")))
    subject.fuse(pipe)
    assert (pipe.num_fused_loras, pipe.fused_loras) == (1, {"a"})
    subject.unfuse(pipe)
    assert pipe.num_fused_loras == 0


@pytest.fixture
def adapted(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet with an ETHER adapter "a" and an ETHER+ adapter "b", neither at the identity."""
    unet.add_adapter(EtherConfig(init_weights=False), "a")
    unet.add_adapter(EtherConfig(variant="ether_plus", init_weights=False, num_blocks=2), "b")
    return unet


def layers(unet: nn.Module) -> dict[str, EtherLinear]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, EtherLinear)}


def test_adapters_in_force_together_add_their_updates(adapted: UNet2DConditionModel) -> None:
    adapted.set_adapters(["a", "b"], [0.7, 0.4])
    layer = next(iter(layers(adapted).values()))
    x = torch.randn(3, layer.in_features)
    update = 0.7 * layer.get_delta_weight("a") + 0.4 * layer.get_delta_weight("b")
    assert_close(layer(x), layer.base_linear(x) + x @ update.t())


@pytest.mark.parametrize("up", [1.0, {"block_1": 0.125}])
def test_blockwise_weights_reach_their_blocks(adapted: UNet2DConditionModel, up: Any) -> None:
    adapted.set_adapters(["a", "b"], [{"down": 0.25, "mid": 0.5, "up": up}, 0.75])
    scales = {name.split("_")[0]: layer.scale("a") for name, layer in layers(adapted).items()}
    assert scales == {"down": 0.25, "mid": 0.5, "up": 1.0 if up == 1.0 else 0.125}
    assert {layer.scale("b") for layer in layers(adapted).values()} == {0.75}


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(adapted: UNet2DConditionModel, scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be a finite number"):
        adapted.set_adapters(["a"], [scale])


def test_unloading_after_fusing_keeps_the_fused_weights(
    adapted: UNet2DConditionModel, predict: Predict
) -> None:
    adapted.fuse_lora()
    fused = predict(adapted)
    adapted.unload_lora()
    assert not layers(adapted)
    assert torch.equal(predict(adapted), fused)


def test_deleting_the_active_adapter_activates_the_other(adapted: UNet2DConditionModel) -> None:
    adapted.set_adapters(["b"])
    with pytest.warns(UserWarning, match="Adapter b was active which is now deleted"):
        adapted.delete_adapters("b")
    assert adapted.active_adapters() == ["a"]
    assert not [name for name in adapted.state_dict() if name.endswith(".b")]


@pytest.mark.parametrize("how", [torch.bfloat16, torch.float16, "autocast"], ids=str)
def test_a_base_in_sixteen_bits_predicts_close_to_float32(
    adapted: UNet2DConditionModel, predict: Predict, how: torch.dtype | str
) -> None:
    expected = predict(adapted)
    dtype = how if isinstance(how, torch.dtype) else torch.bfloat16
    if how == "autocast":
        with torch.autocast("cpu", dtype=dtype):
            found = predict(adapted)
    else:
        found = predict(adapted.to(dtype))
    assert {p.dtype for n, p in adapted.named_parameters() if "ether_" in n} == {torch.float32}
    error = (found.float() - expected).norm() / expected.norm()
    assert error < 12 * torch.finfo(dtype).eps  # the base alone: 3 to 5, through some 40 layers


def gradients(unet: nn.Module, inputs: UNetInputs) -> dict[str, Tensor]:
    unet.train().zero_grad()
    unet(*inputs)[0].square().mean().backward()
    return {n: p.grad.clone() for n, p in unet.named_parameters() if "ether_" in n and p.grad is not None}


@pytest.mark.parametrize("way", ["plain autograd", "prepared", "recomputed", "recomputed and prepared"])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_gradients_are_the_same_in_every_way(
    adapted: UNet2DConditionModel, unet_inputs: UNetInputs, way: str, is_autocast: bool
) -> None:
    adapted.set_adapters(["a", "b"])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        expected = gradients(adapted, unet_inputs)
        assert len(expected) == len(layers(adapted)) * 5
        if way == "plain autograd":
            for layer in layers(adapted).values():
                layer.base_linear.weight.requires_grad_(True)  # which selects it
        if "recomputed" in way:
            adapted.enable_gradient_checkpointing()
        if "prepared" in way:
            with prepared_adapters(adapted):
                assert all(set(layer.prepared_rows) == {"a", "b"} for layer in layers(adapted).values())
                found = gradients(adapted, unet_inputs)
            assert not any(layer.prepared_rows for layer in layers(adapted).values())
        else:
            found = gradients(adapted, unet_inputs)
    assert found.keys() == expected.keys()
    is_reordered = is_autocast and way != "prepared"  # bfloat16 sums in another order
    atol, rtol = (1e-3, 5e-2) if is_reordered else (1e-5, 1.3e-6)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=atol, rtol=rtol)


@pytest.mark.filterwarnings("ignore")  # the compiler's own, which change with every release
def test_a_compiled_block_predicts_and_learns_the_same_without_a_graph_break(
    unet: UNet2DConditionModel,
) -> None:
    """ETHER in a half of the projections, ETHER+ in the other."""
    unet.add_adapter(EtherConfig(init_weights=False, target_modules=["to_q", "to_v"]), "a")
    plus = EtherConfig(variant="ether_plus", init_weights=False, target_modules=["to_k", "to_out.0"])
    unet.add_adapter(plus, "b")
    unet.set_adapters(["a", "b"])
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

"""What diffusers' users may rely on with LoRA holds for ETHER, in pipelines and in transformers.

Where ETHER differs, and why:
- Plain ETHER does not start at the base: a reflection keeps its distance. ETHER+ does, and so do these laws.
- Files are written by `save_ether` and read by `load_ether`: `save_lora_weights` and `load_lora_weights` know
  LoRA's factors only, and take the export. Hence no hotswapping, and no LoRA metadata.
- `set_lora_device` looks for LoRA's own parameters; an adapter moves with its model.
- DoRA, `lora_bias` and ranks have no counterpart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from diffusers.hooks import apply_group_offloading
from test_other_models import CASES
from tiny_pipelines import tiny_sd, tiny_sdxl
from torch import Tensor, nn

from ether_diffusion import EtherConfig, load_ether, save_ether
from ether_diffusion.export import export_lora
from ether_diffusion.tuner import EtherLinear

# PEFT, at a second adapter; and diffusers of its own embeddings
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]

TARGETS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "transformer": ["to_q", "to_k", "to_v", "to_out.0"]}
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


def config(component: str, *, at_base: bool = False) -> EtherConfig:
    return EtherConfig(
        variant="ether_plus", target_modules=TARGETS.get(component, TEXT), init_weights=at_base
    )


@dataclass(frozen=True)
class Subject:
    """A pipeline of diffusers, and the components of it that are adapted."""

    make: Callable[[], Any]
    components: tuple[str, ...]

    def pipe(self, *names: str, at_base: bool = False) -> Any:
        """A pipeline that carries adapters by these names, the last of them active."""
        pipe = self.make()
        pipe.set_progress_bar_config(disable=True)
        for name in names:
            for component in self.components:
                torch.manual_seed(sum(map(ord, name + component)))
                getattr(pipe, component).add_adapter(config(component, at_base=at_base), name)
        if names:
            pipe.set_adapters(names[-1])
        return pipe


def draw(pipe: Any, **options: Any) -> Tensor:
    latents: Tensor = pipe(
        "a b c",
        num_inference_steps=2,
        height=16,
        width=16,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    ).images
    return latents


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-4)


SUBJECTS = {
    "sd unet": Subject(tiny_sd, ("unet",)),
    "sd text encoder": Subject(tiny_sd, ("text_encoder",)),
    "sd both": Subject(tiny_sd, ("unet", "text_encoder")),
    "sdxl unet": Subject(tiny_sdxl, ("unet",)),
    "sdxl text encoders": Subject(tiny_sdxl, ("text_encoder", "text_encoder_2")),
    "sdxl all": Subject(tiny_sdxl, ("unet", "text_encoder", "text_encoder_2")),
}


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


def test_an_adapter_that_starts_at_the_base_draws_what_the_base_draws(subject: Subject) -> None:
    assert close(draw(subject.pipe("a", at_base=True)), draw(subject.pipe()))


def test_an_adapter_is_seen_and_a_scale_of_zero_is_the_base(subject: Subject) -> None:
    pipe, base = subject.pipe("a"), draw(subject.pipe())
    full = draw(pipe)
    half = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    assert not close(full, base)
    assert not close(half, base)
    assert not close(half, full)
    assert torch.equal(draw(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    assert torch.equal(draw(pipe), full)


def test_fusing_draws_the_same_and_unfusing_takes_it_back_exactly(subject: Subject) -> None:
    pipe, base = subject.pipe("a"), draw(subject.pipe())
    full = draw(pipe)
    pipe.fuse_lora(components=list(subject.components))
    assert pipe.num_fused_loras == 1
    assert close(draw(pipe), full)
    pipe.unfuse_lora(components=list(subject.components))
    assert pipe.num_fused_loras == 0
    assert torch.equal(draw(pipe), full)
    pipe.fuse_lora(components=list(subject.components), lora_scale=0.5)
    scaled = draw(pipe)
    pipe.unfuse_lora(components=list(subject.components))
    assert close(draw(pipe, cross_attention_kwargs={"scale": 0.5}), scaled)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), base)


def test_unloading_leaves_the_base(subject: Subject) -> None:
    pipe = subject.pipe("a", "b")
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {}
    for component in subject.components:
        assert not any(isinstance(m, EtherLinear) for m in getattr(pipe, component).modules())
    assert torch.equal(draw(pipe), draw(subject.pipe()))


def test_disabling_is_the_base_and_enabling_the_adapter(subject: Subject) -> None:
    pipe, base = subject.pipe("a"), draw(subject.pipe())
    full = draw(pipe)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), base)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), full)


def test_several_adapters_are_chosen_weighed_and_deleted(subject: Subject) -> None:
    pipe, base = subject.pipe("a", "b"), draw(subject.pipe())
    assert pipe.get_list_adapters() == {key: ["a", "b"] for key in subject.components}
    pipe.set_adapters("a")
    assert pipe.get_active_adapters() == ["a"]
    a = draw(pipe)
    assert torch.equal(a, draw(subject.pipe("a")))
    pipe.set_adapters("b")
    b = draw(pipe)
    pipe.set_adapters(["a", "b"])
    both = draw(pipe)
    pipe.set_adapters(["a", "b"], [0.5, 0.6])
    weighed = draw(pipe)
    pictures = [base, a, b, both, weighed]
    assert not any(close(x, y) for i, x in enumerate(pictures) for y in pictures[:i])
    pipe.set_adapters(["a", "b"], [1.0, 0.0])
    assert torch.equal(draw(pipe), a)
    pipe.delete_adapters("a")
    assert pipe.get_list_adapters() == {key: ["b"] for key in subject.components}
    pipe.set_adapters("b")
    assert torch.equal(draw(pipe), b)
    pipe.delete_adapters(["b"])
    assert torch.equal(draw(pipe), base)


def test_an_unknown_adapter_is_refused(subject: Subject) -> None:
    pipe = subject.pipe("a")
    with pytest.raises(ValueError, match="not in the list of present adapters"):
        pipe.set_adapters(["a", "nobody"])


def test_fusing_several_adds_them_up(subject: Subject) -> None:
    pipe = subject.pipe("a", "b")
    pipe.set_adapters(["a", "b"])
    both = draw(pipe)
    pipe.fuse_lora(components=list(subject.components), adapter_names=["a", "b"])
    assert pipe.fused_loras == {"a", "b"}
    assert close(draw(pipe), both)


@pytest.mark.parametrize("blocks", [{"down": 0.0}, {"mid": 0.5, "up": {"block_1": 0.25}}], ids=str)
@pytest.mark.parametrize("name", ["sd unet", "sd both"])
def test_weights_by_block_are_those_of_the_layers(name: str, blocks: dict[str, Any]) -> None:
    pipe = SUBJECTS[name].pipe("a")
    pipe.set_adapters("a", {"unet": blocks})
    expected = {"down": blocks.get("down", 1.0), "mid": blocks.get("mid", 1.0)}
    for layer_name, layer in pipe.unet.named_modules():
        if isinstance(layer, EtherLinear):
            side = layer_name.partition("_")[0]
            assert layer.scale("a") == expected.get(side, 0.25 if "up" in blocks else 1.0)
    assert not close(draw(pipe), draw(SUBJECTS[name].pipe("a")))


def test_a_saved_adapter_draws_the_same_in_another_pipeline(subject: Subject, tmp_path: Path) -> None:
    pipe, other = subject.pipe("default"), subject.pipe()
    save_ether(pipe, tmp_path)
    report = load_ether(other, tmp_path, adapter_name="x")
    assert tuple(report.components) == subject.components
    assert torch.equal(draw(other), draw(pipe))
    other.delete_adapters("x")
    load_ether(other, tmp_path, adapter_name="x")
    assert torch.equal(draw(other), draw(pipe))


def test_the_export_as_a_lora_draws_the_same(subject: Subject, tmp_path: Path) -> None:
    pipe, other = subject.pipe("default"), subject.pipe()
    save_ether(pipe, tmp_path)
    path = export_lora(tmp_path, subject.pipe(), tmp_path, dtype=torch.float32)
    other.load_lora_weights(tmp_path, weight_name=path.name)
    assert close(draw(other), draw(pipe))


def test_a_lora_loads_beside_the_adapter(subject: Subject, tmp_path: Path) -> None:
    save_ether(subject.pipe("default"), tmp_path)
    path = export_lora(tmp_path, subject.pipe(), tmp_path, dtype=torch.float32)
    pipe = subject.pipe("a")
    alone = draw(pipe)
    for component in subject.components:
        pipe_part = getattr(pipe, component)
        assert not any("lora" in name for name, _ in pipe_part.named_parameters())
    pipe.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="lora")
    assert not close(draw(pipe), alone)
    save_ether(pipe, tmp_path / "again", adapter_name="a")
    fresh = subject.pipe()
    load_ether(fresh, tmp_path / "again")
    assert torch.equal(draw(fresh), alone)


@pytest.mark.parametrize("name", ["sd both", "sdxl all"])
def test_a_pipeline_made_from_another_shares_its_adapters(name: str) -> None:
    pipe = SUBJECTS[name].pipe("a", "b")
    kind = StableDiffusionXLImg2ImgPipeline if "sdxl" in name else StableDiffusionImg2ImgPipeline
    other = kind.from_pipe(pipe)
    assert other.get_list_adapters() == pipe.get_list_adapters()
    other.set_adapters("a")
    assert torch.equal(draw(type(pipe).from_pipe(other)), draw(SUBJECTS[name].pipe("a")))


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("name", ["sd unet", "sdxl unet"])
def test_group_offloading_draws_the_same_before_and_after_loading(
    name: str, kind: str, tmp_path: Path
) -> None:
    save_ether(SUBJECTS[name].pipe("default"), tmp_path)
    expected = draw(SUBJECTS[name].pipe("default"))

    def offload(pipe: Any) -> None:
        cpu = torch.device("cpu")
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(pipe.unet, onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)

    first, last = SUBJECTS[name].pipe(), SUBJECTS[name].pipe()
    load_ether(first, tmp_path)
    offload(first)
    offload(last)
    load_ether(last, tmp_path)
    assert torch.equal(draw(first), expected)
    assert torch.equal(draw(last), expected)


TRANSFORMERS = ["sd3", "flux"]


def ran(family: str, model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**CASES[family][1], **options)[0]
    return found


def transformer(family: str, *names: str) -> Any:
    torch.manual_seed(1)
    model: Any = CASES[family][0]().eval()
    for name in names:
        torch.manual_seed(sum(map(ord, name)))
        model.add_adapter(config("transformer"), name)
    if names:
        model.set_adapters(names[-1])
    return model


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_transformers_adapters_are_scaled_disabled_fused_and_unloaded(family: str) -> None:
    model, base = transformer(family, "a"), ran(family, transformer(family))
    full = ran(family, model)
    assert not close(full, base)
    assert torch.equal(ran(family, model, joint_attention_kwargs={"scale": 0.0}), base)
    model.set_adapters("a", 0.5)
    half = ran(family, model)
    model.set_adapters("a", 1.0)
    assert torch.equal(ran(family, model, joint_attention_kwargs={"scale": 0.5}), half)
    model.disable_adapters()
    assert torch.equal(ran(family, model), base)
    model.enable_adapters()
    assert torch.equal(ran(family, model), full)
    model.fuse_lora()
    assert close(ran(family, model), full)
    model.unfuse_lora()
    assert torch.equal(ran(family, model), full)
    model.unload_lora()
    assert torch.equal(ran(family, model), base)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_transformers_adapters_are_weighed_deleted_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = transformer(family, "a", "b")
    model.set_adapters(["a", "b"], [0.5, 0.25])
    both = ran(family, model)
    model.set_adapters(["b", "a"], [0.25, 0.5])
    assert close(ran(family, model), both)
    model.delete_adapters("b")
    model.set_adapters("a")
    assert torch.equal(ran(family, model), ran(family, transformer(family, "a")))
    save_ether(model, tmp_path, adapter_name="a")
    fresh = transformer(family)
    load_ether(fresh, tmp_path)
    assert torch.equal(ran(family, fresh), ran(family, model))
    path = export_lora(tmp_path, transformer(family), tmp_path, dtype=torch.float32)
    lora = transformer(family)
    lora.load_lora_adapter(tmp_path, weight_name=path.name)
    assert close(ran(family, lora), ran(family, model))

"""What is compiled, and what no LoRA file holds, is reached by every method of our pipelines."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipelines_adapters import KINDS, close, draw, quiet
from tiny_pipelines import tiny_sd
from torch import nn
from trained_adapters import CONFIGS, save_adapter

from ether_diffusion import EtherConfig, load_ether, save_ether
from ether_diffusion.pipelines import EtherStableDiffusionPipeline
from ether_diffusion.tuner import EtherLinear

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own, which change with every release


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")  # the graph is what matters here, not its code


def whole(pipe: Any) -> None:
    pipe.unet = compiled(pipe.unet)


def with_text(pipe: Any) -> None:
    whole(pipe)
    pipe.text_encoder = compiled(pipe.text_encoder)


def one_block(pipe: Any) -> None:
    pipe.unet.mid_block = compiled(pipe.unet.mid_block)


def in_place(pipe: Any) -> None:
    pipe.unet.mid_block.compile(backend="eager")


WAYS = {"with_text": with_text, "one_block": one_block, "in_place": in_place}
ONCE = {"num_inference_steps": 1, "guidance_scale": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_adapter(tiny_sd(), CONFIGS["ether_plus"], tmp_path / "fox")
    pipe = tiny_sd()
    pipe.unet.add_adapter(EtherConfig(), "default")
    pipe.text_encoder.add_adapter(EtherConfig(target_modules=["q_proj"]), "default")
    save_ether(pipe, tmp_path / "cat")
    return tmp_path


def loaded(folder: Path, way: Callable[[Any], None] | None, *, first: bool) -> Any:
    """Our pipeline with two adapters, compiled before they are loaded, after, or not at all."""
    pipe = quiet(EtherStableDiffusionPipeline.from_pipe(tiny_sd()))
    if way is not None and first:
        way(pipe)
    pipe.load_ether_weights(folder / "fox", adapter_name="fox")
    pipe.load_ether_weights(folder / "cat", adapter_name="cat", activate=False)
    if way is not None and not first:
        way(pipe)
    return pipe


@pytest.fixture
def untraced() -> Iterator[None]:
    """Run compiled modules without tracing: wrapped as ever, and quick."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("way", WAYS)
def test_every_method_does_in_a_compiled_pipeline_what_it_does_in_another(way: str, folder: Path) -> None:
    plain = loaded(folder, None, first=True)
    pipes = [loaded(folder, WAYS[way], first=first) for first in (True, False)]
    wrappers = [(pipe.unet, pipe.text_encoder) for pipe in pipes]
    base = draw(quiet(tiny_sd()), **ONCE)
    steps: list[Callable[[Any], Any]] = [
        lambda p: p.set_adapters(["fox", "cat"], [0.5, 0.25]),
        lambda p: p.set_adapters("cat"),
        lambda p: p.disable_lora(),
        lambda p: p.enable_lora(),
        lambda p: p.fuse(),
        lambda p: p.unfuse(),
        lambda p: p.unload("cat"),
        lambda p: p.set_adapters("fox", 0.5),
    ]
    for step in steps:
        step(plain)
        expected = draw(plain, **ONCE)
        for pipe in pipes:
            step(pipe)
            assert pipe.active_adapters == plain.active_adapters
            assert pipe.get_list_adapters() == plain.get_list_adapters()
            close(draw(pipe, **ONCE), expected)
    for chosen in ({}, {"fox": 0.7}, ["fox"]):
        expected = draw(plain, adapters=chosen, **ONCE)
        for pipe in pipes:
            close(draw(pipe, adapters=chosen, **ONCE), expected)
    for pipe, wrapped in zip(pipes, wrappers, strict=True):
        save_ether(pipe, folder / "again", adapter_name="fox")
        assert (folder / "again" / "adapter_model.safetensors").stat().st_size > 0
        pipe.unload()
        close(draw(pipe, **ONCE), base)
        assert not any(isinstance(m, EtherLinear) for m in pipe.unet.modules())
        assert (pipe.unet, pipe.text_encoder) == wrapped


def test_a_traced_graph_follows_what_is_chosen_and_unloaded(folder: Path) -> None:
    torch._dynamo.reset()
    pipe, plain = loaded(folder, whole, first=False), loaded(folder, None, first=False)
    for p in (pipe, plain):
        p.set_adapters(["fox", "cat"], [0.5, 0.25])
    close(draw(pipe, **ONCE), draw(plain, **ONCE))
    close(draw(pipe, adapters={}, **ONCE), draw(plain, adapters={}, **ONCE))
    pipe.unload()
    close(draw(pipe, **ONCE), draw(quiet(tiny_sd()), **ONCE))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_any_components_adapter_is_weighed_and_fused(kind: str, component: str, tmp_path: Path) -> None:
    make, _, ours = KINDS[kind]
    targets = {"vae": ["to_q", "to_v"], "text_encoder": ["q_proj"]}[component]
    torch.manual_seed(0)
    pipe = quiet(ours.from_pipe(make()))
    base = draw(pipe)
    pipe.components[component].add_adapter(EtherConfig(target_modules=targets), "default")
    save_ether(pipe, tmp_path)
    full = draw(pipe)
    pipe = quiet(ours.from_pipe(make()))
    assert load_ether(pipe, tmp_path).components.keys() == {component}
    assert torch.equal(draw(pipe), full)
    assert not torch.equal(full, base)
    pipe.set_adapters("default", 0.0)
    assert torch.equal(draw(pipe), base)
    pipe.set_adapters("default", 1.0)
    pipe.fuse()
    close(draw(pipe), full)
    pipe.unfuse()
    assert torch.equal(draw(pipe), full)
    assert torch.equal(draw(pipe, adapters={}), base)
    pipe.unload()
    assert torch.equal(draw(pipe), base)
    assert pipe.active_adapters == []

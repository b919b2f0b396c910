"""Other adapters in the unconditional row, against two calls of the UNet by hand."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Factory
from peft import OFTConfig
from tiny_pipelines import tiny_sd
from torch import Tensor
from trained_adapters import CONFIGS, save_adapter

from ether_diffusion import EtherConfig, load_ether, save_ether
from ether_diffusion.adapters import AdapterMetadata, read_adapter
from ether_diffusion.bases import open_base
from ether_diffusion.pipelines.opening import open_pipeline
from ether_diffusion.serving.engine import Engine, Request
from ether_diffusion.training.methods import adapter_files

ASKED: dict[str, Any] = {"prompt": "abc", "seed": 7, "steps": 3, "width": 16, "height": 16}
FOX = {"fox": 0.8}
OTHERS: list[dict[str, float]] = [{}, {"fox": 0.4}, {"cat": 1.0, "fox": -0.5}, FOX]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Factory) -> Path:
    """A base, two adapters of ETHER and one of OFT."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    tiny_sd().save_pretrained(folder / "base")
    save_adapter(tiny_sd(), CONFIGS["ether_plus"], folder / "fox")
    save_adapter(tiny_sd(), CONFIGS["ether"], folder / "cat")
    pipe = tiny_sd()
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(
        OFTConfig(r=4, oft_block_size=0, target_modules=targets, init_weights=False), "default"
    )
    (folder / "oft").mkdir()
    for file, data in adapter_files(pipe.unet, AdapterMetadata()).items():
        (folder / "oft" / file).write_bytes(data)
    return folder


@pytest.fixture(scope="module", params=["mixed", "attached"])
def engine(request: pytest.FixtureRequest, saved: Path) -> Iterator[Engine]:
    slots = {"mixed": 3, "attached": None}[request.param]
    opened = Engine(open_base(saved / "base"), max_rows=4, num_slots=slots)
    for name in ("fox", "cat"):
        opened.add_adapter(name, read_adapter(saved / name))
    yield opened
    opened.close()


@torch.no_grad()
def by_hand(saved: Path, others: Mapping[str, float]) -> Tensor:
    """Return what stock diffusers draws with two UNets, each asked by itself at every step."""
    tuned, away = tiny_sd(), tiny_sd()
    for each, strengths in ((tuned, FOX), (away, others)):
        for name in strengths:
            load_ether(each, saved / name, adapter_name=name)
        if strengths:
            each.set_adapters([*strengths], [*strengths.values()])
    prompt, negative = tuned.encode_prompt("abc", torch.device("cpu"), 1, True)
    scheduler, generator = tuned.scheduler, torch.Generator().manual_seed(7)
    scheduler.set_timesteps(3)
    latents = tuned.prepare_latents(1, 4, 16, 16, torch.float32, torch.device("cpu"), generator)
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep)
        without = away.unet(seen, timestep, encoder_hidden_states=negative).sample
        given = tuned.unet(seen, timestep, encoder_hidden_states=prompt).sample
        latents = scheduler.step(without + 3 * (given - without), timestep, latents).prev_sample
    decoded: Tensor = tuned.vae.decode(latents / tuned.vae.config.scaling_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


def drawn(engine: Engine, *requests: Request) -> list[Any]:
    return [np.asarray(image).astype(int) for image in engine.draw(requests)]


def test_rows_of_a_batch_are_two_calls_of_the_unet_by_hand(saved: Path, engine: Engine) -> None:
    pictures = drawn(engine, *(Request(**ASKED, adapters=FOX, negative_adapters=others) for others in OTHERS))
    for picture, others in zip(pictures, OTHERS, strict=True):
        expected = by_hand(saved, others)
        assert others == FOX or (expected - by_hand(saved, FOX)).abs().max() > 0.01
        assert np.abs(picture - (expected[0].permute(1, 2, 0).numpy() * 255).round()).max() <= 1


def test_the_same_adapters_are_the_picture_without_bit_for_bit(engine: Engine) -> None:
    plain, named = (
        drawn(engine, Request(**ASKED, adapters=FOX, negative_adapters=others))[0] for others in (None, FOX)
    )
    assert np.array_equal(plain, named)


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own
@pytest.mark.parametrize("family", ["sd3", "sana", "chroma", "qwen_image", "z_image"])
def test_transformers_take_them_in_both_engines(
    family: str, flow_base: Callable[[str], Path], tmp_path: Path
) -> None:
    base = open_base(flow_base(family))
    pipe: Any = open_pipeline(base, device=torch.device("cpu"), dtype=torch.float32)
    pipe.transformer.add_adapter(EtherConfig(init_weights=False, target_modules=["to_q", "to_v"]), "fox")
    save_ether(pipe.transformer, tmp_path, adapter_name="fox")
    how: dict[str, Any] = {"width": 32, "height": 32, "prompt": "a cat", "seed": 7, "guidance_scale": 9.0}
    how["adapters"] = {"fox": 9.0}  # which tells, as tiny transformers draw little
    found = []
    for others, slots in (({}, 3), ({}, None), (None, None)):
        engine = Engine(base, num_slots=slots)
        engine.add_adapter("fox", read_adapter(tmp_path))
        found += drawn(engine, Request(**how, steps=2, negative_adapters=others))
    mixed, attached, same = found
    assert np.abs(mixed - attached).max() <= 1
    assert np.abs(mixed - same).max() > 1


def test_methods_without_strengths_are_there_or_not(saved: Path) -> None:
    engine = Engine(open_base(saved / "base"), num_slots=None)
    engine.add_adapter("oft", read_adapter(saved / "oft"))
    with_oft: dict[str, Any] = {**ASKED, "adapters": {"oft": 1.0}}
    with pytest.raises(ValueError, match="OFT, which has no strengths"):
        drawn(engine, Request(**with_oft, negative_adapters={"oft": 0.5}))
    found, same = (
        drawn(engine, Request(**with_oft, negative_adapters=others))[0] for others in ({}, {"oft": 1.0})
    )
    assert np.abs(found - same).max() > 1

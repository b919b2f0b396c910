"""Another strength in the unconditional row, against two calls of the UNet by hand."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Factory
from peft import LoraConfig, OFTConfig
from tiny_pipelines import tiny_sd
from torch import Tensor
from trained_adapters import CONFIGS, save_adapter

from ether_diffusion import EtherConfig, load_ether, save_ether
from ether_diffusion.adapters import AdapterMetadata, read_adapter
from ether_diffusion.bases import open_base
from ether_diffusion.pipelines import EtherStableDiffusionPipeline, read_image_metadata
from ether_diffusion.pipelines.metadata import metadata_of, png_bytes
from ether_diffusion.pipelines.opening import open_pipeline
from ether_diffusion.pipelines.sampling import Sampling
from ether_diffusion.scripts import ether
from ether_diffusion.serving.engine import Engine, Request
from ether_diffusion.training.methods import adapter_files
from ether_diffusion.tuner import unconditional_strength

HOW: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 16, "width": 16}
ASKED: dict[str, Any] = {"prompt": "abc", "seed": 7, "steps": 3, "width": 16, "height": 16}
FOX = {"fox": 0.8}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Factory) -> Path:
    """A base, two adapters of ETHER, one of them of the text encoder too, and one each of LoRA and OFT."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    tiny_sd().save_pretrained(folder / "base")
    save_adapter(tiny_sd(), CONFIGS["ether_plus"], folder / "fox")
    save_adapter(tiny_sd(), CONFIGS["ether"], folder / "cat")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    oft = OFTConfig(r=4, oft_block_size=0, target_modules=targets, init_weights=False)
    for name, config in (("lora", lora), ("oft", oft)):
        pipe = tiny_sd()
        pipe.unet.add_adapter(config, "default")
        (folder / name).mkdir()
        for file, data in adapter_files(pipe.unet, AdapterMetadata()).items():
            (folder / name / file).write_bytes(data)
    return folder


@pytest.fixture
def pipe(saved: Path) -> Any:
    opened = EtherStableDiffusionPipeline.from_pipe(tiny_sd())
    opened.set_progress_bar_config(disable=True)
    for name in ("lora", "fox", "cat"):
        opened.load_adapter_weights(saved / name, adapter_name=name, activate=False)
    return opened


@pytest.fixture(scope="module", params=["mixed", "attached"])
def engine(request: pytest.FixtureRequest, saved: Path) -> Iterator[Engine]:
    slots = {"mixed": 3, "attached": None}[request.param]
    opened = Engine(open_base(saved / "base"), max_rows=4, num_slots=slots)
    for name in ("lora", "fox", "cat"):
        opened.add_adapter(name, read_adapter(saved / name))
    yield opened
    opened.close()


@torch.no_grad()
def by_hand(saved: Path, share: float) -> Tensor:
    """Return what stock diffusers draws with two UNets, each asked by itself at every step."""
    tuned, away = tiny_sd(), tiny_sd()
    for each, strength in ((tuned, 0.8), (away, 0.8 * share)):
        load_ether(each, saved / "fox", adapter_name="fox")
        each.set_adapters(["fox"], [strength])
    unconditional = away.unet if share else tiny_sd().unet
    prompt, negative = tuned.encode_prompt("abc", torch.device("cpu"), 1, True)
    scheduler, generator = tuned.scheduler, torch.Generator().manual_seed(7)
    scheduler.set_timesteps(3)
    latents = tuned.prepare_latents(1, 4, 16, 16, torch.float32, torch.device("cpu"), generator)
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep)
        without = unconditional(seen, timestep, encoder_hidden_states=negative).sample
        given = tuned.unet(seen, timestep, encoder_hidden_states=prompt).sample
        latents = scheduler.step(without + 3 * (given - without), timestep, latents).prev_sample
    decoded: Tensor = tuned.vae.decode(latents / tuned.vae.config.scaling_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


def floats(pipe: Any, **options: Any) -> Tensor:
    images: Tensor = pipe("abc", seed=7, **{**HOW, "output_type": "pt", **options}).images
    return images


def drawn(engine: Engine, *requests: Request) -> list[Any]:
    return [np.asarray(image).astype(int) for image in engine.draw(requests)]


@pytest.mark.parametrize("share", [0.0, 0.5, -1.0])
def test_it_is_two_calls_of_the_unet_by_hand(saved: Path, pipe: Any, engine: Engine, share: float) -> None:
    expected = by_hand(saved, share)
    assert (expected - by_hand(saved, 1.0)).abs().max() > 0.01
    found = floats(pipe, adapters=FOX, unconditional_strength=share)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # two float32 paths
    (picture,) = drawn(engine, Request(**ASKED, adapters=FOX, unconditional_strength=share))
    assert np.abs(picture - (expected[0].permute(1, 2, 0).numpy() * 255).round()).max() <= 1


def test_the_same_strength_is_the_picture_without_bit_for_bit(pipe: Any, engine: Engine) -> None:
    assert torch.equal(floats(pipe, adapters=FOX, unconditional_strength=1.0), floats(pipe, adapters=FOX))
    same = Request(**ASKED, adapters=FOX, unconditional_strength=1.0)
    named = Request(**ASKED, adapters=FOX, negative_adapters=FOX)
    first, second = (drawn(engine, each)[0] for each in (same, named))
    assert np.array_equal(first, second)
    assert "unconditional_strength" not in read_back(engine, same).options


def read_back(engine: Engine, request: Request) -> Any:
    (image,) = engine.draw([request])
    return read_image_metadata(png_bytes(image))


def test_rows_of_a_batch_each_have_their_own(engine: Engine, pipe: Any) -> None:
    requests = [
        Request(**ASKED, adapters=FOX, unconditional_strength=0.0),
        Request(**ASKED, adapters={"cat": 1.0, "fox": 0.5}, unconditional_strength=0.5),
        Request(**ASKED, adapters={"lora": 1.5}, unconditional_strength=0.25),
        Request(**ASKED, adapters=FOX),
    ]
    together = drawn(engine, *requests)
    for found, request in zip(together, requests, strict=True):
        alone = floats(
            pipe, adapters=dict(request.adapters), unconditional_strength=request.unconditional_strength
        )
        assert np.abs(found - (alone[0].permute(1, 2, 0).numpy() * 255).round()).max() <= 1


def test_prompts_with_adapters_of_their_own_have_it_too(pipe: Any) -> None:
    def both(**options: Any) -> Tensor:
        images: Tensor = pipe(["abc", "abc"], seed=[7, 7], **HOW, output_type="pt", **options).images
        return images

    found = both(adapters=["fox", {"cat": 0.5}], unconditional_strength=0.5)
    for image, choice in zip(found, ({"fox": 1.0}, {"cat": 0.5}), strict=True):
        expected = floats(pipe, adapters=choice, unconditional_strength=0.5)[0]
        torch.testing.assert_close(image, expected, rtol=0, atol=2e-5)  # another batch
    assert torch.equal(both(adapters=["fox", None]), both(adapters=["fox", None], unconditional_strength=1.0))


def test_plain_pipelines_take_it_as_a_context(saved: Path, pipe: Any) -> None:
    stock = tiny_sd()
    stock.set_progress_bar_config(disable=True)
    load_ether(stock, saved / "fox", adapter_name="fox")
    stock.set_adapters(["fox"], [0.8])
    with unconditional_strength(stock.unet, 0.0):
        images = stock("abc", generator=torch.Generator().manual_seed(7), **HOW, output_type="pt").images
    assert torch.equal(images, floats(pipe, adapters=FOX, unconditional_strength=0.0))
    with (
        unconditional_strength(stock.unet, 0.0),
        pytest.raises(ValueError, match="2 rows in one batch; found 1"),
    ):
        stock("abc", **{**HOW, "guidance_scale": 1.0})
    assert "forward" not in stock.unet.__dict__


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own
@pytest.mark.parametrize("family", ["sd3", "sana", "chroma", "qwen_image", "z_image"])
def test_transformers_take_it_in_both_engines_and_in_pipelines_that_double_their_batch(
    family: str, flow_base: Callable[[str], Path], tmp_path: Path
) -> None:
    base = open_base(flow_base(family))
    pipe: Any = open_pipeline(base, device=torch.device("cpu"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.add_adapter(EtherConfig(init_weights=False, target_modules=["to_q", "to_v"]), "fox")
    save_ether(pipe.transformer, tmp_path, adapter_name="fox")
    how: dict[str, Any] = {"width": 32, "height": 32, "prompt": "a cat", "seed": 7, "guidance_scale": 9.0}
    how["adapters"] = {"fox": 9.0}  # which tells, as tiny transformers draw little
    found = []
    for share, slots in ((0.0, 3), (0.0, None), (1.0, None)):
        engine = Engine(base, num_slots=slots)
        engine.add_adapter("fox", read_adapter(tmp_path))
        asked = Request(**how, steps=2, unconditional_strength=share)
        found += drawn(engine, asked)
    mixed, attached, same = found
    assert np.abs(mixed - attached).max() <= 1
    assert np.abs(mixed - same).max() > 1
    if family in ("sd3", "sana"):
        (image,) = pipe(**how, num_inference_steps=2, unconditional_strength=0.0).images
        assert np.abs(np.asarray(image).astype(int) - mixed).max() <= 1
    else:  # they ask the denoiser twice, or mean another thing by guidance
        with pytest.raises(ValueError, match="2 rows in one batch; found"):
            pipe(**how, num_inference_steps=2, unconditional_strength=0.0)


def test_metadata_says_it_and_is_read_back(saved: Path, engine: Engine, pipe: Any) -> None:
    said = read_back(engine, Request(**ASKED, adapters=FOX, unconditional_strength=0.25))
    assert said.options == {"unconditional_strength": 0.25}
    image = pipe("abc", seed=7, **HOW, adapters=FOX, unconditional_strength=0.25).images[0]
    known = metadata_of(image)
    assert known is not None
    assert known.options == {"unconditional_strength": 0.25}


def test_the_command_draws_with_it_and_the_base_beside_without(
    saved: Path, tmp_path: Path, pipe: Any
) -> None:
    command = (
        f"generate --base {saved}/base --adapter {saved}/fox --strength 0.8 --prompt abc --seed 7 --steps 3"
    )
    command += f" --guidance_scale 3 --size 16 --output {tmp_path}/x --base_beside --unconditional_strength 0"
    assert ether.main(command.split()) == 0
    (fox,), (base,) = ([*(tmp_path / "x").glob(f"*{name}*.png")] for name in ("fox", "base"))
    said, of_base = read_image_metadata(fox), read_image_metadata(base)
    assert said is not None
    assert of_base is not None
    assert said.options == {"unconditional_strength": 0.0}
    assert of_base.options == {}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"guidance_scale": 1.0}, "that only guidance has, and .* draws without at guidance_scale=1"),
        ({"adapters": {}}, "of adapters, and there are none"),
        ({"negative_adapters": {}}, "give one of them"),
        ({"unconditional_strength": 11.0}, "must be from -10 to 10"),
        ({"unconditional_strength": float("nan")}, "finite"),
    ],
)
def test_what_cannot_be_is_said(engine: Engine, wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(engine.draw([Request(**{**ASKED, "adapters": FOX, "unconditional_strength": 0.5, **wrong})]))


def test_base_pictures_alone_are_refused_before_anything_is_drawn() -> None:
    with pytest.raises(ValueError, match="of adapters, and there are none"):
        Sampling(("a",), (0,), ({},), unconditional_strength=0.5)
    beside = Sampling(("a",), (0,), ({}, FOX), unconditional_strength=0.5)
    assert [beside.request(0, 0, i).unconditional_strength for i in (0, 1)] == [1.0, 0.5]


def test_pipelines_say_what_they_do_not_reach(saved: Path, pipe: Any) -> None:
    with pytest.raises(ValueError, match="none is in force"):
        floats(pipe, adapters={}, unconditional_strength=0.5)
    with pytest.raises(ValueError, match="found 1: raise guidance_scale"):
        floats(pipe, adapters=FOX, unconditional_strength=0.5, guidance_scale=1.0)
    pipe.set_adapters(["fox"])
    pipe.fuse()
    with pytest.raises(ValueError, match="merged into the base"):
        floats(pipe, unconditional_strength=0.5)
    assert "forward" not in pipe.unet.__dict__


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_methods_without_strengths_take_the_base_or_say_so(saved: Path, share: float) -> None:
    engine = Engine(open_base(saved / "base"), num_slots=None)
    engine.add_adapter("oft", read_adapter(saved / "oft"))
    ours = engine.pipeline
    request = Request(**ASKED, adapters={"oft": 1.0}, unconditional_strength=share)
    if share:
        with pytest.raises(ValueError, match="OFT, which has no strengths"):
            drawn(engine, request)
        return
    (found,) = drawn(engine, request)
    (name,) = ours.get_list_adapters()["unet"]
    ours.set_progress_bar_config(disable=True)
    expected = floats(ours, adapters={name: 1.0}, unconditional_strength=0.0)
    assert np.abs(found - (expected[0].permute(1, 2, 0).numpy() * 255).round()).max() <= 1

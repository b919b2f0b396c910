"""The pipelines are diffusers' own, with adapters loaded, weighed, fused, unloaded and chosen per call."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Factory, Patch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from tiny_pipelines import tiny_sd, tiny_sdxl
from torch import Tensor
from trained_adapters import CONFIGS, save_adapter

from ether_diffusion import EtherConfig, load_ether, save_ether
from ether_diffusion.adapters import read_adapter
from ether_diffusion.adapters.format import content_hash
from ether_diffusion.export import export_lora, export_merged
from ether_diffusion.pipelines import EtherStableDiffusionPipeline, EtherStableDiffusionXLPipeline
from ether_diffusion.tiny_world import tiny_world_path

ROOT = Path(__file__).parent.parent
SIZE = {"height": 16, "width": 16}
KINDS: dict[str, Any] = {
    "sd": (tiny_sd, StableDiffusionPipeline, EtherStableDiffusionPipeline),
    "sdxl": (tiny_sdxl, StableDiffusionXLPipeline, EtherStableDiffusionXLPipeline),
}


BOTH = pytest.mark.parametrize("kind", KINDS, indirect=True)
"""For what the kinds of pipelines do in their own ways; the rest is the same code for both."""


@pytest.fixture(scope="module")
def kind(request: pytest.FixtureRequest) -> Any:
    return KINDS[getattr(request, "param", "sd")]


@pytest.fixture(scope="module")
def saved(kind: Any, tmp_path_factory: Factory) -> Path:
    """A folder with two trained adapters, fox and cat."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    save_adapter(kind[0](), CONFIGS["ether_plus"], folder / "fox")
    save_adapter(kind[0](), CONFIGS["ether"], folder / "cat")
    return folder


@pytest.fixture(scope="module")
def base(kind: Any) -> Tensor:
    """What diffusers draws without adapters."""
    return draw(plain(kind))


@pytest.fixture
def pipe(kind: Any, saved: Path) -> Any:
    """One of our pipelines with both adapters; fox alone is active."""
    pipe = quiet(kind[2].from_pipe(kind[0]()))
    pipe.load_ether_weights(saved / "fox", adapter_name="fox")
    pipe.load_ether_weights(saved / "cat", adapter_name="cat", activate=False)
    return pipe


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: Any = "abc", *, size: Any = SIZE, **options: Any) -> Tensor:
    """Pictures (b, 3, 16, 16) as floats, so that no rounding hides a difference."""
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"} | options
    if not {"seed", "generator"} & options.keys():
        options["generator"] = torch.Generator().manual_seed(7)
    images: Tensor = pipe(prompt, **size, **options).images
    return images


def plain(kind: Any) -> Any:
    make, stock, _ = kind
    pipe = quiet(make())
    assert type(pipe) is stock
    return pipe


def far(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() > 1e-4


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)  # two float32 paths


@BOTH
def test_without_adapters_it_is_diffusers_own(kind: Any, base: Tensor, tmp_path: Path) -> None:
    make, stock, ours = kind
    assert torch.equal(draw(quiet(ours.from_pipe(make()))), base)
    make().save_pretrained(tmp_path / "base")
    pipe = quiet(ours.from_pretrained(tmp_path / "base"))
    assert torch.equal(draw(pipe), base)
    pipe.save_pretrained(tmp_path / "again")
    assert torch.equal(draw(quiet(ours.from_pretrained(tmp_path / "again"))), base)
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "again")) is stock


@BOTH
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT, at a second LoRA
def test_adapters_draw_as_with_load_ether_and_as_their_exports_do_as_loras(
    kind: Any, base: Tensor, pipe: Any, saved: Path, tmp_path: Path
) -> None:
    stock, loras = plain(kind), plain(kind)
    load_ether(stock, saved / "fox", adapter_name="fox")
    assert torch.equal(draw(pipe), draw(stock))
    assert far(draw(pipe), base)
    for name in ("fox", "cat"):
        export_lora(saved / name, plain(kind), tmp_path / name, dtype=torch.float32)
        loras.load_lora_weights(tmp_path / name, adapter_name=name)
    for names, strengths in ((["fox"], [0.6]), (["fox", "cat"], [0.6, 0.4])):
        loras.set_adapters(names, strengths)
        pipe.set_adapters(names, strengths)
        assert pipe.active_adapters == names
        close(draw(pipe), draw(loras))  # fp32, two matmuls for one


@BOTH
def test_fusing_draws_the_same_and_unfusing_restores_every_weight(pipe: Any) -> None:
    pipe.set_adapters(["fox", "cat"], [0.5, 0.25])
    before, expected = {k: v.clone() for k, v in pipe.unet.state_dict().items()}, draw(pipe)
    for _ in range(3):
        pipe.fuse()
        close(draw(pipe), expected)
        for use in (lambda: pipe.set_adapters("fox", 0.5), lambda: draw(pipe, adapters={}), pipe.fuse):
            with pytest.raises(ValueError, match="unfuse"):
                use()
        pipe.unfuse()
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())
    assert torch.equal(draw(pipe), expected)
    pipe.set_adapters(["fox"], [0.5])
    pipe.fuse(scale=0.5)
    fused = draw(pipe)
    assert [use.strength for use in pipe.adapters_in_use] == [0.25]
    pipe.unfuse()
    assert [use.strength for use in pipe.adapters_in_use] == [0.5]
    close(fused, draw(pipe, adapters={"fox": 0.25}))


@pytest.mark.parametrize("fused", [False, True])
def test_unloading_leaves_the_base(kind: Any, base: Tensor, pipe: Any, fused: bool) -> None:
    if fused:
        pipe.fuse()
    pipe.unload()
    assert pipe.active_adapters == []
    assert pipe.unet.state_dict().keys() == plain(kind).unet.state_dict().keys()
    assert torch.equal(draw(pipe), base)
    pipe.unload()


def test_one_of_two_adapters_can_be_unloaded(pipe: Any, saved: Path, base: Tensor) -> None:
    expected = draw(pipe)
    pipe.unload("cat")
    assert torch.equal(draw(pipe), expected)
    with pytest.raises(ValueError, match="no adapter named cat; loaded are fox"):
        pipe.unload("cat")
    pipe.load_ether_weights(saved / "cat", adapter_name="cat", activate=False)
    pipe.unload("fox")
    assert pipe.active_adapters == []  # not the other, which nobody asked for
    assert torch.equal(draw(pipe), base)


def test_a_call_chooses_for_itself_alone_also_where_adapters_are_disabled(base: Tensor, pipe: Any) -> None:
    pipe.set_adapters(["fox"], [0.7])
    as_set = draw(pipe)
    assert torch.equal(draw(pipe, adapters={}), base)
    assert torch.equal(draw(pipe, adapters={"fox": 0.7}), as_set)
    assert far(draw(pipe, adapters={"cat": 1.0}), as_set)
    assert torch.equal(draw(pipe, adapters=None), as_set)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), base)
    assert torch.equal(draw(pipe, adapters={"fox": 0.7}), as_set)
    assert pipe.active_adapters == []


def test_the_adapters_are_as_before_after_a_call_that_fails(pipe: Any) -> None:
    pipe.set_adapters(["fox", "cat"], [0.7, 0.2])
    before, flags = pipe.adapters_in_use, [p.requires_grad for p in pipe.unet.parameters()]

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("stopped")

    for adapters in ({}, {"cat": 2.0}, ["fox"]):
        with pytest.raises(RuntimeError, match="stopped"):
            draw(pipe, adapters=adapters, callback_on_step_end=fail)
    assert pipe.adapters_in_use == before
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags


@BOTH
def test_each_prompt_may_have_its_own_adapter(pipe: Any) -> None:
    prompts = ["abc", "abc", "xyz"]
    mixed = draw(pipe, prompts, adapters=["fox", {"cat": 0.5}, None], num_images_per_prompt=2, seed=3)
    for row, strengths in enumerate(({"fox": 1.0}, {"cat": 0.5}, {})):
        alone = draw(pipe, prompts, adapters=strengths, num_images_per_prompt=2, seed=3)
        close(mixed[2 * row : 2 * row + 2], alone[2 * row : 2 * row + 2])


@BOTH
def test_text_encoders_take_part_in_a_choice(kind: Any, base: Tensor, tmp_path: Path) -> None:
    make, _, ours = kind
    trained = make()
    trained.unet.add_adapter(CONFIGS["ether"], "default")
    trained.text_encoder.add_adapter(EtherConfig(target_modules=["q_proj", "v_proj"]), "default")
    save_ether(trained, tmp_path / "both")
    pipe = quiet(ours.from_pipe(make()))
    pipe.load_ether_weights(tmp_path / "both", adapter_name="both")
    expected, (use,) = draw(pipe), pipe.adapters_in_use
    assert set(use.sha256) == {"unet", "text_encoder"}
    assert torch.equal(draw(pipe, adapters={}), base)
    mixed = draw(pipe, ["abc", "abc"], adapters=["both", None], seed=[7, 7])
    close(mixed[:1], expected)  # batched products
    close(mixed[1:], base)
    pipe.fuse()
    close(draw(pipe), expected)
    pipe.unload()
    assert torch.equal(draw(pipe), base)


@BOTH
def test_each_picture_has_its_own_seed_which_is_diffusers_generator_of_it(base: Tensor, pipe: Any) -> None:
    assert torch.equal(draw(pipe, seed=7, adapters={}), base)
    batch = draw(pipe, seed=10, num_images_per_prompt=3)
    assert torch.equal(batch, draw(pipe, seed=10, num_images_per_prompt=3))
    for index in range(3):
        close(batch[index : index + 1], draw(pipe, seed=10 + index))  # batched kernels differ
    assert far(batch[0], batch[1])

    def drawn(seed: int) -> bytes:
        torch.manual_seed(seed)
        picture: bytes = pipe("abc", num_inference_steps=2, height=16, width=16).images[0].tobytes()
        return picture

    assert drawn(1) == drawn(1) != drawn(2)


REFUSED: list[tuple[Callable[[Any], object], str]] = [
    (lambda p: draw(p, adapters={"dog": 1.0}), "no adapter named dog; loaded are fox, cat"),
    (lambda p: draw(p, adapters={"fox": float("nan")}), "the strength of fox is nan; use a finite number"),
    (lambda p: draw(p, adapters="fox"), "is text; give strengths"),
    (lambda p: draw(p, adapters=["fox", None]), "found 2 adapters for 1 prompts"),
    (lambda p: draw(p, adapters=[{"fox": 1.0, "cat": 1.0}]), "each takes at most one"),
    (lambda p: draw(p, adapters=["fox"], cross_attention_kwargs={"scale": 0.5}), "does not reach adapters"),
    (lambda p: draw(p, seed=1, generator=torch.Generator()), "found both seed and generator"),
    (lambda p: draw(p, seed=[1, 2]), "found 2 seeds for 1 pictures"),
    (lambda p: draw(p, seed=-1), "a seed is a whole number from 0"),
    (lambda p: p.set_adapters(["fox", "cat"], [0.5, float("inf")]), "must be finite numbers"),
    (lambda p: p.set_adapters("fox", {"unet": {"mid": float("nan")}}), "must be finite numbers"),
    (lambda p: p.set_adapters("dog"), "not in the list of present adapters"),
    (lambda p: p.fuse(scale=float("nan")), "scale=nan is not a finite number"),
    (lambda p: p.fuse(adapter_names=["dog"]), "no adapter named dog; loaded are fox, cat"),
    (lambda p: p.save_pretrained("saved"), "fox, cat would not be saved; use save_ether"),
]


def test_bad_input_is_one_sentence_and_changes_nothing(pipe: Any, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    before = pipe.adapters_in_use
    for use, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            use(pipe)
        assert pipe.adapters_in_use == before, message
    assert not list(tmp_path.iterdir())


def test_the_hash_is_that_of_the_file_whatever_its_header(pipe: Any, saved: Path, tmp_path: Path) -> None:
    (use,) = pipe.adapters_in_use
    save_ether(pipe, tmp_path / "again", adapter_name="fox", trigger="another")
    for folder in (saved / "fox", tmp_path / "again"):
        assert use.sha256 == {"unet": content_hash(read_adapter(folder).tensors)}
    assert use.sha256 != {"unet": content_hash(read_adapter(saved / "cat").tensors)}
    pipe.unet.to("meta")  # as an offloaded one
    assert [(use.name, use.sha256) for use in pipe.adapters_in_use] == [("fox", {})]


CUSTOM = """
import sys
from diffusers import DiffusionPipeline
folder, *jobs = sys.argv[1:]
for job in jobs:
    kind, custom = job.split("=")
    base = f"{folder}/{kind}"
    pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=custom, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ether_weights(base + "-fox", adapter_name="fox")
    image = pipe("abc", num_inference_steps=1, height=16, width=16, seed=0, adapters={"fox": 0.5}).images[0]
    print(type(pipe).__name__, pipe.active_adapters, '"strength":0.5' in image.info["ether_diffusion"])
"""


def test_diffusers_loads_them_as_custom_pipelines(tmp_path: Path) -> None:
    for name, (make, _, _) in KINDS.items():
        save_adapter(make(), CONFIGS["ether"], tmp_path / f"{name}-fox")
        make().save_pretrained(tmp_path / name)
    jobs = {
        "sd=pipelines/stable_diffusion.py": "EtherStableDiffusionPipeline",
        "sd=pipelines": "EtherStableDiffusionPipeline",
        "sdxl=pipelines/stable_diffusion_xl.py": "EtherStableDiffusionXLPipeline",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CUSTOM, tmp_path, *jobs],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} ['fox'] True" for name in jobs.values()]


def test_the_alias_of_the_embedded_base_stands_for_its_folder() -> None:
    by_alias = EtherStableDiffusionPipeline.from_pretrained("tiny_world")
    by_folder = EtherStableDiffusionPipeline.from_pretrained(tiny_world_path())
    for name, weight in by_folder.unet.state_dict().items():
        assert torch.equal(by_alias.unet.state_dict()[name], weight), name


# any pipeline of diffusers with a UNet


def image(seed: int) -> Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def controlnet(pipe: StableDiffusionPipeline) -> StableDiffusionControlNetPipeline:
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4,))
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.1)  # they start at zero, which would hide them
    return StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=net.eval(), requires_safety_checker=False
    )


OTHERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], dict[str, Any]]] = {
    "img2img": (
        tiny_sd,
        lambda pipe: StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False),
        {"image": image(1), "strength": 0.9},
    ),
    "inpaint": (
        tiny_sd,
        lambda pipe: StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False),
        {"image": image(1), "mask_image": image(2)[:, :1].round()} | SIZE,
    ),
    "controlnet": (tiny_sd, controlnet, {"image": image(3)}),
    "sdxl_img2img": (
        tiny_sdxl,
        lambda pipe: StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False),
        {"image": image(1), "strength": 0.9},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_pipeline_draws_an_adapter_as_its_lora_and_merged_model(name: str, tmp_path: Path) -> None:
    make, wrap, options = OTHERS[name]
    fox, pipes = save_adapter(make(), CONFIGS["ether_plus"], tmp_path / "fox"), []
    for _ in range(3):
        torch.manual_seed(0)
        pipes.append(quiet(wrap(make())))

    def drawn(pipe: Any) -> Tensor:
        return draw(pipe, size={}, num_inference_steps=3, **options)

    adapted, lora, merged = pipes
    base = drawn(adapted)
    load_ether(adapted, fox, adapter_name="fox")
    adapted.set_adapters(["fox"], [0.7])
    found = drawn(adapted)
    assert far(found, base)
    export_lora(fox, lora, tmp_path / "lora", dtype=torch.float32)
    lora.load_lora_weights(tmp_path / "lora", adapter_name="fox")
    lora.set_adapters(["fox"], [0.7])
    close(found, drawn(lora))
    export_merged(fox, merged.unet, tmp_path / "merged", scale=0.7)
    merged.unet = type(merged.unet).from_pretrained(tmp_path / "merged")
    close(found, drawn(merged))
    adapted.set_adapters(["fox"], [0.0])
    assert torch.equal(drawn(adapted), base)
    adapted.unload_lora_weights()
    assert torch.equal(drawn(adapted), base)


def test_a_lora_that_is_loaded_over_ether_is_alone_in_force_and_named(
    pipe: Any, kind: Any, tmp_path: Path
) -> None:
    plain = kind[0]()
    plain.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "x")
    tensors = get_peft_model_state_dict(plain.unet, adapter_name="x")
    plain.save_lora_weights(tmp_path, unet_lora_layers=tensors)
    alone = quiet(kind[2].from_pipe(kind[0]()))
    for each in (pipe, alone):
        each.load_lora_weights(tmp_path, adapter_name="lora")
    assert pipe.get_active_adapters() == pipe.active_adapters == ["lora"]
    asked: dict[str, Any] = {"num_inference_steps": 1, "output_type": "np", "seed": 1}
    assert (pipe("a", **asked).images == alone("a", **asked).images).all()

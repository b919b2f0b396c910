"""Pictures that begin as others, against diffusers' pipelines for that, on the same generator."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from base_kinds import inpainting_sd
from flow_pipelines import flow_pipeline
from PIL import Image, ImageDraw
from tiny_pipelines import tiny_sd, tiny_sdxl

from ether_diffusion.bases import open_base
from ether_diffusion.control import control_image_sha256
from ether_diffusion.pipelines.metadata import metadata_of
from ether_diffusion.pipelines.opening import make_scheduler
from ether_diffusion.pipelines.sampling import Start
from ether_diffusion.serving.engine import Engine, Request

SIDE = 32
PROMPT = "a b c"
SD, SDXL = ("StableDiffusion", tiny_sd), ("StableDiffusionXL", tiny_sdxl)


def photo(seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def hole(size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((4, 6, 22, 20), fill=255)
    return mask


def opened(make: Callable[[], Any], folder: Path) -> tuple[Engine, Any]:
    made = make()
    made.save_pretrained(folder)
    return Engine(open_base(folder), max_rows=4), type(made).from_pretrained(folder)


def drawn(engine: Engine, *requests: Request) -> list[Any]:
    return [np.asarray(image).astype(int) for image in engine.draw(requests)]


def theirs(pipe: Any, kind: str, request: Request, **more: Any) -> Image.Image:
    """Draw with diffusers' pipeline of a kind, from the same parts."""
    assert request.start is not None
    own: Any = getattr(diffusers, kind)(**pipe.components, **more)
    own.set_progress_bar_config(disable=True)
    if request.scheduler is not None:
        own.scheduler = make_scheduler(request.scheduler, pipe.scheduler)
    mask = {} if request.start.mask is None else {"mask_image": request.start.mask}
    size = {} if request.start.mask is None else {"height": SIDE, "width": SIDE}
    (picture,) = own(
        prompt=request.prompt,
        image=request.start.image,
        strength=request.start.strength,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        **size,
        **mask,
    ).images
    if request.start.mask is not None:
        picture = own.image_processor.apply_overlay(request.start.mask, request.start.image, picture)
    return picture


def asked(start: Start, **more: Any) -> Request:
    size = {"width": SIDE, "height": SIDE}
    return Request(**{"prompt": PROMPT, "seed": 3, "steps": 6, "start": start, **size, **more})


def assert_alike(found: Any, expected: Image.Image) -> None:
    assert np.abs(found - np.asarray(expected)).max() <= 1  # of 255: another rounding


SAMPLERS = [None, "euler", "euler_a", "heun", "dpm++", "pndm", "lcm", "unipc"]


@pytest.mark.parametrize("family", [SD, SDXL], ids=["sd", "sdxl"])
def test_image_to_image_is_diffusers(family: Any, tmp_path: Path) -> None:
    name, make = family
    engine, pipe = opened(make, tmp_path / "base")
    requests = [
        asked(Start(photo(n), strength), scheduler=sampler)
        for n, (sampler, strength) in enumerate(zip(SAMPLERS, [0.5, 0.6, 1.0, 0.35] * 2, strict=True))
    ]
    for found, request in zip(drawn(engine, *requests), requests, strict=True):  # each row begins otherwise
        assert_alike(found, theirs(pipe, f"{name}Img2ImgPipeline", request, **_unchecked(name)))


@pytest.mark.parametrize("family", [SD, SDXL], ids=["sd", "sdxl"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_mask_blends_latents_as_diffusers_does(family: Any, strength: float, tmp_path: Path) -> None:
    name, make = family
    engine, pipe = opened(make, tmp_path / "base")
    requests = [asked(Start(photo(1), strength, hole()), scheduler=s) for s in (None, "euler", "dpm++")]
    for found, request in zip(drawn(engine, *requests), requests, strict=True):
        assert_alike(found, theirs(pipe, f"{name}InpaintPipeline", request, **_unchecked(name)))
        outside = np.asarray(hole()) == 0
        assert (found[outside] == np.asarray(photo(1))[outside]).all()
        assert (found[~outside] != np.asarray(photo(1))[~outside]).any()


def _unchecked(name: str) -> dict[str, Any]:
    return {"requires_safety_checker": False} if name == "StableDiffusion" else {"add_watermarker": False}


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_an_inpainting_base_is_served_as_diffusers_draws_it(strength: float, tmp_path: Path) -> None:
    engine, pipe = opened(inpainting_sd, tmp_path / "base")
    request = asked(Start(photo(2), strength, hole()))
    unchecked = {"requires_safety_checker": False}
    expected = theirs(pipe, "StableDiffusionInpaintPipeline", request, **unchecked)
    other = asked(Start(photo(5), 0.8, hole()), seed=9)
    for found in (drawn(engine, request)[0], drawn(engine, other, request)[1]):
        assert_alike(found, expected)
    with pytest.raises(ValueError, match="is a base for inpainting; give a start picture and a mask"):
        list(engine.draw([Request(prompt="a", width=SIDE, height=SIDE)]))


FLOWS = {
    "sd3": "StableDiffusion3Img2Img",
    "flux": "FluxImg2Img",
    "chroma": "ChromaImg2Img",
    "qwen_image": "QwenImageImg2Img",
    "z_image": "ZImageImg2Img",
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own, of its Chroma
@pytest.mark.parametrize("family", FLOWS)
def test_image_to_image_of_the_flow_families_is_diffusers(family: str, tmp_path: Path) -> None:
    engine, pipe = opened(lambda: flow_pipeline(family), tmp_path / "base")
    for strength in (0.5, 0.75):
        request = asked(
            Start(photo(3), strength), steps=5, guidance_scale=0.0 if family == "z_image" else 1.0
        )
        kept = {name: each for name, each in pipe.components.items() if each is not None}
        own = getattr(diffusers, f"{FLOWS[family]}Pipeline")(**kept)
        own.set_progress_bar_config(disable=True)
        (expected,) = own(
            prompt=PROMPT,
            image=photo(3),
            strength=strength,
            height=SIDE,
            width=SIDE,
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(3),
            **{"true_cfg_scale" if family == "qwen_image" else "guidance_scale": request.guidance_scale},
        ).images
        assert_alike(drawn(engine, request)[0], expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own
@pytest.mark.parametrize("family", ["qwen_image", "flux"])
def test_a_mask_of_the_flow_families_is_diffusers(family: str, tmp_path: Path) -> None:
    engine, pipe = opened(lambda: flow_pipeline(family), tmp_path / "base")
    request = asked(Start(photo(3), 0.6, hole()), steps=5, guidance_scale=1.0)
    kind, guidance = {
        "qwen_image": ("QwenImageInpaintPipeline", "true_cfg_scale"),
        "flux": ("FluxInpaintPipeline", "guidance_scale"),
    }[family]
    kept = {name: each for name, each in pipe.components.items() if each is not None}
    own = getattr(diffusers, kind)(**kept)
    own.set_progress_bar_config(disable=True)
    (picture,) = own(
        prompt=PROMPT, image=photo(3), mask_image=hole(), strength=0.6, height=SIDE, width=SIDE,
        num_inference_steps=5, generator=torch.Generator().manual_seed(3), **{guidance: 1.0},
    ).images  # fmt: skip
    assert_alike(drawn(engine, request)[0], own.image_processor.apply_overlay(hole(), photo(3), picture))


@pytest.mark.parametrize("family", ["flux2", "sana"])
def test_families_without_such_a_pipeline_begin_as_the_picture(family: str, tmp_path: Path) -> None:
    engine, _ = opened(lambda: flow_pipeline(family), tmp_path / "base")
    starts = (Start(photo(3), 0.1), Start(photo(3), 1.0), None)
    near, far, noise = (
        Request(prompt=PROMPT, seed=3, steps=10, start=s, width=SIDE, height=SIDE) for s in starts
    )
    vae = engine.pipeline.vae
    pixels = torch.from_numpy(np.array(photo(3))).permute(2, 0, 1)[None] / 127.5 - 1
    mean, _ = engine.base.encode_images(vae, pixels)
    (whole,) = engine.base.decode_latents(vae, engine.base.scale_latents(vae, mean))
    off = [np.abs(each - np.asarray(whole)).mean() for each in drawn(engine, near, far, noise)]
    assert off[0] < off[1]
    assert off[0] < off[2]


def test_a_picture_says_what_it_began_as(tmp_path: Path) -> None:
    engine, _ = opened(tiny_sd, tmp_path / "base")
    start = Start(photo(0, (48, 24)), 0.5, hole((48, 24)), "cat.png")
    (picture,) = engine.draw([Request(prompt="a", steps=4, start=start)])
    said = metadata_of(picture)
    assert said is not None
    assert said.options == {
        "start_image": "cat.png",
        "start_strength": 0.5,
        "start_image_sha256": control_image_sha256(start.image),
        "start_mask_sha256": control_image_sha256(hole((48, 24))),
    }
    native = engine.base.native_size
    assert picture.width == pytest.approx(native * 2**0.5, abs=2)  # as many pixels, in the photo's shape
    assert picture.height == pytest.approx(native / 2**0.5, abs=2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Start(photo(), strength=1.5), "strength must be from 0 to 1"),
        (lambda: Start(photo(), 0.0), "strength of a start picture is above 0"),
        (lambda: Start(photo(), 0.5, Image.new("L", (SIDE, SIDE))), "nothing is white in the mask"),
        (
            lambda: Start(photo(), 0.5, hole((SIDE, 2 * SIDE))),
            "the mask has 32 × 64 px and its start picture",
        ),
    ],
)
def test_start_pictures_that_cannot_be_used_are_refused(make: Callable[[], Start], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_strength_that_leaves_no_step_is_refused(tmp_path: Path) -> None:
    engine, _ = opened(tiny_sd, tmp_path / "base")
    with pytest.raises(ValueError, match=r"strength 0.1 leaves none of 6 steps; use 0.17 or more"):
        engine.submit(asked(Start(photo(), 0.1)))

"""The engine against our pipelines, which draw a request at a time; and what rows owe each other."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from control_encoders import random_encoder
from flow_pipelines import FLOW_PIPELINES
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import tiny_sd, tiny_sdxl

from ether_diffusion import EtherConfig, save_ether
from ether_diffusion.adapters import AdapterMetadata, read_adapter
from ether_diffusion.bases import open_base
from ether_diffusion.control import save_control
from ether_diffusion.pipelines import EtherControlPipeline, EtherControlXLPipeline
from ether_diffusion.pipelines.opening import make_scheduler, open_pipeline
from ether_diffusion.pipelines.sampling import ControlUse
from ether_diffusion.serving.engine import CancelledError, Engine, Job, QueueFullError, Request
from ether_diffusion.training.methods import adapter_files

CPU = torch.device("cpu")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONFIGS: dict[str, Any] = {
    "plain": EtherConfig(init_weights=False),
    "plus": EtherConfig(variant="ether_plus", init_weights=False),
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, init_lora_weights=False),
    "texts": EtherConfig(variant="ether_plus", init_weights=False),
}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and adapters of several kinds, in folders."""
    folder = tmp_path_factory.mktemp("served")
    make = tiny_sdxl if request.param == "sdxl" else tiny_sd
    make().save_pretrained(folder / "base")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        pipe = make()
        torch.manual_seed(seed)
        pipe.unet.add_adapter(config, "default")
        if name == "texts":
            of_text = EtherConfig(init_weights=False, target_modules=["q_proj", "v_proj"])
            pipe.text_encoder.add_adapter(of_text, "default")
        if name == "lora":
            folder.joinpath(name).mkdir()
            for file, data in adapter_files(pipe.unet, AdapterMetadata()).items():
                (folder / name / file).write_bytes(data)
        else:
            save_ether(pipe, folder / name)
    return folder


@pytest.fixture(scope="module")
def engine(world: Path) -> Iterator[Engine]:
    opened = Engine(open_base(world / "base"), max_rows=4, num_slots=3, max_waiting=8)
    for name in CONFIGS:
        opened.add_adapter(name, read_adapter(world / name))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pipeline(world: Path) -> Any:
    """Our own pipeline with the same adapters, which draws a call at a time."""
    opened = open_pipeline(open_base(world / "base"), device=CPU, dtype=torch.float32)
    opened.set_progress_bar_config(disable=True)
    for name in sorted(CONFIGS, key="lora".__ne__):  # a LoRA goes under ETHER, not over it
        opened.load_adapter_weights(str(world / name), adapter_name=name, activate=False)
    return opened


def held(gate: threading.Event) -> Callable[[Job], None]:
    def wait(_: Job) -> None:
        gate.wait(60)

    return wait


def draw(engine: Engine, *requests: Request) -> list[Any]:
    """Draw requests together: they join before the first step is done."""
    gate = threading.Event()
    size: Any = {"width": requests[0].width, "height": requests[0].height}
    first = engine.submit(Request(prompt="gate", steps=2, **size), on_step=held(gate))
    jobs = [engine.submit(request) for request in requests]
    gate.set()
    first.picture.result(60)
    return [np.asarray(job.picture.result(60)).astype(int) for job in jobs]


def alone(pipeline: Any, request: Request, **more: Any) -> Any:
    before = pipeline.scheduler
    if request.scheduler is not None:
        pipeline.scheduler = make_scheduler(request.scheduler, before)
    try:
        (image,) = pipeline(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            adapters=dict(request.adapters),
            seed=request.seed,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            width=request.width,
            height=request.height,
            **more,
        ).images
    finally:
        pipeline.scheduler = before
    return np.asarray(image).astype(int)


MIXTURE = [
    Request(prompt="a b c", seed=1, steps=4, adapters={"plain": 1.0}),
    Request(prompt="c", seed=2, steps=6, adapters={"plus": 0.7, "lora": -0.5}, scheduler="euler"),
    Request(prompt="a", seed=3, steps=3, guidance_scale=1.0, adapters={"lora": 1.0}),
    Request(prompt="b a", seed=4, steps=5, negative_prompt="c", guidance_scale=6.0),
]
OTHERS = [
    Request(prompt="e", seed=1, steps=4, adapters={"texts": 1.0}, scheduler="euler_a"),
    Request(prompt="a b", seed=5, steps=2, adapters={"plus": 1.0}, width=32, height=64),
    Request(prompt="a b", seed=5, steps=2, adapters={"plain": 0.5}, scheduler="dpm++"),
]


@pytest.mark.parametrize("requests", [MIXTURE, OTHERS], ids=["mixture", "others"])
def test_pictures_of_a_batch_are_those_of_our_pipeline(
    engine: Engine, pipeline: Any, requests: list[Request]
) -> None:
    for found, request in zip(draw(engine, *requests), requests, strict=True):
        assert np.abs(found - alone(pipeline, request)).max() <= 1, request  # of 255: another rounding


def test_what_is_drawn_does_not_depend_on_who_else_is_in_the_batch(engine: Engine) -> None:
    mine, steps = MIXTURE[1], MIXTURE[1].steps
    adapters: list[list[dict[str, float]]] = [[{}, {}], [{"plain": 1.0}, {"plus": 2.0, "lora": 1.0}]]
    company = [
        [Request(prompt="e", seed=len(each), steps=steps, adapters=each) for each in rows]
        for rows in adapters
    ]
    first, second = (draw(engine, mine, *others)[0] for others in company)
    assert np.array_equal(first, second)


def test_requests_of_every_kind_in_any_order_are_each_as_alone(engine: Engine, pipeline: Any) -> None:
    """Of other adapters, strengths, sizes, steps, schedulers and guidance, some of them cancelled."""
    dice = random.Random(0)
    jobs: list[Job] = []
    for seed in range(40 if engine.base.has_size_ids else 200):
        names = dice.sample(sorted(CONFIGS), dice.randint(0, 2))
        width, height = dice.choice([(None, None), (8, 16), (16, 8)])
        request = Request(
            prompt=dice.choice(["a", "a b c", "e d"]),
            seed=seed,
            steps=dice.randint(1, 3),
            adapters={name: dice.choice([1.0, -0.5, 0.3]) for name in names},
            guidance_scale=dice.choice([1.0, 3.0, 7.5]),
            width=width,
            height=height,
            scheduler=dice.choice([None, "euler", "dpm++", "unipc", "euler_a"]),
            negative_prompt=dice.choice([None, "b"]),
        )
        while engine.num_waiting == engine.max_waiting:
            time.sleep(0.005)
        jobs.append(engine.submit(request, on_step=Job.cancel if dice.random() < 0.2 else None))
    assert sum(isinstance(job.picture.exception(60), CancelledError) for job in jobs) >= 3
    for job in jobs:
        if job.picture.exception() is None:
            found = np.asarray(job.picture.result()).astype(int)
            assert np.abs(found - alone(pipeline, job.request)).max() <= 1, job.request


def test_rows_follow_control_images_beside_rows_that_do_not(world: Path) -> None:
    opened = Engine(open_base(world / "base"), max_rows=4)
    control = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    save_control(world / "follow", random_encoder(opened.denoiser, factor=opened.base.vae_scale_factor))
    for name in ("plus", "follow"):
        opened.add_adapter(name, read_adapter(world / name))
    both, how = {"plus": 1.0, "follow": 1.0}, dict[str, Any](prompt="a b", steps=3, width=16, height=16)
    use = ControlUse(control, "follow", 0.7)
    requests = [
        Request(seed=1, adapters=both, control=use, **how),
        Request(seed=1, adapters={"plus": 1.0}, **how),
        Request(seed=2, adapters={"follow": 1.0}, control=use, guidance_scale=1.0, **how),
    ]
    kind: Any = EtherControlXLPipeline if opened.base.has_size_ids else EtherControlPipeline
    pipe = kind.from_pretrained(world / "base")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_adapter_weights(world / "plus", adapter_name="plus", activate=False)
    pipe.load_control_weights(world / "follow", adapter_name="follow", activate=False)
    for found, request in zip(draw(opened, *requests), requests, strict=True):
        following: dict[str, Any] = (
            {} if request.control is None else {"control_image": control, "control_strength": 0.7}
        )
        assert np.abs(found - alone(pipe, request, **following)).max() <= 1
    with pytest.raises(ValueError, match="'plus' follows no control image; name one of follow"):
        opened.submit(replace(requests[0], control=ControlUse(control, "plus")))
    opened.close()


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own
@pytest.mark.parametrize("family", FLOW_PIPELINES)
def test_a_base_of_any_family_is_drawn_as_by_its_pipeline(
    family: str, flow_base: Callable[[str], Path], tmp_path: Path
) -> None:
    base = open_base(flow_base(family))
    opened = Engine(base, max_rows=3)
    pipe: Any = open_pipeline(base, device=CPU, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    pipe.transformer.add_adapter(EtherConfig(init_weights=False, target_modules=ATTENTION[:3]), "made")
    save_ether(pipe.transformer, tmp_path, adapter_name="made")
    opened.add_adapter("made", read_adapter(tmp_path))
    negative = None if family.startswith("flux") else "snow"  # their pipelines take none
    size: dict[str, Any] = {"width": 32, "height": 64}
    requests = [
        Request(prompt="a sks cat", seed=4, steps=2, negative_prompt=negative, **size),
        Request(prompt="a photo of a dog", seed=5, steps=3, adapters={"made": 0.7}, **size),
        Request(prompt="a cat", seed=6, steps=2, guidance_scale=1.0, width=32, height=32),
    ]
    for found, request in zip(draw(opened, *requests), requests, strict=True):
        assert np.abs(found - alone(pipe, request)).max() <= 1, request
        assert found.std() > 2
    opened.close()


def test_a_row_without_guidance_takes_other_adapters_than_its_prompt(engine: Engine) -> None:
    both = Request(prompt="a", seed=1, steps=3, adapters={"plus": 1.0})
    of_prompt = Request(prompt="a", seed=1, steps=3, adapters={"plus": 1.0}, negative_adapters={})
    same = Request(prompt="a", seed=1, steps=3, adapters={"plus": 1.0}, negative_adapters={"plus": 1.0})
    first, second, third = draw(engine, both, of_prompt, same)
    assert np.array_equal(first, third)
    assert not np.array_equal(first, second)


def test_slots_are_filled_once_and_the_least_recently_used_goes(engine: Engine) -> None:
    before = dict(engine.bank.counts)
    for name in ("plain", "plus", "lora", "plain", "texts", "plus"):
        draw(engine, Request(prompt="a", steps=1, adapters={name: 1.0}))
    fills = engine.bank.counts["fills"] - before.get("fills", 0)
    assert 2 <= fills <= 6
    assert engine.bank.counts["evictions"] > before.get("evictions", 0)
    assert len(engine.bank._slots) <= 3


def test_more_adapters_than_slots_wait_for_their_turn(engine: Engine) -> None:
    requests = [Request(prompt="a", seed=s, steps=3, adapters={n: 1.0}) for s, n in enumerate(CONFIGS)]
    together = draw(engine, *requests)
    for found, request in zip(together, requests, strict=True):
        assert np.abs(found - draw(engine, request)[0]).max() <= 1


def test_a_cancelled_request_frees_its_row_at_the_next_step(engine: Engine) -> None:
    steps: list[int] = []

    def stop(job: Job) -> None:
        steps.append(job.step)
        job.cancel()

    job = engine.submit(Request(prompt="a", steps=900), on_step=stop)
    with pytest.raises(CancelledError):
        job.picture.result(60)
    until_free(engine, 60)
    assert steps == [1]


def until_free(engine: Engine, seconds: float) -> None:
    end = time.monotonic() + seconds
    while engine.num_running or engine.num_waiting:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_cancelled_request_frees_its_row_within_a_long_step() -> None:
    opened = Engine(open_base("tiny_world"), max_rows=2)
    jobs = [opened.submit(Request(prompt="a fox", steps=2, width=1024, height=1024)) for _ in range(2)]
    while opened.num_running < 2:
        time.sleep(0.01)
    time.sleep(0.5)
    done = opened.counts["steps"]  # the first may have had one by itself
    for job in jobs:
        job.cancel()
    until_free(opened, 1)
    assert all(isinstance(job.picture.exception(0), CancelledError) for job in jobs)
    assert opened.counts["steps"] == done
    opened.close()


def test_previews_are_pictures_of_the_steps(engine: Engine) -> None:
    seen: list[Image.Image | None] = []
    job = engine.submit(Request(prompt="a", steps=3), on_step=lambda job: seen.append(engine.preview(job)))
    picture = job.picture.result(60)
    assert len(seen) == 3
    assert np.array_equal(np.asarray(seen[-1]), np.asarray(picture))


def test_bad_requests_are_refused_and_a_full_queue_says_when(engine: Engine) -> None:
    for request, sentence in (
        (Request(prompt="a", adapters={"nobody": 1.0}), "no adapter named nobody"),
        (Request(prompt="a", scheduler="x"), "no scheduler"),
    ):
        with pytest.raises(ValueError, match=sentence):
            engine.submit(request)
    gate = threading.Event()
    jobs = [engine.submit(Request(prompt="a", steps=1), on_step=held(gate))]
    while engine.num_running == 0:
        time.sleep(0.01)
    jobs += [engine.submit(Request(prompt="a", steps=1)) for _ in range(engine.max_waiting)]
    with pytest.raises(QueueFullError, match="queue is full"):
        engine.submit(Request(prompt="a", steps=1))
    gate.set()
    for job in jobs:
        job.picture.result(60)


def test_what_fails_fails_alone_and_a_removed_adapter_says_so(engine: Engine, world: Path) -> None:
    def spoil(job: Job) -> None:
        raise ZeroDivisionError("of one request")

    gate = threading.Event()
    waiting = engine.submit(Request(prompt="a", steps=3), on_step=held(gate))
    spoilt = engine.submit(Request(prompt="a", steps=3), on_step=spoil)
    engine.add_adapter("short-lived", read_adapter(world / "plus"))
    removed = engine.submit(Request(prompt="a", steps=3, adapters={"short-lived": 1.0}))
    engine.remove_adapter("short-lived")
    gate.set()
    with pytest.raises(ZeroDivisionError):
        spoilt.picture.result(60)
    with pytest.raises(ValueError, match="short-lived was removed"):
        removed.picture.result(60)
    waiting.picture.result(60)

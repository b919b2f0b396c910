"""What the studio refuses to draw as this machine cannot, and Stop, which works inside a step at any size."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from studio_folders import QUICK, DrawingStudio, begin, draw, last, pixels
from torch import nn
from torch.nn import functional as F

from ether_diffusion import console
from ether_diffusion.bases import open_base
from ether_diffusion.console import machine_memory
from ether_diffusion.pipelines.sampling import Sampling
from ether_diffusion.serving.engine import Engine as BatchEngine
from ether_diffusion.serving.stopping import StopInside
from ether_diffusion.ui.drawing import MAX_SECONDS, Cost, Pace
from ether_diffusion.ui.engine import Engine
from ether_diffusion.ui.jobs import Job, Working, check
from ether_diffusion.ui.requests import GenerateRequest, GridRequest
from ether_diffusion.ui.studio import Studio

CPU = torch.device("cpu")
SAMPLING = Sampling(("a red fox",), (0,), ({},), steps=2, guidance_scale=3.0)


@pytest.fixture
def studio(drawing_studio: DrawingStudio) -> Studio:
    return drawing_studio.studio


@pytest.mark.flaky(reruns=2)  # a second is short beside other work on the same cores
@pytest.mark.parametrize("wish", [{"width": 512, "height": 512}, {"width": 1536, "height": 1024, "steps": 1}])
def test_a_large_picture_stops_within_a_second(studio: Studio, wish: dict[str, Any]) -> None:
    stop = threading.Event()
    events = begin(studio.engine, replace(QUICK, **wish), stop)
    for event in events:
        if isinstance(event, Working) and event.words.startswith(
            f"Step 0 of {wish.get('steps', QUICK.steps)}"
        ):
            break
    time.sleep(1)
    asked = time.monotonic()
    stop.set()
    end = list(events)[-1]
    assert time.monotonic() - asked < 1.0
    assert isinstance(end, Job)
    assert (end.stopped, end.pictures) == (True, ())
    assert studio.engine.line.is_free


class LateToken(threading.Event):
    """Is set when it was asked so many times."""

    def __init__(self, patience: int) -> None:
        super().__init__()
        self._patience = patience

    def is_set(self) -> bool:
        self._patience -= 1
        return self._patience < 0


def test_a_stop_at_any_operation_leaves_the_models_as_they_were(drawing_studio: DrawingStudio) -> None:
    studio, fox = drawing_studio.studio, drawing_studio.ids["fox"]
    request = replace(QUICK, adapters={fox: 1.0}, compare_with_base=True)
    before = draw(studio, request)
    for patience in (3, 60, 400, 900):
        assert last(begin(studio.engine, request, LateToken(patience))).stopped
    after = draw(studio, request)
    for one, other in zip(
        before.pictures + before.base_pictures, after.pictures + after.base_pictures, strict=True
    ):
        assert np.array_equal(pixels(one.path), pixels(other.path))


def test_a_large_picture_is_what_the_pipeline_draws(drawing_studio: DrawingStudio) -> None:
    end = draw(drawing_studio.studio, replace(QUICK, width=264, height=256, steps=1))
    (expected,) = drawing_studio.plain(
        QUICK.prompt, seed=0, adapters={}, num_inference_steps=1, guidance_scale=3.0, width=264, height=256
    ).images
    assert np.array_equal(pixels(end.pictures[0].path), np.asarray(expected))


@torch.no_grad()
def in_parts(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Compute with operations in parts, and see that there were some."""
    token = LateToken(10**9)
    with StopInside(partial(check, token), 1e6):
        found = compute()
    assert 10**9 - token._patience > 4, "it was not done in parts"
    return found


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width"), [(2048, 2048, 3, 32), (2305, 2305, 1, 64), (4097, 77, 8, 40)]
)
def test_attention_in_parts_is_that_in_one(queries: int, keys: int, heads: int, width: int) -> None:
    query = torch.randn(2, heads, queries, width)
    key, value = torch.randn(2, 2, heads, keys, width)
    parts = in_parts(lambda: F.scaled_dot_product_attention(query, key, value))
    assert torch.equal(parts, F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize(
    ("channels", "out", "kernel", "side"), [(64, 32, 3, 99), (96, 96, 3, 64), (64, 48, 1, 50)]
)
@torch.no_grad()
def test_a_convolution_in_parts_is_that_in_one(channels: int, out: int, kernel: int, side: int) -> None:
    layer, x = nn.Conv2d(channels, out, kernel, padding=kernel // 2), torch.randn(2, channels, side, side + 8)
    assert torch.equal(in_parts(lambda: layer(x)), layer(x))


def test_who_stops_while_the_models_are_loaded_need_not_wait_for_them(tmp_path: Path) -> None:
    class SlowEngine(Engine):
        opened = 0

        def _open(self) -> BatchEngine:
            self.opened += 1
            time.sleep(3)
            return super()._open()

    engine, stop = SlowEngine("tiny_world", outputs=tmp_path, folder_of=Path), threading.Event()
    events = begin(engine, QUICK, stop)
    state, start = next(events), time.monotonic()
    assert state == Working("Loading the models …")
    stop.set()
    assert last(events).stopped
    assert time.monotonic() - start < 1
    assert len(last(begin(engine, QUICK)).pictures) == 1
    assert engine.opened == 1


def test_what_this_machine_cannot_draw_is_refused_in_a_sentence_and_nothing_else(studio: Studio) -> None:
    for request in (
        GenerateRequest("a fox", width=4096, height=4096),
        GenerateRequest("a fox", width=512, height=512, steps=1000),
        GenerateRequest("a fox", width=1024, height=768, num_images=32),
        GridRequest(tuple("abcdefghij"), tuple(range(20)), width=256, height=256, steps=200),
    ):
        with pytest.raises(ValueError, match=r"\d × \d+ px .*choose smaller or fewer"):
            begin(studio.engine, request)
    for most in (replace(QUICK, num_images=32, steps=150), replace(QUICK, width=512, height=512)):
        studio.engine.cost.check(most.sampling())


def test_memory_is_looked_at_by_size_and_number_and_time_is_that_which_was_measured() -> None:
    base, many = open_base("tiny_world"), replace(SAMPLING, seeds=tuple(range(1000)))
    cost, elsewhere = Cost(base, CPU), Cost(base, torch.device("meta"))
    cost.check_memory(SAMPLING, 2**24)
    with pytest.raises(ValueError, match=r"1 picture of 64 × 64 px would take about 0\.0 GiB of memory"):
        cost.check_memory(SAMPLING, 2**20)
    with pytest.raises(ValueError, match="1000 pictures"):
        cost.check_memory(many, 2**24)
    elsewhere.check_memory(many, 0)
    elsewhere.check(many)
    elsewhere.measured(SAMPLING, Pace(MAX_SECONDS / 4, MAX_SECONDS / 2))
    elsewhere.check(SAMPLING)
    with pytest.raises(ValueError, match=r"with 2 steps would take about 2 h .* up to 1 h"):
        elsewhere.check(replace(SAMPLING, seeds=(0, 1)))


def test_the_operations_of_a_step_are_those_of_its_layers() -> None:
    """Counted by hand, layer by layer, on the UNet itself."""
    base = open_base("tiny_world")
    unet, counted = base.load_denoiser(), [0.0]

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        counted[0] += 2 * output.numel() * layer.weight[0].numel()  # type: ignore[index]

    for layer in unet.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    attend = F.scaled_dot_product_attention

    class Attention(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is attend:
                counted[0] += 4 * args[0].numel() * args[1].shape[-2]
            return func(*args, **(kwargs or {}))

    with Attention(), torch.no_grad():
        unet(torch.zeros(2, 4, 16, 24), 1, torch.zeros(2, 77, unet.config.cross_attention_dim))
    found = Cost(base, CPU).of_step(96, 64, True)
    assert found == pytest.approx(counted[0], rel=0.01)


@pytest.mark.parametrize(("limits", "most"), [([], None), (["max"], None), (["max", "4096"], 4096)])
def test_memory_is_that_of_the_machine_or_of_its_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: list[str], most: int | None
) -> None:
    paths = [str(tmp_path / str(number)) for number in range(len(limits))]
    for path, text in zip(paths, limits, strict=True):
        Path(path).write_text(text + "\n")
    monkeypatch.setattr(console, "_LIMITS", (*paths, "/is/not/there"))
    assert machine_memory() == (most or psutil.virtual_memory().total)

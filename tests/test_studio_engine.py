"""The studio's engine on Tiny World: what it draws, that it stops, and that two jobs never run at once."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from method_adapters import METHODS, save_for_tiny_world
from PIL import Image
from studio_folders import (
    QUICK,
    add,
    control_image,
    draw,
    last,
    make_adapters,
    pixels,
)
from torch import nn

from ether_diffusion.pipelines import EtherControlPipeline
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.ui.drawing import MAX_SIDE_LATENTS, Previewer
from ether_diffusion.ui.engine import Engine
from ether_diffusion.ui.events import CellDone, Finished, Previewing, Stopped, StopToken, Waiting
from ether_diffusion.ui.grid_page import cost_words
from ether_diffusion.ui.jobs import Job, Line
from ether_diffusion.ui.outputs import Outputs
from ether_diffusion.ui.requests import SEED, GenerateRequest, GridRequest
from ether_diffusion.ui.studio import Studio


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_adapters(folder)
    return folder


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, made: Path) -> Iterator[Studio]:
    studio = Studio(tmp_path_factory.mktemp("studio"))
    yield studio
    studio.close()
    assert studio.engine.is_free


@pytest.fixture(scope="module")
def ids(studio: Studio, made: Path) -> dict[str, str]:
    return add(studio, made, "fox", "cat", "follow", "trace", "odd", "alien")


@pytest.fixture(scope="module")
def plain() -> EtherControlPipeline:
    """A pipeline of its own, that the studio knows nothing of."""
    pipe = EtherControlPipeline.from_pretrained("tiny_world")
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Calls:
    """Counts the calls of the studio's UNet, by thread."""

    def __init__(self, studio: Studio) -> None:
        self.threads: list[int] = []
        self.most_at_once = self._now = 0
        unet: nn.Module = studio.engine.machine.pipeline.unet
        self._hooks = [
            unet.register_forward_pre_hook(self._enter),
            unet.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, *_: object) -> None:
        self.threads.append(threading.get_ident())
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)

    def _leave(self, *_: object) -> None:
        self._now -= 1

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


@pytest.fixture
def calls(studio: Studio) -> Iterator[Calls]:
    calls = Calls(studio)
    yield calls
    calls.remove()


def test_the_base_beside_an_adapter_is_what_diffusers_draws(studio: Studio, ids: dict[str, str]) -> None:
    stock = StableDiffusionPipeline.from_pretrained(tiny_world_path())
    stock.set_progress_bar_config(disable=True)
    end = draw(
        studio, replace(QUICK, adapters={ids["fox"]: 1.0}, num_images=2, seed=7, compare_with_base=True)
    )
    for seed, picture in enumerate(end.base_pictures, 7):
        generator = torch.Generator("cpu").manual_seed(seed)
        expected = stock(QUICK.prompt, num_inference_steps=2, guidance_scale=3.0, generator=generator).images[
            0
        ]
        assert np.array_equal(pixels(picture.path), np.asarray(expected))
        assert picture.metadata is not None
        assert (picture.metadata.seed, picture.metadata.adapters) == (seed, ())
    assert [p.id.removesuffix("-base") for p in end.base_pictures] == [p.id for p in end.pictures]


def test_a_picture_is_what_the_pipeline_draws_with_the_adapters(
    studio: Studio, ids: dict[str, str], made: Path, plain: EtherControlPipeline
) -> None:
    end = draw(studio, replace(QUICK, adapters={ids["fox"]: 0.5, ids["cat"]: 0.3}, num_images=2))
    for name in ("fox", "cat"):
        plain.load_ether_weights(made / name, adapter_name=name, activate=False)
    try:
        report = {
            name: len([m for m in plain.unet.modules() if name in getattr(m, "r", ())]) for name in ("fox",)
        }
        for seed, picture in enumerate(end.pictures):
            expected = plain(
                QUICK.prompt,
                adapters={"fox": 0.5, "cat": 0.3},
                seed=seed,
                num_inference_steps=2,
                guidance_scale=3.0,
            ).images[0]
            assert np.array_equal(pixels(picture.path), np.asarray(expected))
    finally:
        plain.unload()
    assert end.touched_layers == report["fox"] > 0
    assert end.pictures[0].metadata is not None
    assert [use.name for use in end.pictures[0].metadata.adapters] == ["fox", "cat"]
    assert end.notes == ()


def test_at_strength_0_nothing_is_touched(studio: Studio, ids: dict[str, str]) -> None:
    end = draw(studio, replace(QUICK, adapters={ids["fox"]: 0.0}, compare_with_base=True))
    assert end.touched_layers == 0
    assert np.array_equal(pixels(end.pictures[0].path), pixels(end.base_pictures[0].path))


def test_a_job_tells_how_far_it_is(studio: Studio, ids: dict[str, str]) -> None:
    request = replace(QUICK, adapters={ids["fox"]: 1.0}, steps=4, compare_with_base=True)
    *states, end = studio.engine.draw(request, StopToken())
    assert isinstance(end, Finished)
    assert not end.stopped
    told = [state for state in states if isinstance(state, Previewing)]
    assert all((state.num_steps, state.num_images) == (4, 2) for state in told)
    at = [(state.num_done, state.step) for state in told]
    assert at == sorted(at)
    assert at[-1] == (1, 4)
    assert told[-1].seconds_left is not None
    looks = [state.image for state in told if state.image is not None]
    assert looks[0].size == (64, 64)
    assert studio.engine.seconds_per_step(request) is not None


def test_an_engine_does_not_guess_how_fast_it_is(tmp_path: Path) -> None:
    engine = Engine("tiny_world", outputs=tmp_path, folder_of=Path)
    assert engine.seconds_per_step(QUICK) is None
    grid = GridRequest(("a", "b"), (0, 1, 2), ("fox", "cat"), (0.5, 1.0), steps=10)
    assert cost_words(grid, 0.1) == "30 pictures · 300 steps · about 30 s"
    assert "known after the first picture" in cost_words(grid, None)


def test_large_latents_are_shrunk_before_a_look(studio: Studio) -> None:
    previewer = Previewer(studio.engine.machine.pipeline)
    previewer.look(torch.zeros(1, studio.engine.machine.pipeline.unet.config.in_channels, 64, 48))
    assert previewer.image is not None
    factor = studio.engine.base.vae_scale_factor
    assert previewer.image.size == (MAX_SIDE_LATENTS * factor * 3 // 4, MAX_SIDE_LATENTS * factor)


def test_stop_stops_within_one_step(studio: Studio, calls: Calls) -> None:
    stop, at_stop, end = StopToken(), 0, None
    for event in studio.engine.draw(replace(QUICK, steps=500, num_images=3), stop):
        if isinstance(event, Previewing) and event.step >= 3 and not stop.stopped:
            stop.stop()
            at_stop = len(calls.threads)
        end = event
    assert isinstance(end, Finished)
    assert end.stopped
    assert end.pictures == ()
    assert len(calls.threads) - at_stop <= 1
    assert studio.engine.is_free


def test_what_was_drawn_before_a_stop_is_kept(studio: Studio) -> None:
    stop, end = StopToken(), None
    for event in studio.engine.draw(replace(QUICK, num_images=20), stop):
        if isinstance(event, Previewing) and event.num_done >= 1:
            stop.stop()
        end = event
    assert isinstance(end, Finished)
    assert end.stopped
    assert 1 <= len(end.pictures) < 20
    assert all(picture.path.is_file() for picture in end.pictures)


def test_a_closed_page_stops_its_job(studio: Studio, calls: Calls) -> None:
    stop = StopToken()
    events = studio.engine.draw(replace(QUICK, steps=1000), stop)
    next(events)
    events.close()  # type: ignore[attr-defined]  # as Gradio closes generators
    assert stop.stopped
    draw(studio, QUICK)  # has its turn only when the other's is over
    assert len(calls.threads) < 500


def test_closing_a_studio_stops_what_it_draws(tmp_path: Path) -> None:
    studio = Studio(tmp_path / "studio")
    events = studio.engine.draw(replace(QUICK, steps=1000), StopToken())
    while not isinstance(event := next(events), Previewing) or event.step < 1:
        pass
    studio.close()
    assert studio.engine.is_free
    assert last(events).stopped
    assert (studio.temp.stat().st_mode & 0o777) == 0o700


def test_training_on_an_accelerator_leaves_no_room_for_pictures(tmp_path: Path) -> None:
    def refuse(device: torch.device) -> None:
        raise ValueError("fox is training on the accelerator; wait until it is done, or pause it")

    engine = Engine("tiny_world", outputs=tmp_path, folder_of=Path, check_free=refuse)
    with pytest.raises(ValueError, match="fox is training"):
        last(engine.draw(QUICK, StopToken()))
    assert engine.is_free


def test_a_studio_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        Studio(tmp_path / "notes.txt")


def test_a_cancelled_job_never_overlaps_the_next(studio: Studio, calls: Calls) -> None:
    for _ in range(3):
        events = studio.engine.draw(replace(QUICK, steps=1000), StopToken())
        while not isinstance(event := next(events), Previewing) or event.step < 1:
            pass
        events.close()  # type: ignore[attr-defined]
    draw(studio, QUICK)
    assert calls.most_at_once == 1
    changes = sum(a != b for a, b in zip(calls.threads, calls.threads[1:], strict=False))
    assert changes <= 3  # each job's calls stand together


def test_who_waits_knows_their_place_and_can_leave(studio: Studio, calls: Calls) -> None:
    engine, stops = studio.engine, [StopToken(), StopToken(), StopToken()]
    first, second, third = (engine.draw(replace(QUICK, steps=1000), stop) for stop in stops)
    while not isinstance(event := next(first), Previewing) or event.step < 1:
        pass
    assert next(second) == Waiting(1)
    assert next(third) == Waiting(2)
    stops[1].stop()
    end = last(second)
    assert (end.stopped, end.pictures) == (True, ())
    moved = next(event for event in third if event != Waiting(2))
    assert moved == Waiting(1)
    stops[0].stop()
    assert last(first).stopped
    assert isinstance(next(event for event in third if not isinstance(event, Waiting)), Previewing)
    stops[2].stop()
    assert last(third).stopped
    assert calls.most_at_once == 1


def test_an_error_releases_the_lock(studio: Studio) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the cable was pulled")

    hook = studio.engine.machine.pipeline.unet.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="cable"):
            draw(studio, QUICK)
    finally:
        hook.remove()
    assert studio.engine.is_free
    assert len(draw(studio, QUICK).pictures) == 1


def test_running_out_of_memory_is_a_sentence(studio: Studio) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    hook = studio.engine.machine.pipeline.unet.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ValueError, match="choose smaller pictures"):
            draw(studio, QUICK)
    finally:
        hook.remove()
    assert studio.engine.is_free


@pytest.mark.parametrize(("name", "words"), [("odd", "other weights"), ("alien", "was made for")])
def test_an_adapter_for_another_base_is_refused_before_the_first_step(
    studio: Studio, ids: dict[str, str], calls: Calls, name: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        draw(studio, replace(QUICK, adapters={ids["fox"]: 1.0, ids[name]: 1.0}))
    assert calls.threads == []
    assert studio.engine.is_free


def test_an_adapter_for_other_weights_is_used_where_that_is_allowed(
    studio: Studio, ids: dict[str, str]
) -> None:
    end = draw(studio, replace(QUICK, adapters={ids["odd"]: 1.0}, allow_other_base=True))
    assert end.notes == ("odd was made for another base of this architecture; results may differ.",)


def test_an_adapter_that_is_gone_is_refused_before_waiting(studio: Studio) -> None:
    with pytest.raises(FileNotFoundError, match="no longer in the library"):
        studio.engine.draw(replace(QUICK, adapters={"a000": 1.0}), StopToken())


def test_few_adapters_stay_loaded_and_all_can_be_used(tmp_path: Path, made: Path) -> None:
    engine = Engine("tiny_world", outputs=tmp_path, folder_of=lambda name: made / name, max_loaded=2)
    first = last(engine.draw(replace(QUICK, adapters={"fox": 1.0}), StopToken()))
    for name in ("cat", "follow", "trace"):
        last(engine.draw(replace(QUICK, adapters={name: 1.0}), StopToken()))
    assert engine.machine.attached.ids == ("follow", "trace")
    last(engine.draw(replace(QUICK, adapters={"follow": 1.0}), StopToken()))
    again = last(engine.draw(replace(QUICK, adapters={"fox": 1.0}), StopToken()))
    assert engine.machine.attached.ids == ("follow", "fox")
    assert np.array_equal(pixels(first.pictures[0].path), pixels(again.pictures[0].path))
    more = last(engine.draw(replace(QUICK, adapters={"fox": 1.0, "cat": 1.0, "trace": 1.0}), StopToken()))
    assert more.pictures[0].metadata is not None
    assert len(more.pictures[0].metadata.adapters) == 3


def test_a_renamed_adapter_goes_by_its_new_name(studio: Studio, made: Path) -> None:
    adapter_id = add(studio, made, "cat")["cat"]
    studio.library.rename(adapter_id, "v1.5 unet")
    assert _names(draw(studio, replace(QUICK, adapters={adapter_id: 1.0}))) == ["v1_5 unet"]
    studio.library.rename(adapter_id, "unet")  # as a part of the models
    assert _names(draw(studio, replace(QUICK, adapters={adapter_id: 1.0}))) == ["unet"]
    studio.library.rename(adapter_id, "mid_block")
    assert _names(draw(studio, replace(QUICK, adapters={adapter_id: 1.0}))) == ["mid_block (2)"]
    studio.library.delete(adapter_id)


def test_files_that_changed_under_an_id_are_loaded_anew(tmp_path: Path, made: Path) -> None:
    folder = tmp_path / "adapter"
    engine = Engine("tiny_world", outputs=tmp_path / "out", folder_of=lambda _: folder)
    hashes = []
    for name in ("fox", "cat"):
        folder.unlink(missing_ok=True)
        folder.symlink_to(made / name)
        end = last(engine.draw(replace(QUICK, adapters={"a": 1.0}), StopToken()))
        assert end.pictures[0].metadata is not None
        hashes.append(end.pictures[0].metadata.adapters[0].sha256)
    assert hashes[0] != hashes[1]


def test_a_subject_joins_a_control_adapter(
    studio: Studio, ids: dict[str, str], made: Path, plain: EtherControlPipeline
) -> None:
    draw(studio, replace(QUICK, adapters={ids["trace"]: 1.0}, control_image=control_image()))
    end = draw(
        studio,
        replace(
            QUICK,
            adapters={ids["fox"]: 0.7, ids["follow"]: 1.0},
            control_image=control_image(),
            control_strength=0.5,
            compare_with_base=True,
        ),
    )
    plain.load_ether_weights(made / "fox", adapter_name="fox")
    plain.load_control_weights(made / "follow", adapter_name="follow")
    try:
        options: dict[str, Any] = {"seed": 0, "num_inference_steps": 2, "guidance_scale": 3.0}
        both = {"fox": 0.7, "follow": 1.0}
        expected = plain(
            QUICK.prompt, adapters=both, control_image=control_image(), control_strength=0.5, **options
        ).images[0]
        base = plain(QUICK.prompt, adapters={}, **options).images[0]
    finally:
        plain.unload()
    assert np.array_equal(pixels(end.pictures[0].path), np.asarray(expected))
    assert np.array_equal(pixels(end.base_pictures[0].path), np.asarray(base))
    said = end.pictures[0].metadata
    assert said is not None
    kept = studio.engine.outputs.find_control(str(said.options["control_image_sha256"]))
    assert kept is not None
    assert np.array_equal(np.asarray(kept), np.asarray(control_image()))


def test_control_needs_one_adapter_that_follows(studio: Studio, ids: dict[str, str]) -> None:
    for adapters in ({}, {ids["fox"]: 1.0}, {ids["follow"]: 1.0, ids["trace"]: 1.0}):
        with pytest.raises(ValueError, match="needs one adapter that follows it"):
            studio.engine.draw(replace(QUICK, adapters=adapters, control_image=control_image()), StopToken())
    end = draw(studio, replace(QUICK, adapters={ids["follow"]: 1.0}))
    assert end.notes == ("follow follows a control image, and none was given.",)


def test_a_prompt_that_is_cut_is_told(studio: Studio) -> None:
    assert "is lost" in draw(studio, replace(QUICK, prompt="a red fox " * 60)).notes[0]


def test_a_picture_that_shows_nothing_is_told_with_the_reason(studio: Studio) -> None:
    weight = studio.engine.machine.pipeline.vae.decoder.conv_out.weight
    before = weight.detach().clone()
    grid = GridRequest(prompts=("a rocket",), seeds=(7,), steps=1)
    try:
        weight.data.fill_(torch.nan)
        notes = draw(studio, replace(QUICK, seed=5)).notes
        told = last(studio.engine.draw(grid, StopToken())).notes
    finally:
        weight.data.copy_(before)
    assert any("seed 5" in note and "not finite" in note for note in notes)
    assert any("seed 7" in note and "not finite" in note for note in told)
    assert draw(studio, QUICK).notes == ()


def test_metadata_can_be_left_out(studio: Studio, ids: dict[str, str]) -> None:
    request = replace(
        QUICK,
        adapters={ids["follow"]: 1.0},
        control_image=Image.new("RGB", (64, 64), "teal"),
        keep_metadata=False,
        compare_with_base=True,
    )
    before = set(studio.engine.outputs.folder.rglob("*.png"))
    end = draw(studio, request)
    new = set(studio.engine.outputs.folder.rglob("*.png")) - before
    assert new == {picture.path for picture in (*end.pictures, *end.base_pictures)}
    for path in new:
        with Image.open(path) as image:
            image.load()
            assert not image.info
        assert b"fox" not in path.read_bytes()
    kept = draw(studio, replace(request, keep_metadata=True))
    assert np.array_equal(pixels(end.pictures[0].path), pixels(kept.pictures[0].path))


def test_every_cell_of_a_grid_is_drawn_again_from_its_own_file(studio: Studio, ids: dict[str, str]) -> None:
    request = GridRequest(
        ("a cat", "a dog"), (3, 1), (ids["fox"],), (0.5, 1.0), steps=2, negative_prompt="rain"
    )
    events = list(studio.engine.draw(request, StopToken()))
    cells = [event for event in events if isinstance(event, CellDone)]
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.sheet is not None
    assert end.manifest is not None
    assert [(c.prompt, c.seed, c.choice) for c in cells] == [
        (p, s, c) for p in range(2) for s in range(2) for c in range(3)
    ]
    assert [c.picture for c in cells] == list(end.pictures)
    assert end.touched_layers > 0
    for cell in cells[::4]:
        said = cell.picture.metadata
        assert said is not None
        assert said.prompt == request.prompts[cell.prompt]
        assert said.seed == request.seeds[cell.seed]
        strengths = {use.name: use.strength for use in said.adapters}
        assert strengths == [{}, {"fox": 0.5}, {"fox": 1.0}][cell.choice]
        again = GenerateRequest(
            said.prompt,
            {ids[name]: strength for name, strength in strengths.items() if strength},
            said.seed,
            steps=2,
            negative_prompt="rain",
            compare_with_base=False,
        )
        assert np.array_equal(pixels(draw(studio, again).pictures[0].path), pixels(cell.picture.path))
    manifest = json.loads(end.manifest.read_text())
    assert [entry["file"] for entry in manifest["pictures"]] == [
        c.picture.path.relative_to(end.manifest.parent).as_posix() for c in cells
    ]
    assert manifest["choices"] == [{}, {"fox": 0.5}, {"fox": 1.0}]
    with Image.open(end.sheet) as sheet:
        assert sheet.width > 3 * 64


def test_a_grid_that_is_stopped_keeps_its_cells(studio: Studio) -> None:
    stop, cells = StopToken(), 0
    for event in studio.engine.draw(GridRequest(("a cat",), tuple(range(50)), steps=2), stop):
        if isinstance(event, CellDone):
            cells += 1
            stop.stop()
        end = event
    assert isinstance(end, Finished)
    assert end.stopped
    assert end.sheet is None
    assert cells <= len(end.pictures) < 50
    assert all(cell.path.is_file() for cell in end.pictures)


def test_a_grid_without_metadata_has_a_sheet_and_no_manifest(studio: Studio) -> None:
    request = GridRequest(("a cat",), (0, 1), steps=1, keep_metadata=False)
    end = last(studio.engine.draw(request, StopToken()))
    assert end.manifest is None
    assert end.sheet is not None
    with Image.open(end.sheet) as sheet:
        assert not sheet.info


def test_sides_may_be_any_multiple_of_8(studio: Studio) -> None:
    picture = draw(studio, replace(QUICK, width=72, height=56)).pictures[0]
    assert picture.metadata is not None
    assert (picture.metadata.width, picture.metadata.height) == (72, 56)
    assert pixels(picture.path).shape == (56, 72, 3)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompt": "x" * 2001}, "up to 2000 characters"),
        ({"prompt": "\ud83d"}, "half a character"),
        ({"negative_prompt": "x" * 2_000_000}, "up to 2000 characters"),
        ({"seed": -1}, "seed must be from 0 to 4294967295; found -1"),
        ({"seed": int(SEED.most) + 1}, "seed must be from 0"),
        ({"seed": True}, "seed is true"),
        ({"seed": int(SEED.most), "num_images": 2}, "last seed would be beyond"),
        ({"num_images": 0}, "num_images must be from 1 to 32"),
        ({"num_images": 33}, "num_images must be from 1 to 32"),
        ({"steps": 0}, "steps must be from 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is NaN; it should be a finite"),
        ({"width": 65}, "multiple of 8"),
        ({"height": 1 << 20}, "multiple of 8"),
        ({"adapters": {"fox": float("inf")}}, "adapters.fox is Infinity"),
        ({"adapters": {"fox": float("nan")}}, "adapters.fox is NaN"),
        ({"adapters": {str(n): 1.0 for n in range(9)}}, "adapters are up to 8"),
        (
            {"control_image": Image.new("L", (8, 8)), "control_strength": 1e9},
            "control_strength must be from -10",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(QUICK, **wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompts": ()}, "found no prompts"),
        ({"seeds": ()}, "found no seeds"),
        ({"seeds": (1, 1)}, "found 1 twice among the seeds"),
        ({"adapters": ("fox", "fox")}, "found fox twice"),
        ({"adapters": ("fox",), "strengths": ()}, "found no strengths"),
        ({"with_base": False}, "neither an adapter nor the base"),
        ({"seeds": tuple(range(401))}, "at most 400"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_refused_in_a_sentence(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(GridRequest(("a cat",)), **wrong)


def test_without_news_the_last_state_is_told_again_so_that_a_closed_page_is_noticed() -> None:
    go_on = threading.Event()

    def work(emit: Callable[[Waiting | str], None]) -> None:
        emit(Waiting(1))
        go_on.wait(30)
        emit("done")

    events = Job(work, stop := StopToken()).events()
    assert [next(events) for _ in range(3)] == [Waiting(1)] * 3
    go_on.set()
    assert [event for event in events if event != Waiting(1)] == ["done"]
    assert stop.stopped


def test_states_that_were_overtaken_are_left_out_and_results_are_not() -> None:
    ready = threading.Event()

    def work(emit: Callable[[Waiting | str], None]) -> None:
        for event in (Waiting(3), "first", Waiting(2), Waiting(1), "second", Waiting(0)):
            emit(event)
        ready.set()

    events = Job(work, StopToken()).events()
    seen = [next(events)]
    ready.wait(30)
    seen += events
    assert [event for event in seen if isinstance(event, str)] == ["first", "second"]
    assert Waiting(2) not in seen[1:]


def test_the_line_lets_one_in_at_a_time_in_the_order_they_came() -> None:
    line, inside, order = Line(), [], []
    started = [threading.Event() for _ in range(8)]

    def work(number: int) -> None:
        with line.turn(StopToken(), lambda place: started[number].set()):
            started[number].set()
            inside.append(number)
            assert len(inside) == 1
            order.append(number)
            if number == 0:
                started[7].wait(10)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread, event in zip(threads, started, strict=True):
        thread.start()
        event.wait(10)
    for thread in threads:
        thread.join(10)
    assert order == list(range(8))
    assert line.is_free


def test_a_line_that_is_too_long_is_refused_and_who_is_stopped_leaves() -> None:
    line, stop = Line(), StopToken()
    stop.stop()
    with line.turn(StopToken(), lambda place: None):
        with pytest.raises(Stopped), line.turn(stop, lambda place: None):
            raise AssertionError("it must not come in")
        assert not line.is_free
    assert line.is_free


def test_a_control_image_is_found_by_its_own_hash_only(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    outputs.keep_control(control_image())
    path = next(tmp_path.rglob("*.png"))
    assert outputs.find_control(path.stem) is not None
    assert outputs.find_control("../" + path.stem) is None
    Image.new("RGB", (8, 8)).save(path)
    assert outputs.find_control(path.stem) is None
    path.write_bytes(b"no picture")
    assert outputs.find_control(path.stem) is None


def _names(end: Finished) -> list[str]:
    assert end.pictures[0].metadata is not None
    return [use.name for use in end.pictures[0].metadata.adapters]


def test_a_base_for_inpainting_is_refused_when_the_studio_opens(tmp_path: Path) -> None:
    shutil.copytree(tiny_world_path(), tmp_path / "base")
    config = tmp_path / "base" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    with pytest.raises(ValueError, match="a base for inpainting"):
        Studio(tmp_path / "studio", base=str(tmp_path / "base"))
    assert not (tmp_path / "studio").exists()


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_any_method_is_uploaded_and_drawn_with_as_the_pipeline_does(
    studio: Studio, ids: dict[str, str], plain: EtherControlPipeline, tmp_path: Path, method: str
) -> None:
    save_for_tiny_world(tmp_path / method, method)
    uploaded = studio.library.import_upload([*(tmp_path / method).iterdir()])
    assert (uploaded.method.lower(), uploaded.fits_base, uploaded.match) == (method, True, "same")
    request = replace(QUICK, adapters={uploaded.id: 1.0}, seed=3)
    draw(studio, replace(QUICK, adapters={ids["fox"]: 1.0}))  # of another method, which makes room
    (picture,) = draw(studio, request).pictures
    plain.load_adapter_weights(tmp_path / method)
    expected = plain(
        request.prompt, num_inference_steps=request.steps, guidance_scale=request.guidance_scale, seed=3
    ).images[0]
    plain.unload()
    assert picture.metadata is not None
    (use,) = picture.metadata.adapters
    assert use.sha256 == {"unet": uploaded.hash}
    assert np.array_equal(pixels(picture.path), np.asarray(expected))
    draw(studio, replace(QUICK, adapters={ids["fox"]: 1.0}))

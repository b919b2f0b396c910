"""The studio's engine on Tiny World: what it draws, that it stops, and that two jobs never run at once."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from method_adapters import METHODS, save_for_tiny_world
from PIL import Image
from studio_folders import QUICK, DrawingStudio, Told, add, begin, control_image, draw, last, pixels, said
from torch import nn

from ether_diffusion.control import control_batch, controlled
from ether_diffusion.pipelines import EtherControlPipeline
from ether_diffusion.serving.engine import MAX_SIDE_LATENTS, look_at
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.ui.engine import Engine
from ether_diffusion.ui.jobs import (
    Job,
    Line,
    SavedPicture,
    Stopped,
    Working,
)
from ether_diffusion.ui.outputs import Outputs
from ether_diffusion.ui.requests import SEED, GenerateRequest, GridRequest
from ether_diffusion.ui.restore import restore
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.first_page import examples, first_html


@pytest.fixture
def studio(drawing_studio: DrawingStudio) -> Studio:
    return drawing_studio.studio


@pytest.fixture
def ids(drawing_studio: DrawingStudio) -> dict[str, str]:
    return drawing_studio.ids


@pytest.fixture
def made(drawing_studio: DrawingStudio) -> Path:
    return drawing_studio.made


@pytest.fixture
def plain(drawing_studio: DrawingStudio) -> Iterator[EtherControlPipeline]:
    yield drawing_studio.plain
    drawing_studio.plain.unload()


class Calls:
    """Counts the calls of the studio's UNet, by thread."""

    def __init__(self, unet: nn.Module) -> None:
        self.threads: list[int] = []
        self.most_at_once = self._now = 0
        leave = unet.register_forward_hook(self._leave, always_call=True)
        self.hooks = [unet.register_forward_pre_hook(self._enter), leave]

    def _enter(self, *_: object) -> None:
        self.threads.append(threading.get_ident())
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)

    def _leave(self, *_: object) -> None:
        self._now -= 1


@pytest.fixture
def calls(studio: Studio) -> Iterator[Calls]:
    calls = Calls(studio.engine.pipeline.unet)
    yield calls
    for hook in calls.hooks:
        hook.remove()


def by_pipeline(plain: EtherControlPipeline, request: GenerateRequest, **options: Any) -> np.ndarray:
    """Return what the pipeline draws for a request's settings."""
    options = {"seed": request.seed, "num_inference_steps": request.steps, **options}
    return np.asarray(plain(request.prompt, guidance_scale=request.guidance_scale, **options).images[0])


def until_a_step(events: Iterator[Told]) -> None:
    while not isinstance(event := next(events), Working) or event.step < 1:
        pass


def test_the_base_beside_an_adapter_is_what_diffusers_draws(studio: Studio, ids: dict[str, str]) -> None:
    stock = StableDiffusionPipeline.from_pretrained(tiny_world_path())
    stock.set_progress_bar_config(disable=True)
    asked = replace(QUICK, adapters={ids["fox"]: 1.0}, num_images=2, seed=7, compare_with_base=True)
    end = draw(studio, replace(asked, width=72, height=56))
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 72, "height": 56}
    for seed, picture in enumerate(end.base_pictures, 7):
        image = stock(QUICK.prompt, generator=torch.Generator("cpu").manual_seed(seed), **options).images[0]
        assert np.array_equal(pixels(picture.path), np.asarray(image))
        assert (said(picture).seed, said(picture).adapters) == (seed, ())
    assert [p.id.removesuffix("-base") for p in end.base_pictures] == [p.id for p in end.pictures]


def test_a_picture_is_what_the_pipeline_draws_with_the_adapters(
    studio: Studio, ids: dict[str, str], made: Path, plain: EtherControlPipeline
) -> None:
    end = draw(studio, replace(QUICK, adapters={ids["fox"]: 0.5, ids["cat"]: 0.3}, num_images=2))
    for name in ("fox", "cat"):
        plain.load_ether_weights(made / name, adapter_name=name, activate=False)
    for seed, picture in enumerate(end.pictures):
        expected = by_pipeline(plain, QUICK, adapters={"fox": 0.5, "cat": 0.3}, seed=seed)
        assert np.array_equal(pixels(picture.path), expected)
        assert [(use.name, use.strength) for use in said(picture).adapters] == [("fox", 0.5), ("cat", 0.3)]
    assert end.touched_layers == sum("fox" in getattr(m, "r", ()) for m in plain.unet.modules()) > 0
    assert end.notes == []
    none = draw(studio, replace(QUICK, adapters={ids["fox"]: 0.0}, compare_with_base=True))
    assert none.touched_layers == 0
    assert np.array_equal(pixels(none.pictures[0].path), pixels(none.base_pictures[0].path))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_any_method_is_uploaded_and_drawn_with_as_the_pipeline_does(
    studio: Studio, ids: dict[str, str], plain: EtherControlPipeline, tmp_path: Path, method: str
) -> None:
    save_for_tiny_world(tmp_path / method, method)
    uploaded = studio.library.import_upload([*(tmp_path / method).iterdir()])
    assert (uploaded.method.lower(), uploaded.fits_base, uploaded.match) == (method, True, "same")
    draw(studio, replace(QUICK, adapters={ids["fox"]: 1.0}))  # of another method, which makes room
    (picture,) = draw(studio, replace(QUICK, adapters={uploaded.id: 1.0})).pictures
    plain.load_adapter_weights(tmp_path / method)
    assert np.array_equal(pixels(picture.path), by_pipeline(plain, QUICK))
    assert [use.sha256 for use in said(picture).adapters] == [{"unet": uploaded.hash}]
    draw(studio, replace(QUICK, adapters={ids["fox"]: 1.0}))


def test_a_subject_joins_a_control_adapter(
    studio: Studio, ids: dict[str, str], made: Path, plain: EtherControlPipeline
) -> None:
    draw(studio, replace(QUICK, adapters={ids["trace"]: 1.0}, control_image=control_image()))
    both = replace(QUICK, adapters={ids["fox"]: 0.7, ids["follow"]: 1.0}, compare_with_base=True)
    end = draw(studio, replace(both, control_image=control_image(), control_strength=0.5))
    plain.load_ether_weights(made / "fox", adapter_name="fox")
    plain.load_control_weights(made / "follow", adapter_name="follow")
    options: dict[str, Any] = {"control_image": control_image(), "control_strength": 0.5}
    expected = by_pipeline(plain, QUICK, adapters={"fox": 0.7, "follow": 1.0}, **options)
    assert np.array_equal(pixels(end.pictures[0].path), expected)
    assert np.array_equal(pixels(end.base_pictures[0].path), by_pipeline(plain, QUICK, adapters={}))
    kept = studio.engine.outputs.find_control(str(said(end.pictures[0]).options["control_image_sha256"]))
    assert kept is not None
    assert np.array_equal(np.asarray(kept), np.asarray(control_image()))


def test_an_encoder_by_itself_adds_its_features_to_the_base_and_to_a_subject(
    studio: Studio, ids: dict[str, str], made: Path, plain: EtherControlPipeline
) -> None:
    follow = replace(QUICK, adapters={ids["lines"]: 1.0}, control_image=control_image(), control_strength=0.7)
    end = draw(studio, replace(follow, compare_with_base=True))
    plain.load_control_weights(made / "lines", adapter_name="lines")
    images = control_batch(control_image(), height=64, width=64, control_type="palette")
    with controlled(plain.unet, plain.controls["lines"], images, strength=0.7):
        followed = by_pipeline(plain, QUICK)
    alone = by_pipeline(plain, QUICK)
    assert np.array_equal(pixels(end.pictures[0].path), followed)
    assert np.array_equal(pixels(end.base_pictures[0].path), alone)
    (both,) = draw(studio, replace(follow, adapters={ids["fox"]: 0.8, ids["lines"]: 1.0})).pictures
    assert [(use.name, use.strength) for use in said(both).adapters] == [("fox", 0.8)]
    assert said(both).options["control"] == "lines"
    assert len({each.tobytes() for each in (pixels(both.path), followed, alone)}) == 3
    free = draw(studio, replace(QUICK, adapters={ids["lines"]: 1.0}))
    assert np.array_equal(pixels(free.pictures[0].path), alone)
    assert free.notes[0] == "lines follows a control image, and none was given."
    with pytest.raises(ValueError, match="128 × 64 px and the picture 64 × 64 px"):
        draw(studio, replace(follow, control_image=Image.new("RGB", (128, 64))))
    for adapters in ({}, {ids["fox"]: 1.0}, {ids["follow"]: 1.0, ids["trace"]: 1.0}):
        with pytest.raises(ValueError, match="needs one adapter that follows it"):
            begin(studio.engine, replace(follow, adapters=adapters))


def test_a_job_tells_how_far_it_is(studio: Studio, ids: dict[str, str], tmp_path: Path) -> None:
    request = replace(QUICK, adapters={ids["fox"]: 1.0}, steps=4, compare_with_base=True)
    assert Engine("tiny_world", outputs=tmp_path, folder_of=Path).cost.seconds(request.sampling()) is None
    *states, end = begin(studio.engine, request)
    assert isinstance(end, Job)
    told = [state for state in states if isinstance(state, Working) and "Step" in state.words]
    done = [state.done for state in told]
    assert (done, done[-1]) == (sorted(done), 1)
    assert re.fullmatch(r"Step 4 of 4 · picture 2 of 2 · about \d+ s left", told[-1].words)
    assert next(state.image.size for state in told if state.image is not None) == (64, 64)
    assert studio.engine.cost.seconds(request.sampling()) is not None
    base, pipeline = studio.engine.base, studio.engine.pipeline
    factor, latents = base.vae_scale_factor, torch.zeros(1, pipeline.unet.config.in_channels, 64, 48)
    look = look_at(base, pipeline.vae, latents)  # is shrunk before
    assert look.size == (MAX_SIDE_LATENTS * factor * 3 // 4, MAX_SIDE_LATENTS * factor)


def test_stop_stops_within_one_step_and_keeps_what_was_drawn(studio: Studio, calls: Calls) -> None:
    for asked, pictures in ((replace(QUICK, steps=500), 0), (replace(QUICK, steps=9, num_images=20), 1)):
        stop, at_stop = threading.Event(), 0
        for event in begin(studio.engine, asked, stop):
            if isinstance(event, Working) and event.step >= 3 and event.done > pictures / 20:
                at_stop = at_stop or len(calls.threads)
                stop.set()
        assert isinstance(event, Job)
        assert event.stopped
        assert len(calls.threads) - at_stop <= 1
        assert pictures <= len(event.pictures) < 20
        assert all(picture.path.is_file() for picture in event.pictures)
        assert studio.engine.line.is_free


def test_a_closed_page_stops_its_job_and_the_next_never_overlaps_it(studio: Studio, calls: Calls) -> None:
    for _ in range(3):
        events = begin(studio.engine, replace(QUICK, steps=1000), stop := threading.Event())
        until_a_step(events)
        events.close()  # type: ignore[attr-defined]  # as Gradio closes generators
        assert stop.is_set()
    draw(studio, QUICK)
    assert len(calls.threads) < 500
    assert calls.most_at_once == 1
    assert sum(a != b for a, b in zip(calls.threads, calls.threads[1:], strict=False)) <= 3


def test_a_new_studio_has_what_is_shipped_and_closing_it_stops_what_it_draws(tmp_path: Path) -> None:
    studio = Studio(tmp_path / "studio")
    studio.add_shipped()
    assert [(card.kind, card.name, card.fits_base) for card in studio.library.cards()] == [
        ("subject", "Example fox", True), ("control", "Shapes", True)
    ]  # fmt: skip
    shown = first_html(studio)
    assert "draws 160 things" in shown
    assert not [word for word in ("sks animal", "a castle", *examples()) if word not in shown]
    for picture in examples().values():  # each is one that this studio draws again
        restored = restore(picture, studio)
        assert restored.differences == ()
    assert restored.request is not None
    again = draw(studio, restored.request).pictures[0].path
    with Image.open(again) as one, Image.open(picture) as other:
        assert one.tobytes() == other.tobytes()
    events = begin(studio.engine, replace(QUICK, steps=1000))
    until_a_step(events)
    studio.close()
    assert studio.engine.line.is_free
    assert last(events).stopped
    assert (studio.temp.stat().st_mode & 0o777) == 0o700


def test_another_embedded_base_has_nothing_shipped_and_shows_only_prompts_that_it_draws(
    tmp_path: Path,
) -> None:
    studio = Studio(tmp_path / "studio", base="tiny_world")
    studio.add_shipped()
    assert studio.library.cards() == []
    shown = first_html(studio)
    assert "draws 48 things" in shown
    assert "a cat in the snow" in shown
    assert not [word for word in ("sks", "a castle", "data-example") if word in shown]


def test_who_waits_knows_their_place_and_can_leave(studio: Studio, calls: Calls) -> None:
    stops = [threading.Event() for _ in range(3)]
    first, second, third = (begin(studio.engine, replace(QUICK, steps=1000), stop) for stop in stops)
    until_a_step(first)
    next_one, later = Working("Waiting: yours is next"), Working("Waiting: number 2 in line")
    assert [next(second), next(third)] == [next_one, later]
    stops[1].set()
    end = last(second)
    assert (end.stopped, end.pictures) == (True, ())
    assert next(event for event in third if event != later) == next_one
    stops[0].set()
    assert last(first).stopped
    until_a_step(third)
    stops[2].set()
    assert last(third).stopped
    assert calls.most_at_once == 1


def test_a_job_for_which_there_is_no_thread_leaves_the_line(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_room)
        with pytest.raises(RuntimeError, match="new thread"):
            studio.engine.start(QUICK)
    assert studio.engine.line.is_free


def test_an_error_releases_the_lock_and_a_lack_of_memory_is_a_sentence(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: torch.device) -> None:
        raise ValueError("fox is training on the accelerator; wait until it is done, or pause it")

    with monkeypatch.context() as patched:
        patched.setattr(studio.engine, "_check_free", refuse)
        with pytest.raises(ValueError, match="fox is training"):
            draw(studio, QUICK)
    for error, kind, words in (
        (RuntimeError("the cable was pulled"), RuntimeError, "cable"),
        (torch.OutOfMemoryError("tried to allocate 9 GiB"), ValueError, "choose smaller pictures"),
    ):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        hook = studio.engine.pipeline.unet.register_forward_pre_hook(fail)
        with pytest.raises(kind, match=words):
            draw(studio, QUICK)
        hook.remove()
        assert studio.engine.line.is_free
    assert len(draw(studio, QUICK).pictures) == 1


def test_a_folder_or_a_base_that_is_none_is_refused_when_the_studio_opens(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        Studio(tmp_path / "notes.txt")
    shutil.copytree(tiny_world_path(), tmp_path / "base")
    config = tmp_path / "base" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    with pytest.raises(ValueError, match="a base for inpainting"):
        Studio(tmp_path / "studio", base=str(tmp_path / "base"))
    assert not (tmp_path / "studio").exists()


def test_an_adapter_for_another_base_is_refused_before_the_first_step(
    studio: Studio, ids: dict[str, str], calls: Calls
) -> None:
    for name, words in (("odd", "other weights"), ("alien", "was made for")):
        with pytest.raises(ValueError, match=words):
            draw(studio, replace(QUICK, adapters={ids["fox"]: 1.0, ids[name]: 1.0}))
    with pytest.raises(FileNotFoundError, match="no longer in the library"):
        begin(studio.engine, replace(QUICK, adapters={"a000": 1.0}))
    assert calls.threads == []
    assert studio.engine.line.is_free


def test_few_adapters_stay_loaded_and_files_that_changed_are_loaded_anew(tmp_path: Path, made: Path) -> None:
    folders = {name: made / name for name in ("fox", "cat", "follow", "trace")}
    engine = Engine("tiny_world", outputs=tmp_path, folder_of=folders.__getitem__, max_loaded=2)

    def drawn(*names: str) -> SavedPicture:
        asked = replace(QUICK, steps=1, adapters=dict.fromkeys(names, 1.0))
        return last(begin(engine, asked)).pictures[0]

    first = drawn("fox")
    for name in ("cat", "follow", "trace"):
        drawn(name)
    assert tuple(engine.attached) == ("follow", "trace")
    drawn("follow")
    again = drawn("fox")
    assert tuple(engine.attached) == ("follow", "fox")
    assert np.array_equal(pixels(first.path), pixels(again.path))
    assert len(said(drawn("fox", "cat", "trace")).adapters) == 3
    folders["fox"] = made / "cat"
    assert said(drawn("fox")).adapters[0].sha256 != said(first).adapters[0].sha256


def test_a_renamed_adapter_goes_by_its_new_name(studio: Studio, made: Path) -> None:
    adapter_id = add(studio, made, "cat")["cat"]
    for name, used in (("v1.5 unet", "v1.5 unet"), ("unet", "unet"), ("mid_block", "mid_block")):
        studio.library.rename(adapter_id, name)  # as a part of the models at last
        (picture,) = draw(studio, replace(QUICK, adapters={adapter_id: 1.0})).pictures
        assert [use.name for use in said(picture).adapters] == [used]
    studio.library.delete(adapter_id)


def test_a_prompt_that_is_cut_and_a_picture_that_shows_nothing_are_told(studio: Studio) -> None:
    assert "is lost" in draw(studio, replace(QUICK, prompt="a red fox " * 60)).notes[0]
    weight = studio.engine.pipeline.vae.decoder.conv_out.weight
    before = weight.detach().clone()
    grid = GridRequest(prompts=("a rocket",), seeds=(7,), steps=1)
    try:
        weight.data.fill_(torch.nan)
        notes = draw(studio, replace(QUICK, seed=5)).notes
        told = last(begin(studio.engine, grid)).notes
    finally:
        weight.data.copy_(before)
    assert any("seed 5" in note and "not finite" in note for note in notes)
    assert any("seed 7" in note and "not finite" in note for note in told)
    assert draw(studio, QUICK).notes == []


def test_metadata_can_be_left_out(studio: Studio, ids: dict[str, str]) -> None:
    teal = Image.new("RGB", (64, 64), "teal")
    told = replace(QUICK, adapters={ids["follow"]: 1.0}, control_image=teal, compare_with_base=True)
    before = set(studio.engine.outputs.folder.rglob("*.png"))
    end = draw(studio, replace(told, keep_metadata=False))
    new = set(studio.engine.outputs.folder.rglob("*.png")) - before
    assert new == {picture.path for picture in (*end.pictures, *end.base_pictures)}
    for path in new:
        with Image.open(path) as image:
            image.load()
            assert not image.info
        assert b"fox" not in path.read_bytes()
    assert np.array_equal(pixels(end.pictures[0].path), pixels(draw(studio, told).pictures[0].path))
    grid = last(begin(studio.engine, GridRequest(("a cat",), steps=1, keep_metadata=False)))
    assert (grid.manifest, grid.sheet is None) == (None, False)
    with Image.open(str(grid.sheet)) as sheet:
        assert not sheet.info


def test_every_cell_of_a_grid_is_drawn_again_from_its_own_file(studio: Studio, ids: dict[str, str]) -> None:
    request = GridRequest(
        ("a cat", "a dog"), (3, 1), (ids["fox"],), (0.5, 1.0), steps=2, negative_prompt="rain"
    )
    *events, end = begin(studio.engine, request)
    cells = [event for event in events if isinstance(event, SavedPicture)]
    assert isinstance(end, Job)
    assert end.sheet is not None
    assert end.manifest is not None
    assert cells == list(end.pictures)
    assert end.touched_layers > 0
    choices: list[dict[str, float]] = [{}, {"fox": 0.5}, {"fox": 1.0}]
    places = [(p, s, c) for p in request.prompts for s in request.seeds for c in choices]
    for cell, (prompt, seed, choice) in [*zip(cells, places, strict=True)][::4]:
        found = said(cell)
        assert (found.prompt, found.seed) == (prompt, seed)
        assert {use.name: use.strength for use in found.adapters} == choice
        adapters = {ids[name]: strength for name, strength in choice.items()}
        again = replace(QUICK, prompt=prompt, seed=seed, adapters=adapters, negative_prompt="rain")
        assert np.array_equal(pixels(draw(studio, again).pictures[0].path), pixels(cell.path))
    manifest = json.loads(end.manifest.read_text())
    files = [cell.path.relative_to(end.manifest.parent).as_posix() for cell in cells]
    assert [entry["file"] for entry in manifest["pictures"]] == files
    assert manifest["choices"] == choices
    assert pixels(end.sheet).shape[1] > 3 * 64


def test_a_grid_that_is_stopped_keeps_its_cells(studio: Studio) -> None:
    stop, cells = threading.Event(), 0
    for event in begin(studio.engine, GridRequest(("a cat",), tuple(range(50)), steps=2), stop):
        if isinstance(event, SavedPicture):
            cells += 1
            stop.set()
    assert isinstance(event, Job)
    assert (event.stopped, event.sheet) == (True, None)
    assert cells <= len(event.pictures) < 50
    assert all(cell.path.is_file() for cell in event.pictures)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompt": "x" * 2001}, "up to 2000 characters"),
        ({"prompt": "\ud83d"}, "half a character"),
        ({"seed": -1}, "seed must be from 0 to 4294967295; found -1"),
        ({"seed": True}, "seed must be a whole number; found True"),
        ({"seed": int(SEED.most), "num_images": 2}, "last seed would be beyond"),
        ({"num_images": 33}, "num_images must be from 1 to 32"),
        ({"steps": 0}, "steps must be from 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number; found nan"),
        ({"width": 65}, "multiple of 8"),
        ({"adapters": {"fox": float("inf")}}, "adapters.fox must be a number; found inf"),
        ({"adapters": {str(n): 1.0 for n in range(9)}}, "adapters are up to 8"),
        ({"control_strength": 1e9}, "control_strength must be from -10"),
        ({"prompts": ()}, "found no prompts"),
        ({"seeds": (1, 1)}, "found 1 twice among the seeds"),
        ({"adapters": ("fox",), "strengths": ()}, "found no strengths"),
        ({"with_base": False}, "neither an adapter nor the base"),
        ({"seeds": tuple(range(401))}, "up to 400"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(wrong: dict[str, Any], words: str) -> None:
    is_grid = wrong.keys() <= {"prompts", "seeds", "strengths", "with_base"} or "strengths" in wrong
    with pytest.raises(ValueError, match=words):
        replace(GridRequest(("a cat",)) if is_grid else QUICK, **wrong)


def test_a_job_goes_on_whoever_looks_and_states_are_overtaken_while_pictures_are_not() -> None:
    go_on, pictures = threading.Event(), [SavedPicture(name, Path(name), None) for name in ("a", "b-base")]

    def work(job: Job) -> None:
        for event in (Working("1"), pictures[0], Working("2"), pictures[1], Working("3")):
            if isinstance(event, Working):
                job.state = event
            else:
                job.drawn.append(event)
        go_on.wait(30)

    job = Job("request")
    job.begin(work)
    while job.state != Working("3"):
        go_on.wait(0.01)
    assert job.drawn == pictures
    assert (job.pictures, job.base_pictures) == ((pictures[0],), (pictures[1],))
    assert not job.is_done
    go_on.set()
    job.ended.result()
    assert (job.is_done, job.error, job.state, job.drawn) == (True, "", Working("3"), pictures)

    def fail(job: Job) -> None:
        raise RuntimeError("secret")

    broken = Job("request")
    broken.begin(fail)
    with pytest.raises(RuntimeError, match="secret"):
        broken.ended.result()
    assert broken.error.startswith("Something went wrong (id ")


def test_the_line_lets_one_in_at_a_time_in_the_order_they_came() -> None:
    line, inside, order = Line(), [], []
    started = [threading.Event() for _ in range(8)]

    def work(number: int) -> None:
        with line.turn(on_wait=lambda place: started[number].set()):
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
    places, entered = [line.join() for _ in range(3)], []

    def enter(number: int) -> None:
        with line.turn(ticket=places[number]):
            entered.append(number)

    late = [threading.Thread(target=enter, args=(number,)) for number in (2, 1, 0)]
    for thread in late:  # the first to join begins last
        thread.start()
    for thread in late:
        thread.join(10)
    assert entered == [0, 1, 2]
    stop = threading.Event()
    stop.set()
    with line.turn():
        with pytest.raises(Stopped), line.turn(stop):
            raise AssertionError("it must not come in")
        assert not line.is_free
    assert line.is_free


def test_a_control_image_is_found_by_its_own_hash_only(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    path = outputs.keep_control(control_image())
    assert outputs.find_control(path.stem) is not None
    assert outputs.find_control("../" + path.stem) is None
    Image.new("RGB", (8, 8)).save(path)
    assert outputs.find_control(path.stem) is None
    path.write_bytes(b"no picture")
    assert outputs.find_control(path.stem) is None

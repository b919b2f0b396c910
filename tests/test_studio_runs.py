"""Training from the studio: the command, the process, and how it stands, whoever looks."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
import torch
from photo_files import photo
from studio_trainers import StandInRuns, make_runs, request, set_fate, wait_until

from ether_diffusion.bases import open_base
from ether_diffusion.scripts.train_dreambooth import parse_flags, read_call
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.subjects import write_photos
from ether_diffusion.training.run_lock import Holder, holder_of, read_holder, write_holder
from ether_diffusion.ui.jobs import StopToken
from ether_diffusion.ui.library import Library
from ether_diffusion.ui.run_status import (
    PROCESS_NAME,
    WISH_NAME,
    LogLine,
    Wish,
    last_error,
    thinned,
    write_facts,
)
from ether_diffusion.ui.runs import Runs
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.training_request import TrainRequest, train_command

PHOTOS = (Path("photo-001.png"),)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """What is started in the background of a shell ignores interrupts, and so would the trainers."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def config_of(asked: TrainRequest, base: str = "tiny_world") -> dict[str, object]:
    """Return what train-dreambooth makes of the command, as its own parser reads it."""
    command = train_command(asked, Path("/studio/runs/ID"), base)
    assert command[:3] == [sys.executable, "-m", "ether_diffusion.scripts.train_dreambooth"]
    return dict(read_call(parse_flags(command[3:])).config.flat())


@pytest.mark.parametrize(("preset", "num_steps"), [("fast", 200), ("balanced", 800), ("faithful", 1400)])
@pytest.mark.parametrize("base", ["tiny_world", "owner/name"])
def test_every_preset_makes_a_command_that_the_trainer_accepts(
    preset: str, num_steps: int, base: str
) -> None:
    asked = TrainRequest(PHOTOS, "dog", preset=preset, seed=7)  # type: ignore[arg-type]
    found = config_of(asked, base)
    assert found["max_train_steps"] == num_steps == asked.num_steps
    assert (found["seed"], found["token"]) == (7, "sks")
    assert found["instance_prompt"] == ("a {token} dog" if base == "tiny_world" else "a photo of {token} dog")
    assert found["output_dir"] == "/studio/runs/ID/run"
    assert found["validation_prompt"]


def test_steps_outrank_the_preset_and_are_sampled_a_few_times() -> None:
    found = config_of(TrainRequest(PHOTOS, "dog", steps=40))
    assert (found["max_train_steps"], found["validation_steps"], found["checkpointing_steps"]) == (40, 10, 10)


@pytest.mark.parametrize(
    "text", ["--push_to_hub", "$(touch canary) `id`; rm -rf /", "a 'b' \"c\"", "-", "none", "ünï 🦊", "a=b"]
)
def test_what_a_visitor_types_reaches_the_trainer_as_it_is(text: str, tmp_path: Path) -> None:
    asked = TrainRequest(PHOTOS, "dog", instance_prompt=f"{text} {{token}}", validation_prompts=(text, "two"))
    found = config_of(asked)
    assert found["instance_prompt"] == f"{text} {{token}}"
    assert found["validation_prompt"] == [text, "two"]
    assert found["push_to_hub"] is False
    copied = shlex.join(train_command(asked, Path("/studio"), "tiny_world"))
    echo = subprocess.run(
        ["sh", "-c", copied.replace(shlex.quote(sys.executable), "printf '%s\\n'", 1)],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert echo.stdout.splitlines()[1:] == train_command(asked, Path("/studio"), "tiny_world")[2:]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"photos": ()}, "no photos"),
        ({"subject": " "}, "no name"),
        ({"token": "two words"}, "one word"),
        ({"instance_prompt": "a\nb"}, "control"),
        ({"subject": "fox\u202e"}, "control"),
        ({"instance_prompt": "x" * 1001}, "longer"),
        ({"name": "x" * 61}, "longer"),
        ({"preset": "best"}, "fast, balanced or faithful"),
        ({"steps": 0}, "out of range"),
        ({"steps": 10**9}, "out of range"),
        ({"seed": -1}, "out of range"),
        ({"seed": 2**32}, "out of range"),
    ],
)
def test_a_request_that_cannot_be_trained_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(TrainRequest(PHOTOS, "dog"), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"photos.*seed"):
        TrainRequest((), "dog", seed=-1)


def test_a_run_goes_from_start_to_finish(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, "fine")
    run_id = runs.start(request(runs))
    status = wait_until(runs, run_id, lambda each: each.state == "finished")
    assert (status.name, status.step, status.num_steps) == ("Fox", 5, 5)
    assert status.losses == [(step, 1 / step) for step in range(1, 6)]
    assert status.adapter == runs.root / run_id / "run"
    assert (status.can_stop, status.can_pause, status.can_resume) == (False, False, False)
    assert "a sks animal" in status.sentence
    with pytest.raises(ValueError, match="finished"):
        runs.resume(run_id)


def test_a_trainer_in_a_session_of_its_own_yields_saves_and_goes_on(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    run_id = runs.start(request(runs))
    running = wait_until(runs, run_id, lambda each: each.step == 3)
    assert (running.state, running.can_stop, running.can_pause) == ("running", True, True)
    assert running.seconds_left is not None
    holder = read_holder(runs.root / run_id / PROCESS_NAME)
    assert holder is not None
    assert os.getsid(holder.pid) == holder.pid != os.getsid(0)
    assert psutil.Process(holder.pid).nice() == min(psutil.Process().nice() + 10, 19)
    runs.pause(run_id)
    paused = wait_until(runs, run_id, lambda each: each.state == "paused")
    assert "Paused at step" in paused.sentence
    assert "Resume goes on from step" in paused.sentence
    assert (paused.can_stop, paused.can_pause, paused.can_resume) == (True, False, True)
    runs.stop(run_id)
    assert runs.status(run_id).state == "stopped"
    set_fate(runs.root / run_id, "fine")
    runs.resume(run_id)
    done = wait_until(runs, run_id, lambda each: each.state == "finished")
    assert [step for step, _ in done.losses] == [1, 2, 3, 4, 5]


def test_a_trainer_that_does_not_listen_is_killed_at_the_third_stop(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, "deaf")
    run_id = runs.start(request(runs))
    wait_until(runs, run_id, lambda each: each.step == 3)
    runs.stop(run_id)
    asked = runs.status(run_id)
    assert "Stopping" in asked.sentence
    assert (asked.can_stop, asked.can_pause) == (True, False)
    runs.stop(run_id)
    assert runs.status(run_id).state == "running"
    runs.stop(run_id)
    stopped = wait_until(runs, run_id, lambda each: each.state != "running")
    assert (stopped.state, stopped.can_resume) == ("stopped", True)


@pytest.mark.parametrize(
    ("fate", "words"),
    [("crash", "memory ran out in the run's folder"), ("traceback", "the machine \\x1b[31m is on fire")],
)
def test_a_crash_is_told_in_the_trainer_s_own_words(tmp_path: Path, fate: str, words: str) -> None:
    runs = make_runs(tmp_path, fate)
    run_id = runs.start(request(runs))
    status = wait_until(runs, run_id, lambda each: each.state not in ("starting", "running"))
    assert (status.state, status.can_resume, status.step) == ("crashed", True, 3)
    assert f"at step 3: {words}. Resume begins with" in status.sentence
    assert str(tmp_path) not in status.sentence


SERVER = """
import os, sys
from pathlib import Path
from studio_trainers import make_runs, request, wait_until
runs = make_runs(Path(sys.argv[1]))
run_id = runs.start(request(runs))
wait_until(runs, run_id, lambda each: each.step == 3)
print(run_id, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_run_outlives_its_server_and_when_killed_is_resumed_by_another(tmp_path: Path) -> None:
    folders = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    server = subprocess.run(
        [sys.executable, "-c", SERVER, str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
    )  # fmt: skip
    assert server.returncode == -signal.SIGKILL, server.stderr
    run_id = server.stdout.strip()
    runs = make_runs(tmp_path)
    status = runs.status(run_id)
    assert (status.state, status.step, status.can_stop) == ("running", 3, True)
    holder = read_holder(runs.root / run_id / PROCESS_NAME)
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)
    crashed = wait_until(runs, run_id, lambda each: each.state != "running")
    assert crashed.state == "crashed"
    assert "without a word" in crashed.sentence
    set_fate(runs.root / run_id, "fine")
    runs.resume(run_id)
    assert wait_until(make_runs(tmp_path), run_id, lambda each: each.state == "finished").step == 5


def test_one_training_runs_at_a_time_whichever_server_is_asked(tmp_path: Path) -> None:
    runs, other = make_runs(tmp_path), make_runs(tmp_path)
    first = runs.start(request(runs))
    with pytest.raises(ValueError, match="Fox is being trained, and one training runs at a time"):
        other.start(request(other, name="Dog"))
    assert [status.id for status in other.all()] == [first]
    with pytest.raises(ValueError, match="training already"):
        other.resume(first)
    with pytest.raises(ValueError, match="stop it first"):
        other.delete(first)
    other.pause(first)
    wait_until(runs, first, lambda each: each.state == "paused")
    second = other.start(request(other, name="Dog"))
    with pytest.raises(ValueError, match="Dog is being trained"):
        runs.resume(first)
    assert [status.name for status in runs.all()] == ["Dog", "Fox"] or first[:15] == second[:15]
    other.stop(second)
    wait_until(runs, second, lambda each: each.state == "stopped")


def stopped_run(tmp_path: Path) -> tuple[Runs, Path]:
    """Return a run of five steps whose trainer wrote three lines, said that it was stopped, and ended."""
    runs = make_runs(tmp_path)
    folder = runs.root / "20260101-000000-abcdef"
    (folder / "run").mkdir(parents=True)
    runs._prepare(folder, request(runs), datetime(2026, 1, 1, tzinfo=UTC))
    write_facts(folder, WISH_NAME, Wish(wanted="running"))
    lines = [{"step": step, "loss": 1.0, "images_per_second": 2.0} for step in (1, 2, 3)]
    (folder / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "output.log").write_text("stopped by SIGINT; the same command goes on from here\n")
    assert runs.status(folder.name).state == "stopped"
    return runs, folder


def test_a_number_that_another_process_has_now_is_not_the_trainer(tmp_path: Path) -> None:
    runs, folder = stopped_run(tmp_path)
    stranger = replace(holder_of(os.getpid()), started="long ago")
    write_holder(folder / PROCESS_NAME, stranger)
    write_holder(folder / "run" / ".lock", stranger)
    assert runs.status(folder.name).state == "stopped"
    runs.stop(folder.name)  # signals nobody, or this test would not go on


def test_a_process_of_another_machine_counts_while_its_files_change(tmp_path: Path) -> None:
    runs, folder = stopped_run(tmp_path)
    write_holder(folder / PROCESS_NAME, Holder(7, "elsewhere", "then"))
    assert runs.status(folder.name).state in ("starting", "running")
    with pytest.raises(ValueError, match="is trained on elsewhere"):
        runs.stop(folder.name)
    for path in (folder / "output.log", folder / "run" / "log.jsonl"):
        os.utime(path, (0, 0))
    assert runs.status(folder.name).state == "stopped"
    set_fate(folder, "fine")
    runs.resume(folder.name)
    wait_until(runs, folder.name, lambda each: each.state == "finished")


def test_a_process_of_another_machine_counts_while_it_holds_the_lock(tmp_path: Path) -> None:
    runs, folder = stopped_run(tmp_path)
    lock = folder / "run" / ".lock"
    write_holder(lock, Holder(7, "elsewhere", "then"))
    assert runs.status(folder.name).state == "stopped"
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(lock, (0, 0))
        assert runs.status(folder.name).state in ("starting", "running")
        with pytest.raises(ValueError, match="is trained on elsewhere"):
            runs.stop(folder.name)
        with pytest.raises(ValueError, match="is training already"):
            runs.resume(folder.name)
    assert runs.status(folder.name).state == "stopped"


@pytest.mark.parametrize("run_id", ["", "..", "../runs", "/etc", "x\x00", "20260101-000000-abcdee"])
def test_an_id_that_is_none_reaches_no_folder(tmp_path: Path, run_id: str) -> None:
    runs, _ = stopped_run(tmp_path)
    for call in (runs.status, runs.stop, runs.pause, runs.resume, runs.delete):
        with pytest.raises(FileNotFoundError, match="no longer in the studio"):
            call(run_id)


WHOLE = {"name": "fox", "trigger": "a sks fox", "num_steps": 5, "batch_size": 1, "command": ["x"]}
DAMAGED = [
    b"", b"{", b"[]", b'{"name": 1}', b"\xff", b'{"command": "rm -rf /"}',
    *(json.dumps({**WHOLE, "created": created}).encode() for created in (1e300, -1e18, 1e12, "now", None)),
    json.dumps({**WHOLE, "created": 1e9, "command": [1]}).encode(),
]  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED)
def test_a_run_with_a_damaged_request_is_said_to_be_and_can_be_deleted(tmp_path: Path, data: bytes) -> None:
    runs, folder = stopped_run(tmp_path)
    other = runs.root / "20260101-000000-bbbbbb"
    other.mkdir()
    (other / "request.json").write_text(json.dumps({**WHOLE, "created": 1e9}))
    (folder / "request.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"lost its request\.json.*delete it and train again"):
        runs.status(folder.name)
    assert [run.created for run in runs.all()] == [datetime.fromtimestamp(1e9, UTC)]
    runs.delete(folder.name)
    assert list(runs.root.iterdir()) == [other]


@pytest.mark.parametrize("data", [b"", b"[]", b'{"wanted": "gone"}', b'{"wanted": "paused", "asked": "x"}'])
def test_a_damaged_wish_hides_no_run(tmp_path: Path, data: bytes) -> None:
    runs, folder = stopped_run(tmp_path)
    for name in ("wish.json", "library.json", "process.json"):
        (folder / name).write_bytes(data)
    assert (runs.status(folder.name).state, runs.status(folder.name).library_id) == ("stopped", None)


def test_torn_and_foreign_lines_of_the_log_are_passed_over(tmp_path: Path) -> None:
    runs, folder = stopped_run(tmp_path)
    log = folder / "run" / "log.jsonl"
    lines = log.read_bytes() + b'[]\n{"step": "x"}\n{"step": 9, "loss": null, "images_per_second": 1}\n{"st'
    log.write_bytes(lines)
    status = runs.status(folder.name)
    assert status.step == 9
    assert 9 not in dict(status.losses)


def test_photos_that_were_not_uploaded_here_are_refused(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    asked = request(runs)
    outside = tmp_path / "outside.png"
    outside.write_bytes(asked.photos[0].read_bytes())
    link = asked.photos[0].with_name("link.png")
    link.symlink_to(outside)
    for each in (outside, link):
        with pytest.raises(ValueError, match="not uploaded here"):
            runs.start(replace(asked, photos=(each,)))
    asked.photos[0].unlink()
    with pytest.raises(ValueError, match="1 of 1 photos are gone"):
        runs.start(asked)
    assert not runs.root.exists() or not list(runs.root.iterdir())


def test_a_full_disk_at_the_start_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = make_runs(tmp_path)
    asked = request(runs)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(ValueError, match="the disk is full"):
            runs.start(asked)
    assert list(runs.root.iterdir()) == []


def test_thinning_keeps_the_mean_the_last_step_and_the_number_of_points() -> None:
    lines = [LogLine(step=step, loss=float(step), images_per_second=1.0) for step in range(1, 1401)]
    points = thinned(lines, 300)
    assert len(points) <= 300
    assert points[-1][0] == 1400
    assert sum(loss for _, loss in points) / len(points) == pytest.approx(700.5)
    assert thinned(lines[:3]) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert thinned([]) == []


def test_the_last_words_of_a_crash_are_found_among_bars_and_warnings() -> None:
    warning = ["UserWarning: ignored", "training: 3%|"]
    assert last_error([*warning, "train-dreambooth: the folder is", "train-dreambooth: empty"]) == (
        "the folder is empty"
    )
    trace = ["Traceback (most recent call last):", 'File "x.py"', "torch.cuda.OutOfMemoryError: no room"]
    assert last_error([*trace, *warning]) == "no room"
    assert last_error([*warning, "done"]) is None


def test_pictures_come_by_step_beside_those_of_the_base(tmp_path: Path) -> None:
    runs, folder = stopped_run(tmp_path)
    for name in ("base", "step-000000", "step-000100", "step-000020", "final"):
        place = folder / "run" / "samples" / name
        place.mkdir(parents=True)
        for picture in ("prompt-00_seed-0.png", "prompt-00_seed-1.png", ".aside.png.1.part"):
            (place / picture).write_bytes(b"")
    status = runs.status(folder.name)
    assert [(step, path.name[-5:]) for step, path in status.samples] == [
        (0, "0.png"), (0, "1.png"), (20, "0.png"), (20, "1.png"), (100, "0.png"), (100, "1.png"),
    ]  # fmt: skip
    assert [path.parent.name for path in status.base_samples] == ["base", "base"]


def test_the_time_left_counts_the_pictures_in_between(tmp_path: Path) -> None:
    runs, folder = stopped_run(tmp_path)
    write_facts(folder, WISH_NAME, Wish(wanted="running", began=1000.0))
    write_holder(folder / PROCESS_NAME, holder_of(os.getpid()))  # as if this test were the trainer
    assert runs.status(folder.name).seconds_left == pytest.approx(2 * 6 / 2.0)  # two steps of six images
    for step, time in ((0, 2000), (2, 2030)):
        picture = folder / "run" / "samples" / f"step-{step:06d}" / "prompt-00_seed-0.png"
        picture.parent.mkdir(parents=True)
        picture.write_bytes(b"")
        os.utime(picture, (time, time))
    assert runs.status(folder.name).seconds_left == pytest.approx(2 * 15.0)


def studio_with_trainers(tmp_path: Path) -> tuple[Studio, StandInRuns]:
    studio = Studio(tmp_path / "studio")
    studio.runs = runs = StandInRuns(studio.runs.root, studio.temp, base="tiny_world")
    return studio, runs


def test_on_an_accelerator_no_training_starts_while_pictures_are_drawn(tmp_path: Path) -> None:
    studio, runs = studio_with_trainers(tmp_path)
    asked = request(runs)
    studio.engine.device = torch.device("meta")  # any that is not the CPU
    with studio.engine.line.turn(StopToken()):
        with pytest.raises(ValueError, match="pictures are being drawn on the accelerator; wait"):
            studio.train(asked)
        assert runs.all() == []
    run_id = studio.train(asked)
    assert studio.engine.is_free
    wait_until(runs, run_id, lambda each: each.step == 3)
    runs.pause(run_id)
    wait_until(runs, run_id, lambda each: each.state == "paused")
    drawing = studio.engine.line.turn(StopToken())
    with drawing, pytest.raises(ValueError, match="pictures are being drawn"):
        studio.resume(run_id)
    studio.engine.device = torch.device("cpu")
    set_fate(runs.root / run_id, "fine")
    with studio.engine.line.turn(StopToken()):
        studio.resume(run_id)  # on the CPU it yields to what is drawn
    wait_until(runs, run_id, lambda each: each.state == "finished")


def test_what_the_page_shows_of_a_run_is_escaped_and_an_adapter_that_cannot_be_read_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("gradio", reason="the extra ui is not installed; with it, and in CI, this runs")
    from ether_diffusion.ui.tabs.train_runs import loss_points, samples_html

    studio, runs = studio_with_trainers(tmp_path)
    runs.fate = "fine"  # which leaves an adapter of nothing
    run_id = studio.train(request(runs))
    wait_until(runs, run_id, lambda each: each.state == "finished")
    assert studio.keep_finished() == []
    assert "Fox is not in the library yet" in caplog.text
    assert studio.library.cards() == []
    for folder in ("base", "step-000000", "step-000005"):
        for name in ("prompt-00_seed-0.png", "prompt-00_seed-1.png", "prompt-01_seed-0.png"):
            path = runs.root / run_id / "run" / "samples" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo())
    status = runs.status(run_id)
    status.command[:] = ["x", "--validation_prompt=a <b> fox", "--validation_prompt=two"]
    found = samples_html(status, is_small=True)
    captions = [part.split("<")[0] for part in found.split("<figcaption>")[1:]]
    assert captions == ["Base", "Step 0", "Step 5"] * 3
    assert "<b>" not in found
    assert found.index("two") < found.index("The same from other seeds")
    rows = loss_points([(step, float(step)) for step in range(1, 31)])["data"]
    assert isinstance(rows, list)
    assert [row[:2] for row in rows[:30]] == [[step, float(step)] for step in range(1, 31)]
    assert rows[-1][1] == pytest.approx(sum(range(19, 31)) / 12)


@pytest.mark.slow
def test_a_training_of_the_embedded_base_survives_pause_and_kill_and_ends_in_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real trainer; the oracle is a run of the same request that nobody disturbed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    photos = write_photos(find_concept("fox"), tmp_path / "photos")
    runs = Runs(tmp_path / "studio" / "runs", tmp_path / "studio" / "temp", base="tiny_world")
    taken = tuple(each.path for each in runs.check_photos(photos).accepted)
    asked = TrainRequest(taken, "animal", "Fox", steps=12, validation_prompts=("a sks animal",))

    run_id = runs.start(asked)
    wait_until(runs, run_id, lambda each: each.step >= 2, seconds=600)
    runs.pause(run_id)
    paused = wait_until(runs, run_id, lambda each: each.state != "running", seconds=200)
    assert paused.state == "paused"
    saved = paused.step
    assert f"goes on from step {saved}" in paused.sentence

    runs.resume(run_id)
    wait_until(runs, run_id, lambda each: each.step > saved + 1, seconds=600)
    holder = read_holder(runs.root / run_id / PROCESS_NAME)
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)
    crashed = wait_until(runs, run_id, lambda each: each.state != "running", seconds=200)
    assert (crashed.state, crashed.can_resume) == ("crashed", True)

    runs.resume(run_id)
    done = wait_until(runs, run_id, lambda each: each.state == "finished", seconds=600)
    assert [step for step, _ in done.losses] == list(range(1, 13))
    assert sorted({step for step, _ in done.samples}) == [0, 3, 6, 9, 12]
    assert done.adapter is not None

    whole = wait_until(runs, runs.start(asked), lambda each: each.state == "finished", seconds=600)
    assert whole.adapter is not None
    for name in ("adapter_model.safetensors", "samples/step-000012/prompt-00_seed-0.png"):
        assert (done.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()
    assert done.losses == whole.losses

    library = Library(tmp_path / "studio" / "adapters", runs.temp, open_base("tiny_world"))
    card = runs.adopt(run_id, library)
    assert runs.adopt(run_id, library) == card
    assert (card.name, card.trigger, card.steps, card.fits_base) == ("Fox", "a sks animal", 12, True)
    assert card.thumbnail is not None
    assert runs.status(run_id).library_id == card.id
    library.delete(card.id)
    assert runs.adopt(run_id, library).id != card.id

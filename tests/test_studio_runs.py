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
from pathlib import Path

import psutil
import pytest
from studio_trainers import make_runs, request, set_fate, wait_until

from ether_diffusion.bases import open_base
from ether_diffusion.scripts.train_dreambooth import parse_flags, read_call
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.subjects import write_photos
from ether_diffusion.training.run_lock import Holder, holder_of, read_holder, write_holder
from ether_diffusion.ui.library import Library
from ether_diffusion.ui.run_log import LogLine, last_error, thinned
from ether_diffusion.ui.run_record import PROCESS_NAME, read_wish, write_wish
from ether_diffusion.ui.runs import Runs
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


def test_a_trainer_is_in_a_session_of_its_own_and_yields(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    run_id = runs.start(request(runs))
    wait_until(runs, run_id, lambda each: each.step == 3)
    holder = read_holder(runs.root / run_id / PROCESS_NAME)
    assert holder is not None
    assert os.getsid(holder.pid) == holder.pid != os.getsid(0)
    assert psutil.Process(holder.pid).nice() == min(psutil.Process().nice() + 10, 19)
    runs.stop(run_id)
    wait_until(runs, run_id, lambda each: each.state == "stopped")


def test_stop_and_pause_save_and_resume_goes_on(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    run_id = runs.start(request(runs))
    running = wait_until(runs, run_id, lambda each: each.step == 3)
    assert (running.state, running.can_stop, running.can_pause) == ("running", True, True)
    assert running.seconds_left is not None
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
    assert f"Training ended at step 3: {words}. Resume begins with the first step." == status.sentence
    assert str(tmp_path) not in status.sentence


def test_a_killed_trainer_is_told_apart_and_resumed_by_another_server(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    run_id = runs.start(request(runs))
    wait_until(runs, run_id, lambda each: each.step == 3)
    holder = read_holder(runs.root / run_id / PROCESS_NAME)
    assert holder is not None
    other = make_runs(tmp_path)  # another server, which did not start it
    assert other.status(run_id) == runs.status(run_id)
    os.kill(holder.pid, signal.SIGKILL)
    crashed = wait_until(other, run_id, lambda each: each.state != "running")
    assert crashed.state == "crashed"
    assert "without a word" in crashed.sentence
    set_fate(other.root / run_id, "fine")
    other.resume(run_id)
    assert wait_until(runs, run_id, lambda each: each.state == "finished").step == 5


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


def test_a_killed_server_leaves_the_training_running(tmp_path: Path) -> None:
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
    runs.stop(run_id)
    wait_until(runs, run_id, lambda each: each.state == "stopped")


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


def finished_before(tmp_path: Path) -> tuple[Runs, Path]:
    """Return a run that was stopped at its third step."""
    runs = make_runs(tmp_path)
    run_id = runs.start(request(runs))
    wait_until(runs, run_id, lambda each: each.step == 3)
    runs.stop(run_id)
    wait_until(runs, run_id, lambda each: each.state == "stopped")
    folder = runs.root / run_id
    write_wish(folder, replace(read_wish(folder), wanted="running"))
    return runs, folder


def test_a_number_that_another_process_has_now_is_not_the_trainer(tmp_path: Path) -> None:
    runs, folder = finished_before(tmp_path)
    stranger = replace(holder_of(os.getpid()), started="long ago")
    write_holder(folder / PROCESS_NAME, stranger)
    write_holder(folder / "run" / ".lock", stranger)
    status = runs.status(folder.name)
    assert status.state == "stopped"
    runs.stop(folder.name)  # signals nobody, or this test would not go on


def test_a_process_of_another_machine_counts_while_its_files_change(tmp_path: Path) -> None:
    runs, folder = finished_before(tmp_path)
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
    runs, folder = finished_before(tmp_path)
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


def test_a_run_whose_folder_was_deleted_by_hand_is_said_to_be_gone(tmp_path: Path) -> None:
    runs, folder = finished_before(tmp_path)
    folder.rename(tmp_path / "elsewhere")
    for call in (runs.status, runs.stop, runs.pause, runs.resume, runs.delete):
        with pytest.raises(FileNotFoundError, match="no longer in the studio"):
            call(folder.name)
    assert runs.all() == []


@pytest.mark.parametrize("run_id", ["", "..", "../runs", "/etc", "x\x00", "20260101-000000-abcdef"])
def test_an_id_that_is_none_reaches_no_folder(tmp_path: Path, run_id: str) -> None:
    runs = make_runs(tmp_path)
    for call in (runs.status, runs.stop, runs.pause, runs.resume, runs.delete):
        with pytest.raises(FileNotFoundError, match="no longer in the studio"):
            call(run_id)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"name": 1}', b"\xff", b'{"command": "rm -rf /"}'])
def test_a_run_with_a_damaged_request_is_said_to_be_and_can_be_deleted(tmp_path: Path, data: bytes) -> None:
    runs, folder = finished_before(tmp_path)
    (folder / "request.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"lost its request\.json"):
        runs.status(folder.name)
    assert runs.all() == []
    runs.delete(folder.name)
    assert not list(runs.root.iterdir())


def test_torn_and_foreign_lines_of_the_log_and_a_missing_result_are_passed_over(tmp_path: Path) -> None:
    runs, folder = finished_before(tmp_path)
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
    for photo in (outside, link):
        with pytest.raises(ValueError, match="not uploaded here"):
            runs.start(replace(asked, photos=(photo,)))
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
    lines = [LogLine(step, float(step), 1.0) for step in range(1, 1401)]
    points = thinned(lines, 300)
    assert len(points) <= 300
    assert points[-1][0] == 1400
    assert sum(loss for _, loss in points) / len(points) == pytest.approx(700.5)
    assert thinned(lines[:3]) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert thinned([]) == []


def test_the_last_words_of_a_crash_are_found_among_bars_and_warnings() -> None:
    lines = [
        "UserWarning: ignored",
        "training: 3%|",
        "train-dreambooth: the folder is",
        "train-dreambooth: empty",
    ]
    assert last_error(lines) == "the folder is empty"
    trace = ["Traceback (most recent call last):", 'File "x.py"', "torch.cuda.OutOfMemoryError: no room"]
    assert last_error(trace) == "no room"
    assert last_error(["training: 3%|", "done"]) is None


def test_pictures_come_by_step_beside_those_of_the_base(tmp_path: Path) -> None:
    runs, folder = finished_before(tmp_path)
    samples = folder / "run" / "samples"
    for name in ("base", "step-000000", "step-000100", "step-000020", "final"):
        (samples / name).mkdir(parents=True)
        for picture in ("prompt-00_seed-0.png", "prompt-00_seed-1.png", ".aside.png.1.part"):
            (samples / name / picture).write_bytes(b"")
    status = runs.status(folder.name)
    assert [(step, path.name[-5:]) for step, path in status.samples] == [
        (0, "0.png"), (0, "1.png"), (20, "0.png"), (20, "1.png"), (100, "0.png"), (100, "1.png"),
    ]  # fmt: skip
    assert [path.parent.name for path in status.base_samples] == ["base", "base"]


def test_the_time_left_counts_the_pictures_in_between(tmp_path: Path) -> None:
    runs, folder = finished_before(tmp_path)
    run = folder / "run"
    write_wish(folder, replace(read_wish(folder), began=1000.0))
    write_holder(folder / PROCESS_NAME, holder_of(os.getpid()))  # as if this test were the trainer
    (run / "log.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": 1.0, "images_per_second": 2.0}) + "\n" for n in range(1, 4))
    )
    assert runs.status(folder.name).seconds_left == pytest.approx(2 * 6 / 2.0)  # two steps of six images
    for step, time in ((0, 2000), (2, 2030)):
        picture = run / "samples" / f"step-{step:06d}" / "prompt-00_seed-0.png"
        picture.parent.mkdir(parents=True)
        picture.write_bytes(b"")
        os.utime(picture, (time, time))
    assert runs.status(folder.name).seconds_left == pytest.approx(2 * 15.0)


@pytest.mark.slow
def test_a_training_of_the_embedded_base_survives_pause_and_kill_and_ends_in_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real trainer; the oracle is a run of the same request that nobody disturbed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    photos = write_photos(find_concept("fox"), tmp_path / "photos")
    runs = Runs(tmp_path / "studio" / "runs", tmp_path / "studio" / "temp", base="tiny_world")
    asked = TrainRequest(
        runs.check_photos(photos).photos, "animal", "Fox", steps=24, validation_prompts=("a sks animal",)
    )

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
    assert [step for step, _ in done.losses] == list(range(1, 25))
    assert sorted({step for step, _ in done.samples}) == [0, 6, 12, 18, 24]
    assert done.adapter is not None

    whole = wait_until(runs, runs.start(asked), lambda each: each.state == "finished", seconds=600)
    assert whole.adapter is not None
    for name in ("adapter_model.safetensors", "samples/step-000024/prompt-00_seed-0.png"):
        assert (done.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()
    assert done.losses == whole.losses

    library = Library(tmp_path / "studio" / "adapters", runs.temp, open_base("tiny_world"))
    card = runs.adopt(run_id, library)
    assert runs.adopt(run_id, library) == card
    assert (card.name, card.trigger, card.steps, card.fits_base) == ("Fox", "a sks animal", 24, True)
    assert card.thumbnail is not None
    assert runs.status(run_id).library_id == card.id
    library.delete(card.id)
    assert runs.adopt(run_id, library).id != card.id

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
from typing import Any, cast

import psutil
import pytest
import torch
from photo_files import photo
from studio_files import save_tiny_world_adapter
from studio_trainers import StandInRuns, make_runs, request, set_fate, wait_until

from ether_diffusion.benchmark.plan import advise, read_curves
from ether_diffusion.scripts.train_dreambooth import parse_flags, read_call
from ether_diffusion.training.run_lock import Holder, holder_of, read_holder, write_holder
from ether_diffusion.ui.run import PROCESS_NAME, Wish, last_error
from ether_diffusion.ui.runs import Runs, _command
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.train_request import TrainRequest

DOG = TrainRequest((Path("photo-001.png"),), "dog")


def told(**settings: object) -> TrainRequest:
    return replace(DOG, settings=settings)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """What is started in the background of a shell ignores interrupts, and so would the trainers."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def runs(tmp_path: Path) -> StandInRuns:
    return make_runs(tmp_path)


def config_of(asked: TrainRequest, base: str = "tiny_world") -> dict[str, object]:
    """Return what train-dreambooth makes of the command, as its own parser reads it."""
    command = asked.command(Path("/studio/runs/ID"), base)
    assert command[:3] == [sys.executable, "-m", "ether_diffusion.scripts.train_dreambooth"]
    return dict(read_call(parse_flags(command[3:])).config.flat())


@pytest.mark.parametrize(
    ("preset", "num_steps"), [("advised", None), ("fast", 200), ("balanced", 800), ("faithful", 1400)]
)
@pytest.mark.parametrize("base", ["tiny_world", "tiny_world_2", "owner/name"])
def test_every_preset_makes_a_command_that_the_trainer_accepts(
    preset: Any, num_steps: int | None, base: str
) -> None:
    found, folder = config_of(replace(told(seed=7), preset=preset), base), "/studio/runs/ID"
    if num_steps is None:
        advice = advise(1, base, read_curves())
        num_steps = cast(int, advice.options["max_train_steps"])
        assert (found["adapter"], found["learning_rate"]) == (advice.method, advice.learning_rate)
    assert (found["max_train_steps"], found["seed"], found["token"]) == (num_steps, 7, "sks")
    assert found["instance_prompt"] == ("a photo of {token} dog" if "/" in base else "a {token} dog")
    assert (found["instance_data_dir"], found["output_dir"]) == (f"{folder}/photos", f"{folder}/run")
    assert found["validation_prompt"]
    short = config_of(replace(told(max_train_steps=40), preset=preset), base)
    often = [short[name] for name in ("max_train_steps", "validation_steps", "checkpointing_steps")]
    assert often == [40, 10, 10]


@pytest.mark.parametrize(
    "text", ["--push_to_hub", "$(touch canary) `id`; rm -rf /", "a 'b' \"c\"", "-", "none", "ünï 🦊", "a=b"]
)
def test_what_a_visitor_types_reaches_the_trainer_as_it_is(text: str, tmp_path: Path) -> None:
    asked = told(instance_prompt=f"{text} {{token}}", validation_prompt=(text, "two"))
    found, command = config_of(asked), asked.command(tmp_path, "tiny_world")
    printing = shlex.join(["printf", "%s\\n", *command])
    said = subprocess.run(["sh", "-c", printing], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert said.stdout.splitlines() == command  # as one who copies the command into a shell runs it
    assert not list(tmp_path.iterdir())
    assert found["instance_prompt"] == f"{text} {{token}}"
    assert found["validation_prompt"] == [text, "two"]
    assert found["push_to_hub"] is False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"photos": ()}, "no photos"),
        ({"subject": " "}, "no name"),
        ({"settings": {"token": "two words"}}, "one word"),
        ({"settings": {"token": "Dog"}}, "is what it is"),
        ({"settings": {"instance_prompt": "a\n{token}"}}, "control"),
        ({"settings": {"instance_prompt": "a dog"}}, "no {token}"),
        ({"subject": "fox\u202e"}, "control"),
        ({"settings": {"instance_prompt": "{token} " + "x" * 1001}}, "longer"),
        ({"name": "x" * 61}, "longer"),
        ({"preset": "best"}, "'fast', 'balanced' or 'faithful'"),
        ({"settings": {"max_train_steps": 10**9}}, "up to 100000"),
        ({"settings": {"max_train_steps": 0}}, "Steps 0 is out of range; use a whole number from 1"),
        ({"settings": {"seed": -1}}, "Seed -1 is out of range; use a whole number from 0"),
        ({"settings": {"adapter": "best"}}, "Adapter 'best' is not known; use one of ether"),
        ({"settings": {"adapter": "none"}}, "choose a method"),
        ({"photos": (), "subject": ""}, r"photos.*no name"),
    ],
)
def test_a_request_that_cannot_be_trained_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(DOG, **change).config(Path("/studio/runs/ID"), "tiny_world")  # type: ignore[arg-type]


def test_a_trainer_in_a_session_of_its_own_yields_saves_and_goes_on(runs: StandInRuns) -> None:
    run_id = runs.start(request(runs))
    running = wait_until(runs, run_id, lambda each: each.step == 3)
    assert (running.state, running.can_stop, running.can_pause) == ("running", True, True)
    assert running.seconds_left is not None
    holder = read_holder(running.folder / PROCESS_NAME)
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
    set_fate(paused.folder, "fine")
    runs.resume(run_id)
    done = wait_until(runs, run_id, lambda each: each.state == "finished")
    assert (done.name, done.step, done.num_steps) == ("Fox", 5, 5)
    assert done.losses == [(step, 1 / step) for step in range(1, 6)]
    assert done.adapter == runs.root / run_id / "run"
    assert (done.can_stop, done.can_pause, done.can_resume) == (False, False, False)
    assert "a sks animal" in done.sentence
    with pytest.raises(ValueError, match="finished"):
        runs.resume(run_id)


@pytest.mark.parametrize(
    ("fate", "words"),
    [("crash", "memory ran out in the run's folder"), ("traceback", "the machine \\x1b[31m is on fire")],
)
def test_a_crash_is_told_in_the_trainer_s_own_words(runs: StandInRuns, fate: str, words: str) -> None:
    runs.fate = fate
    run_id = runs.start(request(runs))
    status = wait_until(runs, run_id, lambda each: each.state not in ("starting", "running"))
    assert (status.state, status.can_resume, status.step) == ("crashed", True, 3)
    assert f"at step 3: {words}. Resume begins with" in status.sentence
    assert str(runs.root.parent) not in status.sentence


SERVER = """
import os, sys
from pathlib import Path
from studio_files import save_tiny_world_adapter
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
    holder = read_holder(status.folder / PROCESS_NAME)
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)
    crashed = wait_until(runs, run_id, lambda each: each.state != "running")
    assert crashed.state == "crashed"
    assert "without a word" in crashed.sentence
    set_fate(crashed.folder, "fine")
    runs.resume(run_id)
    assert wait_until(make_runs(tmp_path), run_id, lambda each: each.state == "finished").step == 5


def test_a_second_run_waits_for_the_end_of_the_first_whichever_server_is_asked(
    runs: StandInRuns, tmp_path: Path
) -> None:
    other = make_runs(tmp_path)
    first = runs.start(request(runs))
    second = other.start(request(other, name="Dog"))
    waiting = other.status(second)
    assert (waiting.state, waiting.can_stop, waiting.can_pause, waiting.can_resume) == (
        "queued", True, False, False,
    )  # fmt: skip
    assert "begins when the training in progress ends" in waiting.sentence
    with pytest.raises(ValueError, match="training already"):
        other.resume(first)
    with pytest.raises(ValueError, match="stop it first"):
        other.delete(first)
    other.pause(first)
    wait_until(runs, first, lambda each: each.state == "paused")
    wait_until(runs, second, lambda each: each.state == "running")
    runs.resume(first)
    assert runs.status(first).state == "queued"
    runs.stop(first)
    assert runs.status(first).state == "stopped"
    other.stop(second)
    wait_until(runs, second, lambda each: each.state == "stopped")


def test_what_waits_begins_although_the_server_that_started_the_first_is_gone(tmp_path: Path) -> None:
    gone, runs = make_runs(tmp_path), make_runs(tmp_path)
    gone.advance = lambda: None  # type: ignore[method-assign]
    first = gone.start(request(gone))
    second = runs.start(request(runs, name="Dog"))
    runs.stop(first)
    wait_until(runs, first, lambda each: each.state == "stopped")
    runs.advance()
    assert runs.status(second).process is not None
    runs.stop(second)
    wait_until(runs, second, lambda each: each.state == "stopped")


def test_one_command_trains_several_runs_each_as_its_own_command_says(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", tmp_path / "temp", base="tiny_world")
    folders = [tmp_path / "runs" / f"2026010{number}-000000-abcdef" for number in (1, 2)]
    for folder, name in zip(folders, ("Fox", "Dog"), strict=True):
        runs._prepare(folder, request(runs, name=name, num_steps=7), datetime.now(UTC))
    each = [runs.status(folder.name) for folder in folders]
    alone = [read_call(parse_flags(run.command[3:])).config for run in each]
    together = read_call(parse_flags(_command(each)[3:]))
    assert list(together.configs) == alone
    assert together.ignored == ()


@pytest.mark.slow
def test_runs_that_wait_are_trained_together_and_one_that_is_stopped_stops_no_other(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "studio" / "runs", tmp_path / "studio" / "temp", base="tiny_world")
    first, short, long, other = (
        runs.start(request(runs, num_steps=num_steps, name=name))
        for num_steps, name in ((1, "Fox"), (2, "Dog"), (2000, "Cat"), (2000, "Owl"))
    )
    assert [run.state for run in runs.all()].count("queued") == 3
    wait_until(runs, first, lambda each: each.state == "finished", seconds=600)
    together = wait_until(runs, short, lambda each: each.state == "finished", seconds=600)
    assert together.wish.together
    trainer = read_holder(together.folder / "process.json")
    assert [runs.status(each).process for each in (long, other)] == [trainer, trainer]
    runs.stop(other)
    wait_until(runs, other, lambda each: each.state == "stopped", seconds=600)
    onward = wait_until(
        runs, long, lambda each: each.state == "running" and not each.wish.together, seconds=600
    )
    assert onward.process not in (None, trainer)
    assert onward.step > 0
    runs.stop(long)
    wait_until(runs, long, lambda each: each.state == "stopped", seconds=600)


@pytest.fixture
def stopped(runs: StandInRuns) -> Path:
    """A run of five steps whose trainer wrote three lines, said that it was stopped, and ended."""
    folder = runs.root / "20260101-000000-abcdef"
    (folder / "run").mkdir(parents=True)
    runs._prepare(folder, request(runs), datetime(2026, 1, 1, tzinfo=UTC))
    Wish().write(folder)
    write_log(folder, [1.0, 1.0, 1.0])
    (folder / "output.log").write_text("stopped by SIGINT; the same command goes on from here\n")
    assert runs.status(folder.name).state == "stopped"
    return folder


def write_log(folder: Path, losses: list[float]) -> None:
    lines = [{"step": step, "loss": loss, "images_per_second": 2.0} for step, loss in enumerate(losses, 1)]
    (folder / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_number_that_another_process_has_now_is_not_the_trainer(runs: StandInRuns, stopped: Path) -> None:
    stranger = replace(holder_of(os.getpid()), started="long ago")
    write_holder(stopped / PROCESS_NAME, stranger)
    write_holder(stopped / "run" / ".lock", stranger)
    assert runs.status(stopped.name).state == "stopped"
    runs.stop(stopped.name)  # signals nobody, or this test would not go on


def test_a_process_of_another_machine_counts_while_its_files_change_or_it_holds_the_lock(
    runs: StandInRuns, stopped: Path
) -> None:
    def counts() -> bool:
        if runs.status(stopped.name).state not in ("starting", "running"):
            return False
        with pytest.raises(ValueError, match="is trained on elsewhere"):
            runs.stop(stopped.name)
        with pytest.raises(ValueError, match="is training already"):
            runs.resume(stopped.name)
        return True

    elsewhere, lock = Holder(7, "elsewhere", "then"), stopped / "run" / ".lock"
    write_holder(stopped / PROCESS_NAME, elsewhere)
    assert counts()
    for path in (stopped / "output.log", stopped / "run" / "log.jsonl"):
        os.utime(path, (0, 0))
    assert not counts()
    write_holder(lock, elsewhere)
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(lock, (0, 0))
        assert counts()
    assert not counts()
    set_fate(stopped, "fine")
    runs.resume(stopped.name)
    wait_until(runs, stopped.name, lambda each: each.state == "finished")


def test_an_id_that_is_none_reaches_no_folder(runs: StandInRuns, stopped: Path) -> None:
    for run_id in ("", "..", "../runs", "/etc", "x\x00", "20260101-000000-abcdee"):
        for call in (runs.status, runs.stop, runs.pause, runs.resume, runs.delete):
            with pytest.raises(FileNotFoundError, match="no longer in the studio"):
                call(run_id)


WHOLE = {"name": "fox", "trigger": "a sks fox", "num_steps": 5, "batch_size": 1, "command": ["x"]}
DAMAGED = [
    b"", b"{", b"[]", b'{"name": 1}', b"\xff", b'{"command": "rm -rf /"}',
    *(json.dumps({**WHOLE, "created": created}).encode() for created in (1e300, -1e18, 1e12, "now", None)),
    json.dumps({**WHOLE, "created": 1e9, "command": [1]}).encode(),
]  # fmt: skip


def test_a_run_with_a_damaged_request_is_said_to_be_and_can_be_deleted(
    runs: StandInRuns, stopped: Path
) -> None:
    other = runs.root / "20260101-000000-bbbbbb"
    other.mkdir()
    (other / "request.json").write_text(json.dumps({**WHOLE, "created": 1e9}))
    for data in DAMAGED:
        (stopped / "request.json").write_bytes(data)
        with pytest.raises(ValueError, match=r"lost its request\.json.*delete it and train again"):
            runs.status(stopped.name)
        assert [run.created for run in runs.all()] == [datetime.fromtimestamp(1e9, UTC)]
    runs.delete(stopped.name)
    assert list(runs.root.iterdir()) == [other]


def test_damaged_wishes_and_torn_lines_of_the_log_hide_no_run(runs: StandInRuns, stopped: Path) -> None:
    for data in (b"", b"[]", b'{"wanted": "gone"}', b'{"wanted": "paused", "asked": "x"}'):
        for name in ("wish.json", "library.json", "process.json"):
            (stopped / name).write_bytes(data)
        status = runs.status(stopped.name)
        assert (status.state, status.library_id) == ("stopped", None)
    with (stopped / "run" / "log.jsonl").open("ab") as log:
        log.write(b'[]\n{"step": "x"}\n{"step": 9, "loss": null, "images_per_second": 1}\n{"st')
    status = runs.status(stopped.name)
    assert (status.step, status.losses) == (9, [(step, 1.0) for step in (1, 2, 3)])


def test_photos_that_were_not_uploaded_here_and_a_full_disk_leave_no_run(
    runs: StandInRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(runs)
    outside = tmp_path / "outside.png"
    outside.write_bytes(asked.photos[0].read_bytes())
    link = asked.photos[0].with_name("link.png")
    link.symlink_to(outside)
    for each in (outside, link):
        with pytest.raises(ValueError, match="not uploaded here"):
            runs.start(replace(asked, photos=(each,)))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(ValueError, match="the disk is full"):
            runs.start(asked)
    asked.photos[0].unlink()
    with pytest.raises(ValueError, match="1 of 1 photos are gone"):
        runs.start(asked)
    assert not list(runs.root.iterdir())


def test_a_long_curve_is_thinned_and_the_last_words_of_a_crash_are_found(
    runs: StandInRuns, stopped: Path
) -> None:
    write_log(stopped, [float(step) for step in range(1, 1401)])
    points = runs.status(stopped.name).losses
    assert len(points) <= 300
    assert points[-1][0] == 1400
    assert sum(loss for _, loss in points) / len(points) == pytest.approx(700.5)
    warning = ["UserWarning: ignored", "training: 3%|"]
    ours = [*warning, "train-dreambooth: the folder is", "train-dreambooth: empty"]
    trace = ["Traceback (most recent call last):", 'File "x.py"', "torch.cuda.OutOfMemoryError: no room"]
    found = [last_error(lines, Path()) for lines in (ours, [*trace, *warning], [*warning, "done"])]
    assert found == ["the folder is empty", "no room", None]


def test_pictures_come_by_step_beside_those_of_the_base_and_tell_the_time_left(
    runs: StandInRuns, stopped: Path
) -> None:
    Wish(began=1000.0).write(stopped)
    write_holder(stopped / PROCESS_NAME, holder_of(os.getpid()))  # as if this test were the trainer
    assert runs.status(stopped.name).seconds_left == pytest.approx(2 * 6 / 2.0)  # two steps of six images
    times = {"base": 0, "step-000000": 2000, "step-000100": 5000, "step-000020": 2600, "final": 0}
    for folder, time in times.items():
        place = stopped / "run" / "samples" / folder
        place.mkdir(parents=True)
        for picture in ("prompt-00_seed-0.png", "prompt-00_seed-1.png", ".aside.png.1.part"):
            (place / picture).write_bytes(b"")
            os.utime(place / picture, (time, time))
    status = runs.status(stopped.name)
    assert [(step, path.name[-5:]) for step, path in status.samples] == [
        (0, "0.png"), (0, "1.png"), (20, "0.png"), (20, "1.png"), (100, "0.png"), (100, "1.png"),
    ]  # fmt: skip
    assert [path.parent.name for path in status.base_samples] == ["base", "base"]
    assert status.seconds_left == pytest.approx(2 * 30.0)


def test_on_an_accelerator_no_training_starts_while_pictures_are_drawn(tmp_path: Path) -> None:
    studio = Studio(tmp_path / "studio", base="tiny_world")
    turn = studio.runs.turn
    studio.runs = runs = make_runs(tmp_path)
    runs.turn = turn
    asked, engine = request(runs), studio.engine
    engine.device = torch.device("meta")  # any that is not the CPU
    with engine.line.turn():
        with pytest.raises(ValueError, match="pictures are being drawn on the accelerator; wait"):
            studio.runs.start(asked)
        assert runs.all() == []
    run_id = studio.runs.start(asked)
    assert engine.line.is_free
    wait_until(runs, run_id, lambda each: each.step == 3)
    runs.pause(run_id)
    paused = wait_until(runs, run_id, lambda each: each.state == "paused")
    with engine.line.turn():
        for act in (runs.resume, lambda run_id: runs.train_on(run_id, paused.saved_step)):
            with pytest.raises(ValueError, match="pictures are being drawn"):
                act(run_id)
    engine.device = torch.device("cpu")
    set_fate(paused.folder, "fine")
    with engine.line.turn():
        studio.runs.resume(run_id)  # on the CPU it yields to what is drawn
    wait_until(runs, run_id, lambda each: each.state == "finished")


def test_what_the_page_shows_of_a_run_is_escaped_and_an_adapter_that_cannot_be_read_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("gradio", reason="the extra ui is not installed; with it, and in CI, this runs")
    from ether_diffusion.ui.tabs.trainings import loss_points, samples_html

    studio = Studio(tmp_path / "studio", base="tiny_world")
    studio.runs = runs = make_runs(tmp_path, "fine")  # which leaves an adapter of nothing
    run_id = studio.runs.start(request(runs))
    done = wait_until(runs, run_id, lambda each: each.state == "finished")
    assert studio.keep_finished() == []
    assert "Fox is not in the library yet" in caplog.text
    assert studio.library.cards() == []
    for folder in ("base", "step-000000", "step-000005"):
        for name in ("prompt-00_seed-0.png", "prompt-00_seed-1.png", "prompt-01_seed-0.png"):
            path = done.output / "samples" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo())
    status = runs.status(run_id)
    status.command[:] = ["x", "--validation_prompt=a <b> fox", "--validation_prompt=two"]
    found = samples_html(status)
    captions = [part.split("<")[0] for part in found.split("<figcaption>")[1:]]
    assert captions == ["Base", "Step 5"] * 3  # step 0 draws what the base does
    assert "<b>" not in found
    assert found.index("two") < found.index("The same from other seeds")
    rows = loss_points([(step, float(step)) for step in range(1, 31)])["data"]
    assert isinstance(rows, list)
    assert [row[:2] for row in rows[:30]] == [[step, float(step)] for step in range(1, 31)]
    assert rows[-1][1] == pytest.approx(sum(range(19, 31)) / 12)


def test_what_a_finished_run_made_comes_into_the_library_once_unless_it_was_deleted(tmp_path: Path) -> None:
    studio = Studio(tmp_path / "studio", base="tiny_world")
    studio.runs = runs = make_runs(tmp_path, "fine")
    run_id = studio.runs.start(request(runs))
    output = wait_until(runs, run_id, lambda each: each.state == "finished").output
    save_tiny_world_adapter(output)
    (output / "samples" / "final").mkdir(parents=True)
    (output / "samples" / "final" / "prompt-00_seed-0.png").write_bytes(photo())
    (adapter_id,) = studio.keep_finished()
    card = studio.library.card(adapter_id)
    assert (card.name, card.trigger, card.steps, card.fits_base) == ("Fox", "a sks animal", 200, True)
    assert card.thumbnail is not None
    assert studio.keep_finished() == []
    assert (runs.adopt(run_id, studio.library), runs.status(run_id).library_id) == (card, card.id)
    studio.library.delete(card.id)
    assert studio.keep_finished() == []
    assert runs.adopt(run_id, studio.library).id != card.id


@pytest.mark.parametrize(
    ("best", "fidelity", "verdict", "words"),
    [
        (50, 0.56, "Learned", "0.56 at step 50 (the base 0.50), drift of other pictures 0.10"),
        (50, 0.49, "Not learned", "for photographs of real things, change the base"),
        (None, 0.9, "Not learned", "no step kept the base's other pictures and the prompts"),
    ],
)
def test_what_was_measured_of_a_finished_run_is_its_verdict(
    runs: StandInRuns, best: int | None, fidelity: float, verdict: str, words: str
) -> None:
    runs.fate = "end"
    run_id = runs.start(request(runs))
    status = wait_until(runs, run_id, lambda each: each.state == "finished")
    assert status.verdict == ("", "")
    points = [
        {"step": step, "prompt": {"mean": 0.8}, "fidelity": {"mean": likeness}, "drift": {"mean": 0.1}}
        for step, likeness in ((0, 0.5), (50, fidelity))
    ]
    report = {"format": 1, "settings": {}, "curve": points, "best_step": best, "stopped": None}
    (status.output / "evaluation.json").write_text(json.dumps(report))
    run = runs.status(run_id)
    run.command[:] = ["x", "--pretrained_model_name_or_path=tiny_world"]
    found, sentence = run.verdict
    assert (found, words in sentence) == (verdict, True)
    from ether_diffusion.ui.tabs.trainings import status_html

    assert found in status_html(runs.status(run_id))


def test_captions_lie_beside_their_photos_where_the_trainer_reads_them(runs: StandInRuns) -> None:
    run_id = runs.start(replace(request(runs), captions=("a {token} animal on a beach",)))
    assert (runs.root / run_id / "photos" / "photo-001.txt").read_text() == "a {token} animal on a beach"
    runs.stop(run_id)


def test_what_a_stopped_run_saved_can_be_used(runs: StandInRuns, stopped: Path, tmp_path: Path) -> None:
    assert not runs.status(stopped.name).can_use
    save_tiny_world_adapter(stopped / "run" / "checkpoint-3")
    (stopped / "run" / "checkpoint-3" / "manifest.json").write_text("{}")
    library, run = Studio(tmp_path / "other", base="tiny_world").library, runs.status(stopped.name)
    assert (run.can_use, run.saved_step) == (True, 3)
    cards = [runs.adopt(run.id, library) for _ in range(2)]
    assert [card.name for card in cards] == [f"Fox, step {run.saved_step}"] * 2
    assert len(library.cards()) == 1
    assert runs.status(run.id).library_id is None  # what it ends with will be another


def test_any_step_that_was_saved_is_used_and_trained_on_from(
    runs: StandInRuns, stopped: Path, tmp_path: Path
) -> None:
    for step in (1, 3):
        save_tiny_world_adapter(stopped / "run" / f"checkpoint-{step}")
        (stopped / "run" / f"checkpoint-{step}" / "manifest.json").write_text("{}")
    library, run = Studio(tmp_path / "other", base="tiny_world").library, runs.status(stopped.name)
    assert run.saved_steps == [1, 3]
    assert runs.adopt(run.id, library, 1).name == "Fox, step 1"
    for change in (runs.train_on, lambda run_id, step: runs.adopt(run_id, library, step)):
        with pytest.raises(
            ValueError, match="nothing was saved at step 2; choose one of those that were: 1, 3"
        ):
            change(run.id, 2)
    runs.fate = "wait"
    new = runs.status(runs.train_on(run.id, 1))
    assert (new.name, new.num_steps) == ("Fox, on from step 1", 1 + run.num_steps)
    assert new.command[-2:] == [f"--max_train_steps={new.num_steps}", "--allow_changes"]
    assert not any(str(stopped) in word for word in new.command)
    assert [path.name for path in new.output.glob("checkpoint-*")] == ["checkpoint-1"]
    assert sorted(path.name for path in (new.folder / "photos").iterdir()) == sorted(
        path.name for path in (stopped / "photos").iterdir()
    )
    assert runs.status(stopped.name).saved_steps == [1, 3]  # the run that it goes on from is as it was
    for _ in range(3):
        runs.stop(new.id)


def test_the_pictures_of_its_class_are_counted_before_its_steps(runs: StandInRuns) -> None:
    run = runs.status(run_id := runs.start(request(runs)))
    run.command.append("--class_data_dir=class_images")
    (run.folder / "class_images").mkdir()
    for number in range(50):
        (run.folder / "class_images" / f"{number}.png").touch()
    vars(run)["state"] = "starting"
    assert run.done == 50 / 200
    assert "50 of 200" in run.sentence
    for _ in range(3):
        runs.stop(run_id)

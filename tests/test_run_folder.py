"""The folder of a run: who may use it, what counts as the same run, and a log without a seam."""

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from training_runs import contents

from ether_diffusion.strict_json import Json
from ether_diffusion.training.run_folder import RunFolder
from ether_diffusion.training.run_lock import LOCK_NAME, process_start

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
SETTINGS: dict[str, Json] = {"learning_rate": 6e-3, "max_train_steps": 800, "validation_steps": 100}
PHOTOS = {"photos": {"a.jpg": "1", "b.jpg": "2"}}

HOLDING = """
import os, sys, time
from pathlib import Path
from ether_diffusion.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1]), {}, {}, allow_changes=False):
    print("held", flush=True)
    sys.stdin.read()
"""


def folder(path: Path, *, allow_changes: bool = False, **changes: Json) -> RunFolder:
    return RunFolder(path, SETTINGS | changes, PHOTOS, allow_changes=allow_changes)


def begin(path: Path, *, allow_changes: bool = False, **changes: Json) -> bool:
    """Enter and leave a folder; say whether the run was new."""
    is_new = not (path / "run.json").exists()
    with folder(path, allow_changes=allow_changes, **changes):
        assert (path / "run.json").exists()
    return is_new


@contextmanager
def other_process(path: Path, code: str = HOLDING) -> Iterator["subprocess.Popen[str]"]:
    """A process that wants the folder, and holds it until it is ended."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        env=ENVIRONMENT,
        text=True,
        start_new_session=True,
        **pipes,  # type: ignore[call-overload]
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def holds(process: "subprocess.Popen[str]") -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == "held\n"


def test_a_new_folder_says_what_the_run_is_and_the_same_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    assert begin(path)
    written = json.loads((path / "run.json").read_text())
    assert (written["settings"], written["fingerprints"]) == (SETTINGS, PHOTOS)
    before = contents(path)
    assert not begin(path)
    assert contents(path) == before


def test_a_second_process_is_refused_by_number_and_host_while_the_first_lives(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        assert holds(process)
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on {socket.gethostname()}"):
            begin(tmp_path, allow_changes=True)
        assert contents(tmp_path) == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not begin(tmp_path, allow_changes=True)
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_process_cannot_take_its_own_folder_twice_and_gives_it_back_after_an_error(tmp_path: Path) -> None:
    with folder(tmp_path), pytest.raises(ValueError, match="in use by process"):
        begin(tmp_path)
    with pytest.raises(KeyError), folder(tmp_path):
        raise KeyError
    assert not begin(tmp_path)


def lock(path: Path, **changes: Json) -> None:
    own = {"pid": os.getpid(), "host": socket.gethostname(), "started": process_start(os.getpid())}
    (path / LOCK_NAME).write_text(json.dumps(own | changes))


@pytest.mark.parametrize("holder", [{}, {"pid": 7, "host": "elsewhere"}], ids=["a reused number", "a host"])
def test_a_lock_that_a_killed_process_left_holds_nobody_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, holder: dict[str, Json]
) -> None:
    lock(tmp_path, started="long ago", **holder)
    with caplog.at_level(logging.INFO), folder(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert f"from process {holder.get('pid', os.getpid())}, which is gone" in caplog.text
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_lock_that_the_system_says_is_held_is_not_taken_over_whoever_it_names(tmp_path: Path) -> None:
    lock(tmp_path, pid=7, host="elsewhere", started="long ago", since="Monday")
    before = contents(tmp_path)
    with (tmp_path / LOCK_NAME).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a process in another container holds it
        with pytest.raises(ValueError, match="in use by process 7 on elsewhere since Monday; wait for it"):
            begin(tmp_path)
        assert contents(tmp_path) == before


def test_a_process_of_another_pid_namespace_does_not_take_over_from_a_living_one(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-Urpf", "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("runs where a user may make namespaces of processes")
    with other_process(tmp_path) as process:
        assert holds(process)
        second = subprocess.run(
            ["unshare", "-Urpf", "--mount-proc", sys.executable, "-c", HOLDING, str(tmp_path)],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 1
        assert f"in use by process {process.pid} on" in second.stderr
        assert process.poll() is None


def test_a_worker_that_outlives_its_killed_parent_does_not_hold_the_folder(tmp_path: Path) -> None:
    forking = HOLDING.replace("print(", "os.fork() and print(").replace("sys.stdin.read()", "time.sleep(60)")
    with other_process(tmp_path, forking) as process:
        assert holds(process)
        process.kill()
        process.wait()
        assert not begin(tmp_path, allow_changes=True)


def test_of_many_processes_at_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    lock(tmp_path, started="long ago")
    with other_process(tmp_path) as one, other_process(tmp_path) as two, other_process(tmp_path) as three:
        assert sum(map(holds, (one, two, three))) == 1


@pytest.mark.parametrize("kind", ["link", "link to nothing", "folder", "FIFO"])
def test_a_lock_that_is_no_file_is_refused_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "run" / LOCK_NAME, tmp_path / "other"
    path.parent.mkdir()
    if kind.startswith("link"):
        path.symlink_to(other)
    if kind == "link":
        other.write_text("mine")
    if kind == "folder":
        path.mkdir()
    if kind == "FIFO":
        os.mkfifo(path)
    with pytest.raises(ValueError, match=r"run/\.lock is no plain file, .*; delete it"):
        begin(tmp_path / "run")
    assert contents(tmp_path) == ({"other": b"mine", "run/.lock": b"mine"} if kind == "link" else {})


def test_a_folder_that_was_replaced_meanwhile_keeps_the_lock_of_its_new_holder(tmp_path: Path) -> None:
    with folder(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "before")
        begin(tmp_path / "run")
        lock(tmp_path / "run", pid=7)
    assert (tmp_path / "run" / LOCK_NAME).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "1", "host": "x", "started": "y"}'])
def test_a_lock_that_a_power_cut_left_unwritten_holds_nobody_off(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_NAME).write_text(text)
    assert begin(tmp_path)


def test_every_difference_is_in_the_refusal(tmp_path: Path) -> None:
    begin(tmp_path)
    before = contents(tmp_path)
    other = RunFolder(
        tmp_path,
        SETTINGS | {"learning_rate": 1e-4, "max_train_steps": 10, "validation_steps": 5},
        {"photos": {"b.jpg": "3", "c.jpg": "4"}},
        allow_changes=False,
    )
    with pytest.raises(ValueError, match="begun otherwise") as refusal:
        other.__enter__()
    lines = str(refusal.value).splitlines()
    assert [" ".join(line.split()) for line in lines[1:-1]] == [
        "learning_rate 0.006 -> 0.0001",
        "max_train_steps 800 -> 10",
        "photos: new c.jpg; gone a.jpg; changed b.jpg",
    ]
    assert "--allow_changes" in lines[-1]
    assert contents(tmp_path) == before


def test_what_does_not_change_the_training_and_what_is_allowed_is_said_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin(tmp_path, report_to=None)
    changes: dict[str, Json] = {"max_train_steps": 900, "validation_steps": 5, "report_to": "wandb"}
    changes |= {"newer_option": 1}
    with caplog.at_level(logging.INFO):
        assert not begin(tmp_path, **changes)  # type: ignore[arg-type]
        assert not begin(tmp_path, allow_changes=True, learning_rate=1e-4, **changes)
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    for name, value in (changes | {"learning_rate": 1e-4}).items():
        assert name in caplog.text
        assert settings[name] == value


def test_no_number_of_steps_means_the_default(tmp_path: Path) -> None:
    begin(tmp_path, max_train_steps=None)
    with pytest.raises(ValueError, match=r"max_train_steps *None -> 700"):
        begin(tmp_path, max_train_steps=700)
    assert not begin(tmp_path, max_train_steps=900)


def test_a_step_may_be_split_otherwise_and_not_be_of_other_size(tmp_path: Path) -> None:
    begin(tmp_path, train_batch_size=4, gradient_accumulation_steps=1, num_processes=1)
    split: dict[str, Json] = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert not begin(tmp_path, num_processes=2, **split)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_processes *2 -> 1") as refusal:
        begin(tmp_path, num_processes=1, **split)  # type: ignore[arg-type]
    assert "train_batch_size" not in str(refusal.value)


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors, which belong to no run"):
        begin(tmp_path, allow_changes=True)
    assert contents(tmp_path) == {"adapter_model.safetensors": b"precious"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1, "settings": {}}', "newer"])
def test_a_run_file_that_is_damaged_or_newer_is_refused(tmp_path: Path, text: str) -> None:
    whole = '{"format": 2, "settings": {}, "fingerprints": {}}'
    (tmp_path / "run.json").write_text(whole if text == "newer" else text)
    with pytest.raises(ValueError, match="format is 2; .* update" if text == "newer" else r"run\.json"):
        begin(tmp_path)
    assert contents(tmp_path).keys() == {"run.json"}


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "log.jsonl").read_text().splitlines()]


def test_a_line_is_in_the_log_at_once_and_a_torn_one_does_not_swallow_the_next(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    with folder(tmp_path) as run:
        run.log({"step": 2, "loss": 0.5})
        assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2, "loss": 0.5}\n'


def test_rewinding_drops_later_steps_and_a_torn_line_and_else_leaves_the_file(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with folder(tmp_path) as run:
        run.rewind(0)
        assert not log.exists()
        for step in range(6):
            run.log({"step": step})
        before = log.stat()
        run.rewind(5)
        assert (before.st_ino, before.st_mtime_ns) == (log.stat().st_ino, log.stat().st_mtime_ns)
    with log.open("a") as file:
        file.write('{"step": 6, "lo')
    with folder(tmp_path) as run:
        run.rewind(3)
        assert steps(tmp_path) == [0, 1, 2, 3]
        run.log({"step": 4})
    assert steps(tmp_path) == [0, 1, 2, 3, 4]

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
from contextlib import contextmanager
from pathlib import Path

import pytest

from ether_diffusion.strict_json import Json
from ether_diffusion.training.run_folder import RunFolder
from ether_diffusion.training.run_lock import LOCK_NAME, process_start

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, Json] = {"learning_rate": 6e-3, "max_train_steps": 800, "validation_steps": 100}
PHOTOS = {"photos": {"a.jpg": "1", "b.jpg": "2"}}

HOLDING = """
import sys, time
from pathlib import Path
from ether_diffusion.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1]), {}, {}, allow_changes=False):
    print("held", flush=True)
    time.sleep(60)
"""


def folder(path: Path, *, allow_changes: bool = False, **changes: Json) -> RunFolder:
    return RunFolder(path, SETTINGS | changes, PHOTOS, allow_changes=allow_changes)


@contextmanager
def other_process(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the folder, until it is ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(path)], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_new_folder_is_made_and_holds_what_the_run_is(tmp_path: Path) -> None:
    with folder(tmp_path / "deep" / "run") as run:
        assert run.is_new
    written = json.loads((tmp_path / "deep" / "run" / "run.json").read_text())
    assert (written["settings"], written["fingerprints"]) == (SETTINGS, PHOTOS)


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    with folder(tmp_path):
        pass
    before = contents(tmp_path)
    with folder(tmp_path) as run:
        assert not run.is_new
    assert contents(tmp_path) == before


def test_a_second_process_is_refused_by_number_and_host_while_the_first_lives(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on {socket.gethostname()}"):
            RunFolder(tmp_path, {}, {}, allow_changes=True).__enter__()
        assert contents(tmp_path) == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        with RunFolder(tmp_path, {}, {}, allow_changes=False) as run:
            assert not run.is_new
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_process_cannot_take_its_own_folder_twice(tmp_path: Path) -> None:
    with folder(tmp_path), pytest.raises(ValueError, match="in use by process"):
        folder(tmp_path).__enter__()


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), folder(tmp_path):
        raise KeyError
    with folder(tmp_path):
        pass


def lock(path: Path, **changes: Json) -> None:
    own = {"pid": os.getpid(), "host": socket.gethostname(), "started": process_start(os.getpid())}
    (path / LOCK_NAME).write_text(json.dumps(own | changes))


def test_a_number_that_another_process_has_now_is_not_the_holder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock(tmp_path, started="long ago")
    with caplog.at_level(logging.INFO), folder(tmp_path):
        pass
    assert f"from process {os.getpid()}, which is gone" in caplog.text


def test_a_lock_that_a_killed_process_of_another_host_left_holds_nobody_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock(tmp_path, pid=7, host="elsewhere", started="long ago")
    with caplog.at_level(logging.INFO), folder(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert "from process 7, which is gone" in caplog.text
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_lock_that_the_system_says_is_held_is_not_taken_over_whoever_it_names(tmp_path: Path) -> None:
    lock(tmp_path, pid=7, host="elsewhere", started="long ago", since="Monday")
    before = contents(tmp_path)
    with (tmp_path / LOCK_NAME).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a process in another container holds it
        with pytest.raises(ValueError, match="in use by process 7 on elsewhere since Monday; wait for it"):
            folder(tmp_path).__enter__()
        assert contents(tmp_path) == before


def test_a_process_of_another_pid_namespace_does_not_take_over_from_a_living_one(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-Urpf", "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("runs where a user may make namespaces of processes")
    with other_process(tmp_path) as process:
        taking = HOLDING.replace("time.sleep(60)", "")
        second = subprocess.run(
            ["unshare", "-Urpf", "--mount-proc", sys.executable, "-c", taking, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 1
        assert f"in use by process {process.pid} on" in second.stderr
        assert process.poll() is None


def test_a_worker_that_outlives_its_killed_parent_does_not_hold_the_folder(tmp_path: Path) -> None:
    forking = HOLDING.replace("    print(", "    worker = os.fork()\n    print(").replace(
        "import sys", "import os, sys"
    )
    forking = forking.replace('print("held"', 'worker and print("held"')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", forking, str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            process.kill()
            process.wait()
            with folder(tmp_path, allow_changes=True):
                pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the worker, which still sleeps


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
        folder(tmp_path / "run").__enter__()
    assert contents(tmp_path) == ({"other": b"mine", "run/.lock": b"mine"} if kind == "link" else {})


def test_a_folder_that_was_replaced_meanwhile_keeps_the_lock_of_its_new_holder(tmp_path: Path) -> None:
    with folder(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "before")
        with folder(tmp_path / "run"):
            pass
        lock(tmp_path / "run", pid=7)
    assert (tmp_path / "run" / LOCK_NAME).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "1", "host": "x", "started": "y"}'])
def test_a_lock_that_a_power_cut_left_unwritten_holds_nobody_off(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_NAME).write_text(text)
    with folder(tmp_path) as run:
        assert run.is_new


def test_of_many_processes_at_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    lock(tmp_path, started="long ago")
    racing = HOLDING.replace("time.sleep(60)", "sys.stdin.read()")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", racing, str(tmp_path)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(3)
    ]
    try:
        waiting = [
            racer for racer in racers if racer.stdout is not None and racer.stdout.readline() == "held\n"
        ]
        assert len(waiting) == 1
    finally:
        for racer in racers:
            racer.communicate(timeout=60)


def test_every_difference_is_in_the_refusal(tmp_path: Path) -> None:
    with folder(tmp_path):
        pass
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


def test_allowed_changes_are_said_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with folder(tmp_path):
        pass
    with caplog.at_level(logging.INFO), folder(tmp_path, allow_changes=True, learning_rate=1e-4) as run:
        assert not run.is_new
    assert "learning_rate" in caplog.text
    with folder(tmp_path, learning_rate=1e-4):
        pass


def test_no_number_of_steps_means_the_default(tmp_path: Path) -> None:
    with folder(tmp_path, max_train_steps=None):
        pass
    with pytest.raises(ValueError, match=r"max_train_steps *None -> 700"):
        folder(tmp_path, max_train_steps=700).__enter__()
    with folder(tmp_path, max_train_steps=900) as run:
        assert not run.is_new


@pytest.mark.parametrize(
    ("name", "value"), [("max_train_steps", 900), ("validation_steps", 5), ("report_to", "wandb")]
)
def test_what_does_not_change_the_training_is_said_and_not_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: Json
) -> None:
    with folder(tmp_path, report_to=None):
        pass
    settings = SETTINGS | {"report_to": None, name: value}
    with caplog.at_level(logging.INFO), RunFolder(tmp_path, settings, PHOTOS, allow_changes=False):
        pass
    assert name in caplog.text
    assert json.loads((tmp_path / "run.json").read_text())["settings"][name] == value


def test_a_step_may_be_split_otherwise_and_not_be_of_other_size(tmp_path: Path) -> None:
    with folder(tmp_path, train_batch_size=4, gradient_accumulation_steps=1, num_processes=1):
        pass
    with folder(tmp_path, train_batch_size=1, gradient_accumulation_steps=2, num_processes=2) as run:
        assert not run.is_new
    with pytest.raises(ValueError, match=r"num_processes *2 -> 1") as refusal:
        folder(tmp_path, train_batch_size=1, gradient_accumulation_steps=2, num_processes=1).__enter__()
    assert "train_batch_size" not in str(refusal.value)


def test_an_option_that_an_older_release_did_not_have_does_not_stop_a_run(tmp_path: Path) -> None:
    with folder(tmp_path):
        pass
    with folder(tmp_path, newer_option=1) as run:
        assert not run.is_new


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors, which belong to no run"):
        folder(tmp_path, allow_changes=True).__enter__()
    assert contents(tmp_path) == {"adapter_model.safetensors": b"precious"}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        folder(tmp_path / "file").__enter__()
    with pytest.raises(ValueError, match="cannot be written to"):
        folder(tmp_path / "file" / "below").__enter__()
    with pytest.raises(ValueError, match="cannot be written to"):
        folder(tmp_path / ("x" * 300)).__enter__()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="only Linux has /proc, where nobody may write")
def test_a_folder_that_nobody_may_write_to_is_said_so() -> None:
    with pytest.raises(ValueError, match="cannot be written to"):
        folder(Path("/proc/run")).__enter__()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "settings": {}}'])
def test_a_damaged_run_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        folder(tmp_path).__enter__()
    assert contents(tmp_path) == {"run.json": text.encode()}


def test_a_run_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 2, "settings": {}, "fingerprints": {}}')
    with pytest.raises(ValueError, match="format is 2; it should be 1; update"):
        folder(tmp_path).__enter__()


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "log.jsonl").read_text().splitlines()]


def test_a_line_is_in_the_log_at_once(tmp_path: Path) -> None:
    with folder(tmp_path) as run:
        run.log({"step": 1, "loss": 0.5})
        assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


def test_rewinding_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    with folder(tmp_path) as run:
        for step in range(6):
            run.log({"step": step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with folder(tmp_path) as run:
        run.rewind(3)
        assert steps(tmp_path) == [0, 1, 2, 3]
        run.log({"step": 4})
    assert steps(tmp_path) == [0, 1, 2, 3, 4]


def test_a_torn_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    with folder(tmp_path):
        pass
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    with folder(tmp_path) as run:
        run.log({"step": 2})
    assert steps(tmp_path) == [1, 2]


def test_rewinding_a_log_that_fits_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    with folder(tmp_path) as run:
        run.log({"step": 1})
        before = (tmp_path / "log.jsonl").stat()
        run.rewind(1)
        after = (tmp_path / "log.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_run_without_a_log_can_be_rewound(tmp_path: Path) -> None:
    with folder(tmp_path) as run:
        run.rewind(0)
    assert not (tmp_path / "log.jsonl").exists()

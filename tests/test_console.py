"""Commands in surroundings that are not a developer's: consoles, pipes, homes, limits, variables."""

import importlib
import io
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from accelerate.state import PartialState
from forked_runs import exit_code, fork
from training_runs import command, config, contents, environment, trained_files

from ether_diffusion.console import Unbroken, run_command
from ether_diffusion.scripts import ether, train_dreambooth
from ether_diffusion.training.run import train_dreambooth as train

SCRIPTS = "ether_diffusion.scripts"
TOKEN = "犬 ×"
"""A trigger that ASCII has no letter for."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run."""
    tmp_path = tmp_path_factory.mktemp("run")
    assert train(config(tmp_path, max_train_steps=1, token=TOKEN)) == 0
    return tmp_path / "run"


def call(*arguments: str, variables: dict[str, str] | None = None, **options: object) -> tuple[int, str, str]:
    """Run Python; return its exit code, and what it says on stdout and stderr."""
    done: subprocess.CompletedProcess[bytes] = subprocess.run(  # type: ignore[call-overload]
        [sys.executable, *arguments],
        env={**environment(), "PYTHONUNBUFFERED": "", **(variables or {})},
        timeout=120,
        check=False,
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
    )
    return done.returncode, (done.stdout or b"").decode("latin-1"), (done.stderr or b"").decode()


@contextmanager
def unread_pipe() -> Iterator[int]:
    """The end that is written to of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        yield writing
    finally:
        os.close(writing)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp932"])
def test_what_the_console_has_no_letter_for_is_replaced(
    run: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", said)
    assert ether.main(["inspect", str(run)]) == 0
    said.seek(0)
    assert "trigger: " in said.read()


def test_a_process_of_another_locale_says_what_it_can(run: Path) -> None:
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    code, said, error = call("-m", f"{SCRIPTS}.ether", "inspect", str(run), variables=poor)
    assert (code, error) == (0, "")
    assert "trigger: " in said


@pytest.mark.parametrize(
    "module",
    [
        *(f"{SCRIPTS}.{name}" for name in ("ether", "train_dreambooth", "train_control")),
        "recipes.tiny_world.demo",
        "recipes.tiny_world.__main__",
    ],
)
def test_help_is_said_in_ascii(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", said)
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(module).main(["--help"])
    said.seek(0)
    assert said.read().startswith("usage: ")


def test_a_path_that_the_file_system_cannot_name_is_said_so() -> None:
    code = run_command("x", lambda: None, lambda parsed: str("犬".encode("ascii")))  # type: ignore[arg-type, return-value]
    assert code == 2


SPEAKING = """
import sys
from ether_diffusion.console import run_command
def speak(words):
    if not words: raise ValueError("nothing was asked")
    print(*words)
sys.exit(run_command("speak", lambda: sys.argv[1:], speak))
"""
"""A command as all are, without their libraries."""


@pytest.mark.parametrize("words", [("-m", f"{SCRIPTS}.ether", "--help"), ("-c", SPEAKING, "aloud")])
def test_a_reader_who_leaves_ends_a_command_in_silence(words: tuple[str, ...]) -> None:
    with unread_pipe() as pipe:
        code, _, error = call(*words, stdout=pipe)
    assert (code, error) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_stdout_is_said_in_one_sentence() -> None:
    with Path("/dev/full").open("wb") as full:
        code, _, error = call("-m", f"{SCRIPTS}.ether", "--help", stdout=full)
    assert code == 2
    assert "what it says cannot be written to stdout (No space left on device)" in error
    assert error.count("\n") == 1


def test_a_closed_stdout_is_no_error() -> None:
    assert call("-c", SPEAKING, "aloud", stdout=None, preexec_fn=lambda: os.close(1)) == (0, "", "")


@pytest.mark.parametrize("stderr", ["nobody reads", "is full", "is closed"])
def test_a_run_whose_progress_goes_nowhere_ends_with_its_adapter(
    run: Path, tmp_path: Path, stderr: str
) -> None:
    (tmp_path / "base").symlink_to(run.parent / "base")
    (tmp_path / "photos").symlink_to(run.parent / "photos")
    arguments = command(config(tmp_path, max_train_steps=1, token=TOKEN))[2:]

    def train_unheard() -> int:
        logging.root.handlers.clear()
        with unread_pipe() as pipe:
            if stderr == "is closed":
                sys.stdout = sys.stderr = sys.__stderr__ = None  # type: ignore[misc]
                os.close(1)
                os.close(2)
            else:
                os.dup2(os.open("/dev/full", os.O_WRONLY) if stderr == "is full" else pipe, 2)
                sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False)  # type: ignore[misc]
            return train_dreambooth.main(arguments)

    assert exit_code(fork(train_unheard)) == 0
    assert trained_files(tmp_path / "run") == trained_files(run)


def test_an_error_that_nobody_reads_keeps_its_exit_code() -> None:
    with unread_pipe() as pipe:
        assert call("-c", SPEAKING, stderr=pipe)[0] == 2


def test_a_stream_that_is_none_or_closed_takes_words() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        assert Unbroken(stream).write("x") == 1
        Unbroken(stream).flush()


def test_an_interrupt_while_libraries_are_imported_is_quiet(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, *command(config(tmp_path))],
        env=environment(),
        stderr=subprocess.PIPE,
        preexec_fn=_take_interrupts,
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():  # torch is being imported
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130, error
    assert "Traceback" not in error


def _take_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "nonsense"}, "ACCELERATE_MIXED_PRECISION=nonsense"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU=maybe"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "x"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=x"),
        ({"LOCAL_RANK": "foo", "ACCELERATE_USE_CPU": "true"}, "LOCAL_RANK=foo"),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"ACCELERATE_TORCH_DEVICE": "toaster"}, "ACCELERATE_TORCH_DEVICE=toaster"),
        ({"ACCELERATE_TORCH_DEVICE": "meta"}, "ACCELERATE_TORCH_DEVICE=meta"),
        ({"ACCELERATE_MIXED_PRECISION": ""}, "ACCELERATE_MIXED_PRECISION= "),
        ({"ACCELERATE_DYNAMO_BACKEND": "nonsense"}, "ACCELERATE_DYNAMO_BACKEND=nonsense"),
    ],
)
def test_a_variable_that_accelerate_stumbles_over_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: str
) -> None:
    run = config(tmp_path)
    before = contents(tmp_path)
    PartialState._reset_state()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(ValueError, match=r"accelerate cannot start with the environment's") as refusal:
            train(run)
    finally:
        PartialState._reset_state()
    assert named in str(refusal.value)
    assert contents(tmp_path) == before


def test_a_level_that_accelerate_stumbles_over_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "loud")
    asked = f"--instance_data_dir {tmp_path} --instance_prompt a --output_dir {tmp_path / 'o'}"
    assert train_dreambooth.main(asked.split()) == 2
    assert "ACCELERATE_LOG_LEVEL=loud is no level" in capsys.readouterr().err


def test_without_a_home_everything_but_the_studio_goes_on(run: Path, tmp_path: Path) -> None:
    strange = ["unshare", "--map-user=12345", "--map-group=12345"]
    if subprocess.run([*strange, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("runs where a user may take a number that no entry is of")
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": environment()["PYTHONPATH"], "HF_HUB_OFFLINE": "1"}
    (tmp_path / "base").symlink_to(run.parent / "base")
    asked = config(tmp_path, max_train_steps=1)

    def call_strange(*words: str) -> tuple[int, str]:
        done = subprocess.run(
            [*strange, sys.executable, *words],
            env=variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stderr

    assert call_strange(*command(asked))[0] == 0
    code, error = call_strange("-m", f"{SCRIPTS}.ether", "ui")
    assert code == 2
    assert "there is no home folder here for ~/ether-studio; say with --folder" in error
    assert {path.name for path in tmp_path.iterdir()} == {"base", "photos", "run", "run.yaml"}


def test_too_little_memory_for_the_libraries_is_a_sentence(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (3 * 10**8, 3 * 10**8))

    code, _, error = call(*command(config(tmp_path)), preexec_fn=limit)
    assert code == 2
    assert "Traceback" not in error
    assert "memory or threads ran out (" in error

"""Training runs in forked processes, which have everything imported and can be killed at any instant."""

import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.run import train_dreambooth

CHANGES = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"})
"""Python's audit events that change a folder; opening a file to write is another."""


def fork(work: Callable[[], int], messages: str | Path = os.devnull) -> int:
    """Start a copy of this process that exits with what `work` returns; return its number.

    What it has to say goes to the end of the file `messages`.
    """
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        torch.set_num_threads(1)  # the threads of a pool do not come along
        os.dup2(os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr, force=True)
        code = work()
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
        code = 2  # as train-dreambooth
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def training(config: DreamBoothConfig) -> Callable[[], int]:
    """Return the work of training."""
    return lambda: train_dreambooth(config)


def training_until_change(config: DreamBoothConfig, number: int) -> Callable[[], int]:
    """Return the work of training, killed right before it changes the disk for the number-th time."""
    return until_change(training(config), config.output.output_dir, number)


def until_change(train: Callable[[], int], folder: Path, number: int) -> Callable[[], int]:
    """Return work that is killed right before it changes a folder for the number-th time."""

    def work() -> int:
        die_at_change(folder, number)
        return train()

    return work


def die_at_change(folder: Path, number: int) -> None:
    """Have this process kill itself before the number-th write, rename, deletion or fsync in a folder."""
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (event in CHANGES or writes) and str(folder) in str(arguments[0]):
            count()

    synced = os.fsync

    def fsync(descriptor: int) -> None:
        count()
        synced(descriptor)

    sys.addaudithook(watch)
    os.fsync = fsync  # type: ignore[assignment]  # this process is thrown away


def exit_code(child: int, *, seconds: float = 120) -> int:
    """Wait for a child and return its exit code, or the negative number of the signal that ended it."""
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    timer.start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        timer.cancel()


def wait_for_lines(child: int, log: Path, number: int) -> None:
    """Wait until a log has so many lines, or the child that writes it ended."""
    while log.read_bytes().count(b"\n") < number if log.exists() else number > 0:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)


def fork_pair(
    config: DreamBoothConfig,
    messages: str | Path = os.devnull,
    *,
    train: Callable[[DreamBoothConfig], int] = train_dreambooth,
) -> tuple[int, int]:
    """Start a run in two processes that share their gradients, as a launcher does; return their numbers."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    first, second = (fork(_one_of_two(config, rank, port, train), messages) for rank in range(2))
    return first, second


def _one_of_two(
    config: DreamBoothConfig, rank: int, port: str, train: Callable[[DreamBoothConfig], int]
) -> Callable[[], int]:
    def work() -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ.update(place, MASTER_ADDR="localhost", MASTER_PORT=port, ACCELERATE_USE_CPU="true")
        return train(config)

    return work

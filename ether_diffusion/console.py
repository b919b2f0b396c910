"""What every command does about its surroundings: streams that take anything, and errors as sentences."""

import ctypes
import gc
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, TypeVar

USER_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT
NOBODY_READS = 128 + 13  # as the shell says of a command that SIGPIPE ended
_SHORT = ("allocate memory", "out of memory", "alloc_failed", "bad_alloc", "map segment",
          "without exception set", "start new thread", "resource temporarily unavailable")  # fmt: skip
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

T = TypeVar("T")


class Unbroken:
    """A stream whose words may be lost, as it is full, closed or read by nobody, which is nobody's error."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError, ValueError):  # a closed stream raises ValueError
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run_command(
    name: str,
    parse: Callable[[], T],
    work: Callable[[T], int | None],
    *,
    say: Callable[[ValueError | OSError], str] = str,
) -> int:
    """Parse the command line and work; return the exit code that `work` gives, or 0.

    Call it before torch is imported: it says how torch's threads wait.

    What the user can mend is said, as `say` puts it, and is 2; with `parsed.debug`, the error goes on. Ctrl-C
    is 130, SIGTERM in training 143, and a reader of stdout who left is 141, as a shell has it.
    """
    mend_streams()
    share_machine()
    try:
        with _interrupts_end_imports():
            try:
                return _worked(name, parse(), work, say)
            finally:
                try:
                    sys.stdout.flush()
                except BrokenPipeError:
                    raise
                except OSError as error:
                    raise _UnsaidError(error.strerror) from error
    except KeyboardInterrupt:
        return INTERRUPTED
    except (BrokenPipeError, _UnsaidError) as error:
        with suppress(OSError, ValueError):  # or Python would try once more at its end, and say so
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return NOBODY_READS
        print(f"{name}: what it says cannot be written to stdout ({error})", file=sys.stderr)
        return USER_ERROR


class StoppedError(InterruptedError):
    """A signal stopped the work in a folder; `code` is the exit code that a shell has for it."""

    def __init__(self, code: int, folder: Path) -> None:
        super().__init__(f"training was stopped; the same command goes on in {folder}")
        self.code = code


class _UnsaidError(Exception):
    """Why stdout takes no more."""


def share_machine() -> None:
    """Let this process share its cores with others, and start quickly.

    OpenMP's threads wait for each other by spinning, unless OMP_WAIT_POLICY says otherwise when torch is
    loaded: beside a busy neighbour they spin for whole time slices. What the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # importing makes many objects and no garbage: at Python's threshold of 700 a seventh of it is collecting
    gc.set_threshold(100_000, 50, 100)
    # as diffusers is imported, transformers says that torchvision is missing, which nothing here uses
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)


def use_one_thread() -> None:
    """Let torch, when it is loaded, compute with one thread, unless the user has said with how many.

    For models as small as the embedded base: their products are too short for threads that sleep between.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _worked(
    name: str, parsed: T, work: Callable[[T], int | None], say: Callable[[ValueError | OSError], str]
) -> int:
    try:
        return work(parsed) or 0
    except BrokenPipeError:
        raise
    except BaseException as error:  # MemoryError, RuntimeError, ImportError, a library's own panic …
        code = error.code if isinstance(error, StoppedError) else USER_ERROR
        is_users = isinstance(error, ValueError | OSError)
        if getattr(parsed, "debug", False) or not (is_users or ran_short(error)):
            raise
        if isinstance(error, UnicodeEncodeError):
            found = error.object[error.start : error.end]
            sentence = f"{found!a} cannot be said in {error.encoding}, as this system does; set PYTHONUTF8=1"
        elif isinstance(error, ValueError | OSError):
            sentence = say(error)
        else:
            what = f"memory or threads ran out ({str(error) or 'MemoryError'})"
            sentence = f"{what}; free some, or raise the limits of this shell (ulimit -v, ulimit -u)"
    command, rank = getattr(parsed, "command", None), os.environ.get("LOCAL_RANK", "0")
    for line in sentence.splitlines():
        if rank == "0" or not rank.isdigit():  # of several processes one speaks
            print(f"{name} {command}: {line}" if command else f"{name}: {line}", file=sys.stderr)
    return code


def give_memory_back() -> None:
    """Return to the system what glibc keeps between blocks that are in use."""
    with suppress(AttributeError, OSError, TypeError):  # other systems have no such function
        ctypes.CDLL(None).malloc_trim(0)


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of the container that this process is in."""
    import psutil  # which not every command needs

    limits = [Path(name).read_text(encoding="ascii").strip() for name in _LIMITS if Path(name).is_file()]
    # "max" is no limit
    return min([int(psutil.virtual_memory().total), *(int(text) for text in limits if text.isdecimal())])


def ran_short(error: BaseException) -> bool:
    """Say whether an error tells of too little memory, on the CPU or an accelerator, or too few threads."""
    is_said = any(each in str(error).lower() for each in _SHORT)
    return is_said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's


def mend_streams() -> None:
    """Let stdout and stderr take any text, in another encoding as well as it can, and stderr fail in silence.

    One that is closed is opened to nowhere: the next file to be opened would get what is said on it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115  # for as long as the process lives
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = Unbroken(sys.stderr)  # it has all that a stream has


@contextmanager
def _interrupts_end_imports() -> Iterator[None]:
    """End the process at once where Ctrl-C comes during an import, which could make anything of an error."""
    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                os._exit(INTERRUPTED)
            frame = frame.f_back
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)

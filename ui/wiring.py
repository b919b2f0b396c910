"""What every handler goes through: errors become sentences, and Stop finds what the visitor has running."""

import errno
import functools
import html
import inspect
import logging
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import gradio as gr

from ether_diffusion.ui.facts import sentence

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger(__name__)

_PATH = re.compile(r"(?<![\w./:])(?:/[^\s/'\",;:]+)+/(?P<name>[^\s/'\",;:]+)")


def handler(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a handler: what the visitor can mend is said in words, what they cannot gets an id for the log.

    Every handler of every tab goes through here. Generators stay generators, and the special arguments that
    Gradio fills by annotation (gr.Request, gr.SelectData) are seen through the wrapper.
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stream(*arguments: P.args, **options: P.kwargs) -> Iterator[Any]:
            with _said_in_words():
                yield from cast(Iterator[Any], function(*arguments, **options))

        return cast(Callable[P, T], stream)

    @functools.wraps(function)
    def answer(*arguments: P.args, **options: P.kwargs) -> T:
        with _said_in_words():
            result = function(*arguments, **options)
        return cast(T, gr.skip()) if result == {} else result  # Gradio takes no updates at all for a value

    return answer


@contextmanager
def _said_in_words() -> Iterator[None]:
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        said = _sentence(error)
        if said is None:
            number = secrets.token_hex(2)
            logger.exception("error %s", number)
            said = f"Something went wrong (id {number}). Details are in the log."
        raise gr.Error(html.escape(said, quote=False), title="", print_exception=False) from None


def _sentence(error: Exception) -> str | None:
    """The sentence of an error that our own code raised for the user; None of every other error."""
    if isinstance(error, OSError) and error.errno is not None:
        full = "The disk is full; delete what is no longer needed and try again."
        return full if error.errno == errno.ENOSPC else None
    if type(error) not in (ValueError, FileNotFoundError, FileExistsError, OSError):
        return None
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("ether_diffusion."):
        return None
    text = without_paths(" ".join(str(error).split()))
    return sentence(text)


def without_paths(text: str) -> str:
    """Replace every absolute path by its last name: visitors are not told where the server keeps things."""
    return _PATH.sub(lambda found: found["name"], text)


class Stoppable(Protocol):
    """A job that can be told to stop."""

    def stop(self) -> None: ...


class RunningJobs:
    """What each visitor has running, so that Stop stops theirs and nobody else's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, list[Stoppable]] = {}

    @contextmanager
    def hold(self, visitor: str | None, job: Stoppable) -> Iterator[None]:
        """Know the job as the visitor's while the block runs; leaving it, a closed tab included, stops it."""
        name = visitor or ""
        with self._lock:
            self._jobs.setdefault(name, []).append(job)
        try:
            yield
        finally:
            job.stop()
            with self._lock:
                self._jobs[name].remove(job)
                if not self._jobs[name]:
                    del self._jobs[name]

    def stop(self, visitor: str | None) -> int:
        """Tell the jobs of a visitor to stop and return how many there were."""
        with self._lock:
            jobs = list(self._jobs.get(visitor or "", ()))
        for job in jobs:
            job.stop()
        return len(jobs)

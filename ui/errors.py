"""Errors as visitors are told of them: one sentence without paths, or an id whose traceback is in the log."""

import errno
import functools
import html
import inspect
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

# Gradio is imported where it is used: a studio without its page does without.

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger(__name__)

_PATH = re.compile(r"(?<![\w./:])(?:/[^\s/'\",;:]+)+/(?P<name>[^\s/'\",;:]+)")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_CLOSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


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
        import gradio as gr

        with _said_in_words():
            result = function(*arguments, **options)
        return cast(T, gr.skip()) if result == {} else result  # Gradio takes no updates at all for a value

    return answer


@contextmanager
def _said_in_words() -> Iterator[None]:
    import gradio as gr

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
    """Return the sentence of an error that our own code raised for the user; None of every other error."""
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
    return sentence(without_paths(" ".join(str(error).split())))


def sentence(error: object) -> str:
    """Return what an error of ours says, as a sentence."""
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


def without_paths(text: str) -> str:
    """Replace every absolute path by its last name: visitors are not told where the server keeps things."""
    return _PATH.sub(lambda found: found["name"], text)


@contextmanager
def disk_explained(folder: Path, doing: str) -> Iterator[None]:
    """Turn a full disk and missing rights inside `folder` into a ValueError; `doing` is what was tried."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            while not folder.exists():
                folder = folder.parent
            free = shutil.disk_usage(folder).free / 2**20
            raise ValueError(
                f"the disk is full, so that {doing} was not possible ({free:.1f} MiB are free); nothing was "
                "changed: free some space and try again"
            ) from error
        if error.errno in _CLOSED:
            raise ValueError(
                f"the studio's folder cannot be written to, so that {doing} was not possible; change its "
                "rights, or start with another --folder"
            ) from error
        raise

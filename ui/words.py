"""What visitors are told: errors as one sentence, and HTML of facts and progress, in which all is escaped."""

import base64
import errno
import functools
import html
import inspect
import io
import logging
import re
import secrets
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from markupsafe import Markup
from PIL import Image

from ether_diffusion.pipelines.metadata import ImageMetadata
from ether_diffusion.wording import printable

# Gradio is imported where it is used: a studio without its page does without.

MAX_CHARACTERS = 80  # of a name
F = TypeVar("F", bound=Callable[..., Any])
logger = logging.getLogger(__name__)
_PATH = re.compile(r"(?<![\w./:])(?:/[^\s/'\",;:]+)+/(?P<name>[^\s/'\",;:]+)")
_PROGRESS = Markup(
    '<div class="progress" role="progressbar" aria-label="Progress" aria-valuemin="0" '
    'aria-valuemax="100" aria-valuenow="{percent}"><span style="width:{percent}%"></span></div>{words}'
)


def handler(function: F) -> F:
    """Wrap a handler: what the visitor can mend is said in words, what they cannot gets an id for the log.

    Every handler of every tab goes through here. Generators stay generators, and the special arguments that
    Gradio fills by annotation (gr.Request, gr.SelectData) are seen through the wrapper.
    """

    @functools.wraps(function)
    def stream(*arguments: Any, **options: Any) -> Iterator[Any]:
        with _said_in_words():
            yield from function(*arguments, **options)

    @functools.wraps(function)
    def answer(*arguments: Any, **options: Any) -> Any:
        import gradio as gr

        with _said_in_words():
            result = function(*arguments, **options)
        return gr.skip() if result == {} else result  # Gradio takes no updates at all for a value

    return cast(F, stream if inspect.isgeneratorfunction(function) else answer)


@contextmanager
def _said_in_words() -> Iterator[None]:
    import gradio as gr

    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        raise gr.Error(html.escape(told(error), quote=False), title="", print_exception=False) from None


def told(error: Exception) -> str:
    """Return what a visitor is told of an error: its sentence, or an id for the log where it is kept."""
    said, number = _told(error), secrets.token_hex(2)
    if said is None:
        logger.error("error %s", number, exc_info=error)
        said = f"Something went wrong (id {number}). Details are in the log."
    return said


def _told(error: Exception) -> str | None:
    """Return the sentence of an error that our own code raised for the user; None of every other error."""
    if isinstance(error, OSError) and error.errno is not None:
        full = "The disk is full; delete what is no longer needed and try again."
        return full if error.errno == errno.ENOSPC else None
    *_, last = inspect.getinnerframes(cast(Any, error.__traceback__), context=0)
    is_ours = last.frame.f_globals.get("__name__", "").startswith("ether_diffusion.")
    is_told = is_ours and type(error) in (ValueError, FileNotFoundError, FileExistsError, OSError)
    return sentence(without_paths(" ".join(str(error).split()))) if is_told else None


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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
            why = f"the disk is full ({free / 2**20:.1f} MiB are free)"
            remedy = "nothing was changed: free some space and try again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            why = "the studio's folder cannot be written to"
            remedy = "change its rights, or start with another --folder"
        else:
            raise
        raise ValueError(f"{why}, so that {doing} was not possible; {remedy}") from error


def check_name(name: str) -> str:
    """Return a name that a visitor gave: no outer spaces, invisible characters escaped, not too long."""
    plain = printable(" ".join(unicodedata.normalize("NFC", name).split()), 10 * MAX_CHARACTERS)
    if not 1 <= len(plain) <= MAX_CHARACTERS:
        raise ValueError(f"the name has {len(plain)} characters; use 1 to {MAX_CHARACTERS}")
    return plain


def picture_facts(said: ImageMetadata) -> list[tuple[str, str]]:
    """Return what a picture says of how it was made, in the order of the form."""
    facts: list[tuple[str, object]] = [("Prompt", said.prompt or "")]
    facts += [("Not in the picture", said.negative_prompt or None)]
    for use in said.adapters:
        strength = "several strengths" if use.strength is None else f"{use.strength:g}"
        facts.append(("Adapter", f"{use.name} at {strength}"))
    control, at = (said.options.get(f"control{end}", "?") for end in ("", "_strength"))
    start, far = (said.options.get(f"start_{what}") for what in ("image", "strength"))
    guidance = None if said.guidance_scale is None else f"{said.guidance_scale:g}"
    facts += [
        ("Control image", f"followed by {control} at {at}" if "control" in said.options else None),
        ("Begun with", f"{start or 'a picture'}, {far} from it" if far is not None else None),
        ("Base", said.base), ("Seed", said.seed), ("Steps", said.steps), ("Guidance", guidance),
        ("Size", f"{said.width} × {said.height}"), ("Sampler", said.scheduler),
    ]  # fmt: skip
    return [(name, printable(value, 2000)) for name, value in facts if value is not None]


def duration(seconds: float) -> str:
    """Return a duration in words: 8 s, 3 min, 2 h 5 min."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def kilobytes(num_bytes: int) -> str:
    """Return a size in words: 412 kB, 3.4 MB."""
    return f"{max(1, round(num_bytes / 1e3))} kB" if num_bytes < 1e6 else f"{num_bytes / 1e6:.1f} MB"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 picture, 2 pictures."""
    return f"{number} {noun}" + "s" * (number != 1)


def facts_html(facts: Iterable[tuple[str, str]]) -> Markup:
    """Return a list of names and values."""
    rows = Markup("").join(Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(*fact) for fact in facts)
    return Markup('<dl class="facts">{}</dl>').format(rows)


def quiet_html(words: str) -> Markup:
    """Return a line that is read out when it changes."""
    return Markup('<p class="quiet" role="status">{}</p>').format(words)


def progress_html(done: float, words: str) -> Markup:
    """Return a bar, `done` of 1, with words under it."""
    return _PROGRESS.format(percent=round(100 * min(max(done, 0.0), 1.0)), words=quiet_html(words))


def notes_html(heading: str, notes: Iterable[str] = (), *, kind: str = "note") -> Markup:
    """Return a box with a heading and a list of sentences, if there are any."""
    return Markup('<div class="notes {}" role="status"><p>{}</p>{}</div>').format(kind, heading, _list(notes))


def folded_html(heading: str, notes: Iterable[str]) -> Markup:
    """Return a line that shows a list of sentences when it is opened."""
    return Markup('<details class="notes"><summary>{}</summary>{}</details>').format(heading, _list(notes))


def _list(notes: Iterable[str]) -> Markup:
    items = Markup("").join(Markup("<li>{}</li>").format(note) for note in notes)
    return Markup("<ul>{}</ul>").format(items) if items else items


def picture_address(image: Image.Image, kind: str, **options: int) -> str:
    """Return a picture as an address that holds it."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"

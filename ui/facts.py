"""Words and HTML for what the studio knows of pictures and progress; all that it is given is escaped."""

import base64
import io
from collections.abc import Iterable
from html import escape

from PIL import Image

from ether_diffusion.pipelines.metadata import ImageMetadata
from ether_diffusion.ui.events import Previewing, Waiting
from ether_diffusion.wording import printable

_SHOWN = 2000
"""Characters of a prompt that are shown."""


def facts_html(facts: Iterable[tuple[str, str]]) -> str:
    """Return a list of names and values."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{rows}</dl>'


def picture_facts(metadata: ImageMetadata) -> list[tuple[str, str]]:
    """Return what a picture says of how it was made, in the order of the form."""
    facts = [("Prompt", printable(metadata.prompt or "", _SHOWN))]
    if metadata.negative_prompt:
        facts.append(("Not in the picture", printable(metadata.negative_prompt, _SHOWN)))
    for use in metadata.adapters:
        strength = "several strengths" if use.strength is None else f"{use.strength:g}"
        facts.append(("Adapter", f"{printable(use.name)} at {strength}"))
    if "control" in metadata.options:
        control, followed = (metadata.options.get(name, "?") for name in ("control", "control_strength"))
        facts.append(("Control image", f"followed by {printable(control)} at {printable(followed)}"))
    rest = {
        "Base": metadata.base,
        "Seed": metadata.seed,
        "Steps": metadata.steps,
        "Guidance": None if metadata.guidance_scale is None else f"{metadata.guidance_scale:g}",
        "Size": f"{metadata.width} × {metadata.height}",
        "Sampler": metadata.scheduler,
    }
    return facts + [(name, printable(value)) for name, value in rest.items() if value is not None]


def duration(seconds: float) -> str:
    """Return a duration in words: 8 s, 3 min, 2 h 5 min."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 picture, 2 pictures."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def state_words(event: Waiting | Previewing, *, what: str = "picture") -> tuple[float, str]:
    """Return how much of a job is done, of 1, and the words for it; its parts are called `what`."""
    if isinstance(event, Waiting):
        place = "yours is next" if event.place == 1 else f"number {event.place} in line"
        return 0.0, f"Waiting: {place}"
    if event.is_loading:
        return 0.0, "Loading the models …"
    words = [f"Step {event.step} of {event.num_steps}"]
    if event.num_images > 1:
        words.append(f"{what} {min(event.num_done + 1, event.num_images)} of {event.num_images}")
    if event.seconds_left is not None:
        words.append(f"about {duration(event.seconds_left)} left")
    done = (event.num_done + event.step / max(1, event.num_steps)) / max(1, event.num_images)
    return done, " · ".join(words)


def progress_html(done: float, words: str) -> str:
    """Return a bar, `done` of 1, with words under it."""
    percent = round(100 * min(max(done, 0.0), 1.0))
    return (
        f'<div class="progress" role="progressbar" aria-label="Progress" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{percent}"><span style="width:{percent}%"></span></div>'
        f'<p class="quiet" role="status">{escape(words)}</p>'
    )


def preview_html(image: Image.Image, *, is_small: bool) -> str:
    """Return a picture inside the page itself; small ones are enlarged with sharp pixels."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="WEBP", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    look = "look sharp" if is_small else "look"
    source = f"data:image/webp;base64,{data}"
    return f'<div class="{look}"><img alt="How the picture looks by now" src="{source}"></div>'


def figure_html(image: Image.Image, caption: str, *, is_small: bool) -> str:
    """Return a small picture inside the page itself, exactly, under its caption."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    look = "small sharp" if is_small else "small"
    return (
        f'<figure class="{look}"><img alt="" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def notes_html(heading: str, notes: Iterable[str], *, kind: str = "note") -> str:
    """Return a box with a heading and a list of sentences; nothing at all where there are none to say."""
    listing = "".join(f"<li>{escape(note)}</li>" for note in notes)
    body = f"<ul>{listing}</ul>" if listing else ""
    return f'<div class="notes {kind}" role="status"><p>{escape(heading)}</p>{body}</div>'

"""Words and HTML for what the studio knows of pictures and progress; all that it is given is escaped."""

import base64
import io
from collections.abc import Iterable

from markupsafe import Markup
from PIL import Image

from ether_diffusion.pipelines.metadata import ImageMetadata
from ether_diffusion.ui.jobs import Previewing, Waiting
from ether_diffusion.wording import printable

_SHOWN = 2000
"""Characters of a prompt that are shown."""
_FACT = Markup("<div><dt>{}</dt><dd>{}</dd></div>")
_PROGRESS = Markup(
    '<div class="progress" role="progressbar" aria-label="Progress" aria-valuemin="0" '
    'aria-valuemax="100" aria-valuenow="{percent}"><span style="width:{percent}%"></span></div>{words}'
)
_QUIET = Markup('<p class="quiet" role="status">{}</p>')
_LOOK = Markup('<div class="{}"><img alt="How the picture looks by now" src="{}"></div>')
_FIGURE = Markup('<figure class="{}"><img alt="" src="{}"><figcaption>{}</figcaption></figure>')
_NOTES = Markup('<div class="notes {}" role="status"><p>{}</p>{}</div>')


def facts_html(facts: Iterable[tuple[str, str]]) -> Markup:
    """Return a list of names and values."""
    return Markup('<dl class="facts">{}</dl>').format(Markup("").join(_FACT.format(*fact) for fact in facts))


def picture_facts(metadata: ImageMetadata) -> list[tuple[str, str]]:
    """Return what a picture says of how it was made, in the order of the form."""
    facts = [("Prompt", printable(metadata.prompt or "", _SHOWN))]
    if metadata.negative_prompt:
        facts.append(("Not in the picture", printable(metadata.negative_prompt, _SHOWN)))
    for use in metadata.adapters:
        strength = "several strengths" if use.strength is None else f"{use.strength:g}"
        facts.append(("Adapter", f"{printable(use.name)} at {strength}"))
    if "control" in metadata.options:
        control, followed = (
            printable(metadata.options.get(f"control{end}", "?")) for end in ("", "_strength")
        )
        facts.append(("Control image", f"followed by {control} at {followed}"))
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


def quiet_html(words: str) -> Markup:
    """Return a line that is read out when it changes."""
    return _QUIET.format(words)


def progress_html(done: float, words: str) -> Markup:
    """Return a bar, `done` of 1, with words under it."""
    return _PROGRESS.format(percent=round(100 * min(max(done, 0.0), 1.0)), words=quiet_html(words))


def preview_html(image: Image.Image, *, is_small: bool) -> Markup:
    """Return a picture inside the page itself; small ones are enlarged with sharp pixels."""
    return _LOOK.format("look sharp" if is_small else "look", picture_address(image, "WEBP", quality=80))


def figure_html(image: Image.Image, caption: str, *, is_small: bool) -> Markup:
    """Return a small picture inside the page itself, exactly, under its caption."""
    return _FIGURE.format("small sharp" if is_small else "small", picture_address(image, "PNG"), caption)


def notes_html(heading: str, notes: Iterable[str] = (), *, kind: str = "note") -> Markup:
    """Return a box with a heading and a list of sentences, if there are any."""
    listing = Markup("").join(Markup("<li>{}</li>").format(note) for note in notes)
    return _NOTES.format(kind, heading, Markup("<ul>{}</ul>").format(listing) if listing else "")


def picture_address(image: Image.Image, kind: str, **options: int) -> str:
    """Return a picture as an address that holds it."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"

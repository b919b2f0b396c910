"""What the page shows of a run as HTML and numbers: its state, its loss, its pictures by step."""

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ether_diffusion.ui.facts import duration, notes_html, progress_html
from ether_diffusion.ui.run_status import RunStatus, State
from ether_diffusion.ui.thumbnails import Thumbnails

STATE_WORDS: dict[State, str] = {
    "starting": "starting",
    "running": "training",
    "paused": "paused",
    "stopped": "stopped",
    "crashed": "broke off",
    "finished": "done",
    "waiting": "waiting",
}
NO_RUNS = '<div class="empty"><p>No training yet. Add photos, say what they show, and start.</p></div>'
MAX_ROWS = 8
"""Rows of pictures that are shown: a prompt with a seed each."""
MEAN, EACH = "running mean", "loss"
_MEAN_OVER = 12
_PROMPT_FLAG = "--validation_prompt="


def run_label(run: RunStatus) -> str:
    """Return a run's line in the list."""
    return f"{run.name} · {STATE_WORDS[run.state]} · {run.created.astimezone():%d %b, %H:%M}"


def status_html(run: RunStatus) -> str:
    """Return how a run stands: a bar with words while it goes on, a box where something is to be done."""
    heading = f"<h2>{escape(run.name)}</h2>"
    if run.state == "crashed":
        return heading + notes_html("The training broke off", [run.sentence], kind="warning")
    words = run.sentence
    if run.seconds_left is not None and run.step < run.num_steps:
        words = f"{words} About {duration(run.seconds_left)} left."
    return heading + progress_html(run.step / max(1, run.num_steps), words)


def loss_points(losses: Sequence[tuple[int, float]]) -> dict[str, object]:
    """Return two curves as gr.LinePlot sends them: the loss, which noise makes jump, and its running mean."""
    values = [loss for _, loss in losses]
    each = [[step, loss, EACH] for step, loss in losses]
    means = [
        [step, statistics.fmean(values[max(0, index + 1 - _MEAN_OVER) : index + 1]), MEAN]
        for index, (step, _) in enumerate(losses)
    ]
    return {
        "columns": ["step", "loss", "curve"],
        "data": each + means,
        "datatypes": {"step": "quantitative", "loss": "quantitative", "curve": "nominal"},
        "mark": "line",
    }


def samples_html(run: RunStatus, thumbnails: Thumbnails, *, is_small: bool) -> str:
    """Return the pictures by step, those of the base and of step 0 first; a row is a prompt with a seed."""
    rows: dict[str, list[tuple[str, Path]]] = {}
    for path in run.base_samples:
        rows.setdefault(path.stem, []).append(("Base", path))
    for step, path in run.samples:
        rows.setdefault(path.stem, []).append((f"Step {step}", path))
    prompts = [word.removeprefix(_PROMPT_FLAG) for word in run.command if word.startswith(_PROMPT_FLAG)]
    first: list[str] = []
    others: list[str] = []
    told: set[int] = set()
    for name in sorted(rows)[:MAX_ROWS]:
        number = _prompt_number(name)
        prompt = prompts[number] if number < len(prompts) else ""
        figures = "".join(_figure(label, path, prompt, thumbnails) for label, path in rows[name])
        row = f'<p class="quiet">{escape(prompt)}</p><div class="steps">{figures}</div>'
        (others if number in told else first).append(row)
        told.add(number)
    more = (
        f"<details><summary>The same from other seeds</summary>{''.join(others)}</details>" if others else ""
    )
    look = "samples sharp" if is_small else "samples"
    return f'<div class="{look}">{"".join(first)}{more}</div>' if first else ""


def _figure(label: str, path: Path, prompt: str, thumbnails: Thumbnails) -> str:
    address = thumbnails.address(path)
    if address is None:
        return ""
    words = escape(f"{prompt}, {label.lower()}", quote=True)
    return f'<figure><img alt="{words}" src="{address}"><figcaption>{escape(label)}</figcaption></figure>'


def _prompt_number(name: str) -> int:
    """Return which prompt a picture shows, by its name: prompt-01_seed-0."""
    digits = name.removeprefix("prompt-").split("_")[0]
    return int(digits) if digits.isdecimal() else 0

"""A grid as a table of the page: labels, the cells that are done, and what the others wait for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

from ether_diffusion.ui.events import SavedPicture
from ether_diffusion.ui.facts import counted, duration
from ether_diffusion.ui.requests import GridRequest
from ether_diffusion.wording import printable

_SHOWN = 80
"""Characters of a prompt that label a row."""


@dataclass(frozen=True)
class Labels:
    """The rows and columns of a grid, whose cells come row by row."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def of(self, cell: int) -> str:
        """Return the label of a cell by its number."""
        row, column = divmod(cell, len(self.columns))
        return ", ".join(part for part in (self.columns[column], self.rows[row]) if part)


def labels_of(request: GridRequest, names: Mapping[str, str]) -> Labels:
    """Return the labels: a column per choice; with one choice, a column per seed. `names` are adapters'."""
    prompts = [printable(prompt, _SHOWN) for prompt in request.prompts]
    seeds = [f"Seed {seed}" for seed in request.seeds]
    if len(request.choices) == 1 and len(seeds) > 1:
        return Labels(tuple(prompts if len(prompts) > 1 else [""]), tuple(seeds))
    columns = [_choice(choice, names) for choice in request.choices]
    rows = (
        [f"{prompt} · {seed.lower()}" for prompt in prompts for seed in seeds] if len(prompts) > 1 else seeds
    )
    return Labels(tuple(rows), tuple(columns))


def _choice(choice: Mapping[str, float], names: Mapping[str, str]) -> str:
    return " + ".join(f"{printable(names.get(name, name))} {s:g}" for name, s in choice.items()) or "Base"


def grid_html(labels: Labels, cells: Sequence[SavedPicture], *, is_running: bool, is_small: bool) -> str:
    """Return the table: done cells are buttons that carry their number, the next one is being drawn."""
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in labels.columns)
    width, rows = len(labels.columns), []
    for index, label in enumerate(labels.rows):
        if label:
            words = escape(label)
            rows.append(
                f'<tr class="row-label"><th scope="rowgroup" colspan="{width}"><span>{words}</span></th></tr>'
            )
        numbers = range(index * width, (index + 1) * width)
        rows.append(f"<tr>{''.join(_cell(labels, cells, number, is_running) for number in numbers)}</tr>")
    look = "cells sharp" if is_small else "cells"
    return (
        '<div class="grid-scroll" role="region" aria-label="Grid of pictures" tabindex="0">'
        f'<table class="{look}" style="--columns: {width}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(labels: Labels, cells: Sequence[SavedPicture], number: int, is_running: bool) -> str:
    label = escape(labels.of(number), quote=True)
    if number < len(cells):
        # relative, so that it holds behind a proxy, too
        source = f"gradio_api/file={quote(str(cells[number].path))}"
        return (
            f'<td><button type="button" data-cell="{number}" aria-label="{label}">'
            f'<img src="{source}" alt="" decoding="sync"></button></td>'
        )
    words = "not drawn"
    if is_running:
        words = "drawing …" if number == len(cells) else "waiting"
    state = "now" if words == "drawing …" else "later"
    return f'<td><div class="cell {state}"><span>{escape(labels.of(number))}</span>{words}</div></td>'


def cost_words(request: GridRequest, seconds_per_step: float | None) -> str:
    """Return what a grid costs in words; how long, where a step was measured."""
    num_steps = request.num_cells * request.steps
    words = [counted(request.num_cells, "picture"), counted(num_steps, "step")]
    if seconds_per_step is None:
        return " · ".join([*words, "how long is known after the first picture"])
    return " · ".join([*words, f"about {duration(num_steps * seconds_per_step)}"])

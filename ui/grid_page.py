"""A grid as a table of the page: labels, the cells that are done, and what the others wait for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from markupsafe import Markup

from ether_diffusion.ui.jobs import SavedPicture
from ether_diffusion.ui.requests import GridRequest
from ether_diffusion.wording import printable

_SHOWN = 80
"""Characters of a prompt that label a row."""
_TABLE = Markup(
    '<div class="grid-scroll" role="region" aria-label="Grid of pictures" tabindex="0">'
    '<table class="{look}" style="--columns: {width}"><thead><tr>{head}</tr></thead>'
    "<tbody>{rows}</tbody></table></div>"
)
_COLUMN = Markup('<th scope="col">{}</th>')
_ROW = Markup('<tr class="row-label"><th scope="rowgroup" colspan="{}"><span>{}</span></th></tr>')
_DONE = Markup(
    '<td><button type="button" data-cell="{}" aria-label="{}"><img src="gradio_api/file={}" alt="" '
    'decoding="sync"></button></td>'  # a relative source holds behind a proxy, too
)
_LATER = Markup('<td><div class="cell {}"><span>{}</span>{}</div></td>')


@dataclass(frozen=True)
class Labels:
    """The rows and columns of a grid, whose cells come row by row."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]


def labels_of(request: GridRequest, names: Mapping[str, str]) -> Labels:
    """Return the labels: a column per choice; with one choice, a column per seed. `names` are adapters'."""
    prompts = [printable(prompt, _SHOWN) for prompt in request.prompts]
    seeds = [f"Seed {seed}" for seed in request.seeds]
    if len(request.choices) == 1 and len(seeds) > 1:
        return Labels(tuple(prompts if len(prompts) > 1 else [""]), tuple(seeds))
    columns = [
        " + ".join(f"{printable(names.get(name, name))} {s:g}" for name, s in choice.items()) or "Base"
        for choice in request.choices
    ]
    if len(prompts) > 1:
        seeds = [f"{prompt} · {seed.lower()}" for prompt in prompts for seed in seeds]
    return Labels(tuple(seeds), tuple(columns))


def grid_html(labels: Labels, cells: Sequence[SavedPicture], *, is_running: bool, is_small: bool) -> str:
    """Return the table: done cells are buttons that carry their number, the next one is being drawn."""
    width, rows = len(labels.columns), Markup("")
    for row, label in enumerate(labels.rows):
        rows += _ROW.format(width, label) if label else ""
        rows += Markup("<tr>")
        for column, words in enumerate(labels.columns):
            number, called = row * width + column, ", ".join(filter(None, [words, label]))
            if number < len(cells):
                rows += _DONE.format(number, called, quote(str(cells[number].path)))
            elif is_running and number == len(cells):
                rows += _LATER.format("now", called, "drawing …")
            else:
                rows += _LATER.format("later", called, "waiting" if is_running else "not drawn")
        rows += Markup("</tr>")
    head = Markup("").join(_COLUMN.format(label) for label in labels.columns)
    return _TABLE.format(look="cells sharp" if is_small else "cells", width=width, head=head, rows=rows)

"""The tab Compare: a grid over prompts, seeds, adapters and strengths, whose cells stream in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import gradio as gr
from markupsafe import Markup

from ether_diffusion.pipelines.sampling import MANIFEST_NAME, SHEET_NAME
from ether_diffusion.ui.jobs import Job, SavedPicture
from ether_diffusion.ui.requests import GridRequest
from ether_diffusion.ui.tabs.drawing import DrawingTab
from ether_diffusion.ui.tabs.form import Form
from ether_diffusion.ui.tabs.history import PictureDetail
from ether_diffusion.ui.tabs.page import EMPTY, ON_PRESS, Updates, told_by
from ether_diffusion.ui.words import counted, duration, quiet_html
from ether_diffusion.wording import printable

_SHOWN = 80  # characters of a prompt that label a row
_EMPTY = EMPTY.format("The grid appears here, cell by cell.")
_TABLE = Markup(
    '<div class="grid-scroll" role="region" aria-label="Grid of pictures" tabindex="0">'
    '<table class="cells" style="--columns: {width}"><thead><tr>{head}</tr></thead>'
    "<tbody>{rows}</tbody></table></div>"
)
_ROW = Markup('<tr class="row-label"><th scope="rowgroup" colspan="{}"><span>{}</span></th></tr>')
_DONE = Markup(
    '<td><button type="button" data-cell="{}" aria-label="{}"><img src="gradio_api/file={}" alt="" '
    'decoding="sync"></button></td>'  # a relative source holds behind a proxy, too
)
_LATER = Markup('<td><div class="cell {}"><span>{}</span>{}</div></td>')


class GridForm(Form):
    """What a grid is made of."""

    def asked(self, named: Mapping[str, Any]) -> GridRequest:
        return GridRequest(**named)


class CompareTab(DrawingTab):
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    form: GridForm
    make_form, first, go_label, has_looks = GridForm, "prompts", "Draw grid", False
    nothing = "Write a prompt to see what the grid costs."

    def lay_out_head(self) -> None:
        pass

    def lay_out_settings(self) -> None:
        form = self.form
        with gr.Group():
            form.put("adapters", label="Adapters", info="Each has a column for every strength.")
            form.put("strengths", "with_base", "seeds")
        with gr.Group():
            form.put_sampling()
        form.put_advanced()

    def lay_out_results(self) -> None:
        self.status = self.html("status", visible=False)
        self.grid = self.html("grid", _EMPTY, js_on_load=ON_PRESS)
        with gr.Row(visible=False, elem_classes="tool-row") as self.files:
            self.sheet = gr.DownloadButton("Sheet (PNG)", elem_id="compare-sheet")
            self.manifest = gr.DownloadButton("Manifest (JSON)", elem_id="compare-manifest")
        self.notes = self.html("notes", visible=False)
        self.last = self.kept("compare-grid")
        self.detail = PictureDetail(self.page, "compare")

    @property
    def shown(self) -> list[Any]:
        return [widget for widget in super().shown if widget not in self.detail.widgets]

    def tie(self) -> None:
        self.draws_on([self.go.click], self.detail.widgets)
        self.on(self.grid.click, self._select, [self.last])

    def refresh(self) -> Updates:
        return self.form.offer()

    def begun(self, request: GridRequest) -> Updates:
        return self.detail.hide()

    def drawn(self, job: Job) -> Updates:
        labels, cells = labels_of(job.request, self.form.names()), job.pictures
        if job.is_done and not cells:
            return {self.grid: _EMPTY, self.last: None, self.files: gr.update(visible=False)}
        return {
            self.grid: grid_html(labels, cells, is_running=not job.is_done),
            self.last: [*labels, [cell.id for cell in cells]],
            self.files: gr.update(visible=False),
        }

    def ended(self, job: Job) -> Updates:
        words = f"{counted(len(job.pictures), 'picture')} in {duration(job.seconds)}"
        if job.stopped:
            words = f"Stopped: {words}, which History keeps; no sheet was made"
        elif job.pictures:
            words += ". Choose one to see it large and to use its settings."
        return self._said(words, job.sheet, job.manifest)

    def _said(self, words: str, sheet: Path | None, manifest: Path | None) -> Updates:
        return {
            self.status: gr.update(value=quiet_html(words), visible=True),
            self.files: gr.update(visible=sheet is not None),
            self.sheet: gr.update(value=sheet),
            self.manifest: gr.update(value=manifest, visible=manifest is not None),
        }

    def recall(self, last: Any) -> Updates:
        there = {picture.id: picture for picture in self.studio.history.pictures()}
        labels, cells = Labels(last[0], last[1]), tuple(there[each] for each in last[2])
        folder = cells[0].path.parent.parent
        files = [path if path.is_file() else None for path in (folder / SHEET_NAME, folder / MANIFEST_NAME)]
        table = grid_html(labels, cells, is_running=False)
        return {self.grid: table, **self._said("What was drawn last", *files)}

    def _select(self, last: Any, pressed: gr.EventData) -> Updates:
        number, ids = str(told_by(pressed).get("cell")), last[2] if last else []
        known = number.isdecimal() and int(number) < len(ids)
        return self.detail.show(self.studio.history.picture(ids[int(number)]), ids) if known else {}


class Labels(NamedTuple):
    """The rows and columns of a grid, whose cells come row by row."""

    rows: Sequence[str]
    columns: Sequence[str]


def labels_of(request: GridRequest, names: Mapping[str, str]) -> Labels:
    """Return the labels: a column per choice; with one choice, a column per seed. `names` are adapters'."""
    prompts = [printable(prompt, _SHOWN) for prompt in request.prompts]
    seeds = [f"Seed {seed}" for seed in request.seeds]
    if len(request.choices) == 1 and len(seeds) > 1:
        return Labels(prompts if len(prompts) > 1 else [""], seeds)
    columns = [
        " + ".join(f"{printable(names.get(name, name))} {s:g}" for name, s in choice.items()) or "Base"
        for choice in request.choices
    ]
    if len(prompts) > 1:
        seeds = [f"{prompt} · {seed.lower()}" for prompt in prompts for seed in seeds]
    return Labels(seeds, columns)


def grid_html(labels: Labels, cells: Sequence[SavedPicture], *, is_running: bool) -> Markup:
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
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(label) for label in labels.columns)
    return _TABLE.format(width=width, head=head, rows=rows)

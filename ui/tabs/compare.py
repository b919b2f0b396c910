"""The tab Compare: a grid over prompts, seeds, adapters and strengths, whose cells stream in."""

from collections.abc import Sequence

import gradio as gr

from ether_diffusion.ui.errors import handler, sentence
from ether_diffusion.ui.facts import counted, duration, notes_html, quiet_html
from ether_diffusion.ui.grid_page import grid_html, labels_of
from ether_diffusion.ui.jobs import Finished, SavedPicture
from ether_diffusion.ui.requests import GridRequest
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.drawing_tab import EMPTY, MAX_AT_ONCE, Cells, DrawingTab
from ether_diffusion.ui.tabs.form import GridForm, Values, choices
from ether_diffusion.ui.tabs.history import PictureDetail
from ether_diffusion.ui.tabs.parts import QUIET, Refresh, TabParts, Updates

ON_CLICK = """element.addEventListener("click", (event) => {
  const cell = event.target.closest("[data-cell]");
  if (cell) trigger("click", { cell: Number(cell.dataset.cell) });
});"""


def build(studio: Studio) -> TabParts:
    """Lay out the tab and tie its events."""
    with gr.Tab("Compare", id="compare") as tab:
        page = CompareTab(GridForm(studio, "compare"))
    adapters = page.form["adapters"]

    @handler
    def refresh() -> Updates:
        return {adapters: gr.update(choices=choices(page.form.names()))}

    return TabParts(tab, refresh=Refresh(refresh, [adapters]), sendings=[page.detail.sending])


class CompareTab(DrawingTab):
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    form: GridForm
    go_label, what, has_looks = "Draw grid", "cell", False
    empty = EMPTY.format("The grid appears here, cell by cell.")

    def lay_out_head(self) -> None:
        words = "Write a prompt to see what the grid costs."
        self.cost = gr.HTML(quiet_html(words), elem_id="compare-cost")

    def lay_out_settings(self) -> None:
        self.form.put_rest()

    def lay_out_results(self) -> None:
        self.status = gr.HTML(visible=False, elem_id="compare-status")
        self.grid = gr.HTML(self.empty, js_on_load=ON_CLICK, elem_id="compare-grid")
        with gr.Row(visible=False, elem_classes="tool-row") as self.files:
            self.sheet = gr.DownloadButton("Sheet (PNG)", elem_id="compare-sheet")
            self.manifest = gr.DownloadButton("Manifest (JSON)", elem_id="compare-manifest")
        self.notes = gr.HTML(visible=False, elem_id="compare-notes")
        self.detail = PictureDetail("compare", self.studio)
        self.cells: gr.State = gr.State(())

    def tie(self) -> None:
        fields = self.form.all()
        drawn = [self.cost, self.status, self.grid, self.files, self.sheet, self.manifest, self.notes]
        self.go.click(
            handler(self.draw), fields, [self.go, self.stop, *drawn, self.cells, *self.detail.all()],
            concurrency_limit=MAX_AT_ONCE, **QUIET,
        )  # fmt: skip
        gr.on(
            [widget.change for widget in self.form.widgets.values()],
            handler(self.show_cost), fields, [self.cost], trigger_mode="always_last", queue=False, **QUIET,
        )  # fmt: skip
        self.grid.click(handler(self.select), [self.cells], self.detail.all(), **QUIET)

    def show_cost(self, values: Values) -> Updates:
        """Say what the grid of the form would cost, or why it cannot be drawn."""
        try:
            request = self.form.read(values)
            self.studio.engine.cost.check(request.sampling())
            return {self.cost: self._cost(request)}
        except ValueError as error:
            return {self.cost: notes_html(sentence(error), kind="warning")}

    def _cost(self, request: GridRequest) -> str:
        sampling = request.sampling()
        seconds = self.studio.engine.cost.seconds(sampling)
        how_long = "how long is known after the first picture"
        how_long = how_long if seconds is None else f"about {duration(seconds)}"
        cells = sampling.num_pictures
        words = [counted(cells, "picture"), counted(cells * request.steps, "step"), how_long]
        return quiet_html(" · ".join(words))

    def starting(self, request: GridRequest) -> Updates:
        return {self.files: gr.update(visible=False), **self.detail.hide()}

    def cells_of(self, request: GridRequest) -> Cells:
        labels = labels_of(request, self.form.names())

        def show(cells: Sequence[SavedPicture], is_running: bool) -> Updates:
            page = grid_html(labels, cells, is_running=is_running, is_small=self.is_small)
            cost: Updates = {} if is_running else {self.cost: self._cost(request)}
            return {self.grid: page, self.cells: tuple(cells), **cost}

        return show

    def failed(self) -> Updates:
        return {self.status: gr.update(visible=False), self.grid: self.empty, self.cells: ()}

    def finished(self, event: Finished) -> Updates:
        words = f"{counted(len(event.pictures), 'picture')} in {duration(event.seconds)}"
        if event.stopped:
            words = f"Stopped: {words}, which History keeps; no sheet was made"
        elif event.pictures:
            words += ". Choose one to see it large and to use its settings."
        return {
            self.status: quiet_html(words),
            self.files: gr.update(visible=event.sheet is not None),
            self.sheet: gr.update(value=event.sheet),
            self.manifest: gr.update(value=event.manifest, visible=event.manifest is not None),
        }

    def select(self, cells: tuple[SavedPicture, ...], chosen: gr.EventData) -> Updates:
        """Show a cell large."""
        number = (chosen._data or {}).get("cell")
        if not isinstance(number, int) or not 0 <= number < len(cells):
            return {}
        return self.detail.show(cells[number])

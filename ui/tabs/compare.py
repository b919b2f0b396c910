"""The tab Compare: a grid over prompts, seeds, adapters and strengths, whose cells stream in."""

from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr
from gradio.blocks import Block

from ether_diffusion.ui.errors import handler, sentence
from ether_diffusion.ui.events import CellDone, Event, Finished, SavedPicture
from ether_diffusion.ui.facts import counted, duration, notes_html, progress_html, state_words
from ether_diffusion.ui.grid_page import Labels, cost_words, grid_html, labels_of
from ether_diffusion.ui.numbers import MAX_TEXT, read_lines, read_seeds, read_strengths, read_text
from ether_diffusion.ui.requests import MAX_PROMPT, GridRequest
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.form import Form, Values, choices, keep_in_browser
from ether_diffusion.ui.tabs.parts import SMALL, Refresh, TabParts, Updates
from ether_diffusion.ui.tabs.picture_detail import PictureDetail
from ether_diffusion.ui.tabs.result import MAX_AT_ONCE, RunButtons

MAX_PROMPTS_TEXT = 20 * MAX_PROMPT
"""Characters of all prompts together."""
EMPTY = '<div class="empty"><p>The grid appears here, cell by cell.</p></div>'
ON_CLICK = """element.addEventListener("click", (event) => {
  const cell = event.target.closest("[data-cell]");
  if (cell) trigger("click", { cell: Number(cell.dataset.cell) });
});"""


def build(studio: Studio) -> TabParts:
    """Lay out the tab and tie its events."""
    with gr.Tab("Compare", id="compare") as tab:
        page = CompareTab(studio)
    return TabParts(
        tab,
        refresh=Refresh(handler(page.refresh), [page.form["adapters"]]),
        sendings=[page.detail.sending],
    )


class GridForm(Form):
    """What a grid is made of."""

    def lay_out_prompts(self) -> None:
        """Lay out the first thing on the tab."""
        prompts = gr.Textbox(
            label="Prompts", placeholder="One on each line", lines=2, max_lines=12,
            max_length=MAX_PROMPTS_TEXT, scale=5, elem_id="compare-prompts",
        )  # fmt: skip
        self.add("prompts", prompts, _read_prompts)

    def lay_out_rest(self) -> None:
        """Lay out the rest of the form."""
        with gr.Group():
            self.lay_out_choice("Adapters", "Each has a column for every strength.")
            strengths = gr.Textbox(
                "0.5, 1", label="Strengths", info="1 is as trained.", max_length=MAX_TEXT,
                elem_id="compare-strengths",
            )  # fmt: skip
            self.add("strengths", strengths, lambda text, _: read_strengths(text or ""))
            self.add("with_base", gr.Checkbox(True, label="A column of the base", elem_id="compare-base"))
            seeds = gr.Textbox(
                "0-1", label="Seeds", info="Numbers or ranges: 0-3, 7", max_length=MAX_TEXT,
                elem_id="compare-seeds",
            )  # fmt: skip
            self.add("seeds", seeds, lambda text, _: read_seeds(text or ""))
        with gr.Group():
            self.lay_out_sampling()
        self.lay_out_advanced()

    def read(self, values: Values) -> GridRequest:
        """Return the grid that the visitor asks for.

        Raises:
            ValueError: it cannot be drawn, or is larger than allowed.
        """
        found = self.read_fields(values, self.fields)
        return GridRequest(**found | {"adapters": tuple(found["adapters"] or ())})

    def fill_from_kept(self, kept: Mapping[str, Any]) -> Updates:
        """Return the updates that bring back what a browser kept; none of them where it kept nonsense."""
        try:
            request = self.read({widget: kept[name] for name, widget in self.kept().items()})
        except (KeyError, TypeError, ValueError, AttributeError):
            return {}
        names = self.names()
        typed = {name: str(kept[name]) for name in ("prompts", "strengths", "seeds")}
        return {
            **{widget: ({**vars(request), **typed})[name] for name, widget in self.kept().items()},
            **self.fill_sides(request.width, request.height),
            self["adapters"]: gr.update(
                choices=choices(names), value=[name for name in request.adapters if name in names]
            ),
        }


def _read_prompts(text: object, called: str) -> tuple[str, ...]:
    prompts = read_lines(read_text(text, called))
    if not prompts:
        raise ValueError("there is no prompt; write one, or several with one on each line")
    return prompts


class CompareTab:
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, studio: Studio) -> None:
        self._studio, self.form = studio, GridForm(studio, "compare")
        self._is_small = studio.engine.native_size < SMALL
        self._lay_out()
        self._tie()
        keep_in_browser("compare", self.form.kept(), self.form.fill_from_kept)

    def _lay_out(self) -> None:
        with gr.Row(elem_classes="prompt-row", equal_height=True):
            self.form.lay_out_prompts()
            self.buttons = RunButtons("compare", "Draw grid")
        self.cost = gr.HTML(
            '<p class="quiet" role="status">Write a prompt to see what the grid costs.</p>',
            elem_id="compare-cost",
        )
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=2, min_width=300, elem_classes="settings"):
                self.form.lay_out_rest()
            with gr.Column(scale=3, min_width=300, elem_classes="results"):
                self.status = gr.HTML(visible=False, elem_id="compare-status")
                self.grid = gr.HTML(EMPTY, js_on_load=ON_CLICK, elem_id="compare-grid")
                with gr.Row(visible=False, elem_classes="tool-row") as self.files:
                    self.sheet = gr.DownloadButton("Sheet (PNG)", elem_id="compare-sheet")
                    self.manifest = gr.DownloadButton("Manifest (JSON)", elem_id="compare-manifest")
                self.notes = gr.HTML(visible=False, elem_id="compare-notes")
                self.detail = PictureDetail("compare", self._studio)
        self.cells: gr.State = gr.State(())

    def _tie(self) -> None:
        private = {"api_visibility": "private", "show_progress": "hidden"}
        gr.on(
            [self.buttons.go.click],
            handler(self.draw),
            inputs=set(self.form.all()),
            outputs=[*self.buttons.both(), *self.drawn()],
            concurrency_limit=MAX_AT_ONCE,
            **private,
        )
        self.buttons.tie(private)
        gr.on(
            [widget.change for widget in self.form.all()],
            handler(self.show_cost),
            inputs=set(self.form.all()),
            outputs=[self.cost],
            trigger_mode="always_last",
            queue=False,
            **private,
        )
        self.grid.click(handler(self.select), [self.cells], self.detail.all(), **private)

    def drawn(self) -> list[Block]:
        """Return what `draw` gives values to, beside the buttons."""
        shown = [self.cost, self.status, self.grid, self.files, self.sheet, self.manifest, self.notes]
        return [*shown, self.cells, *self.detail.all()]

    def refresh(self) -> Updates:
        """Show the adapters there are."""
        return {self.form["adapters"]: gr.update(choices=choices(self.form.names()))}

    def show_cost(self, values: Values) -> Updates:
        """Say what the grid of the form would cost, or why it cannot be drawn."""
        try:
            request = self.form.read(values)
            self._studio.engine.check(request)
            return {self.cost: self._cost(request)}
        except ValueError as error:
            return {self.cost: notes_html(sentence(error), (), kind="warning")}

    def _cost(self, request: GridRequest) -> str:
        words = cost_words(request, self._studio.engine.seconds_per_step(request))
        return f'<p class="quiet" role="status">{words}</p>'

    def draw(self, values: Values, visitor: gr.Request) -> Iterator[Updates]:
        """Draw the grid of the form, a cell at a time."""
        request = self.form.read(values)
        labels = labels_of(request, self.form.names())
        cells: list[SavedPicture] = []

        def after(event: Event) -> Updates:
            if isinstance(event, CellDone):
                cells.append(event.picture)
                return {self.cells: tuple(cells), self.grid: self._table(labels, cells, is_running=True)}
            if isinstance(event, Finished):
                return {self.cost: self._cost(request), **self._finished(event, labels)}
            done, words = state_words(event, what="cell")
            return {self.status: progress_html(done, words)}

        yield from self.buttons.run(
            visitor,
            lambda stop: self._studio.engine.draw(request, stop),
            starting={
                self.status: gr.update(value=progress_html(0, "Starting …"), visible=True),
                self.grid: self._table(labels, (), is_running=True),
                self.cells: (),
                self.files: gr.update(visible=False),
                self.notes: gr.update(visible=False),
                **self.detail.hide(),
            },
            after=after,
            failed=lambda: {self.status: gr.update(visible=False), self.grid: EMPTY, self.cells: ()},
        )

    def _table(
        self, labels: Labels, cells: list[SavedPicture] | tuple[SavedPicture, ...], *, is_running: bool
    ) -> str:
        return grid_html(labels, cells, is_running=is_running, is_small=self._is_small)

    def _finished(self, event: Finished, labels: Labels) -> Updates:
        words = f"{counted(len(event.pictures), 'picture')} in {duration(event.seconds)}"
        if event.stopped:
            words = f"Stopped: {words}, which History keeps; no sheet was made"
        elif event.pictures:
            words += ". Choose one to see it large and to use its settings."
        return {
            self.status: gr.update(value=f'<p class="quiet" role="status">{words}</p>', visible=True),
            self.grid: self._table(labels, event.pictures, is_running=False),
            self.cells: event.pictures,
            self.files: gr.update(visible=event.sheet is not None),
            self.sheet: gr.update(value=event.sheet),
            self.manifest: gr.update(value=event.manifest, visible=event.manifest is not None),
            self.notes: gr.update(value=notes_html("Good to know", event.notes), visible=bool(event.notes)),
        }

    def select(self, cells: tuple[SavedPicture, ...], chosen: gr.EventData) -> Updates:
        """Show a cell large."""
        number = (chosen._data or {}).get("cell")
        if not isinstance(number, int) or not 0 <= number < len(cells):
            return {}
        return self.detail.show(cells[number])

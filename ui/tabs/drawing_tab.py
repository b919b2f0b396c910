"""What tabs that draw have in common: a form, two buttons, and a job's progress, then its pictures."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.facts import (
    counted,
    duration,
    facts_html,
    figure_html,
    notes_html,
    picture_facts,
    preview_html,
    progress_html,
    quiet_html,
    state_words,
)
from ether_diffusion.ui.jobs import CellDone, Finished, Previewing, RunningJobs, SavedPicture
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.restore import Restored, restore
from ether_diffusion.ui.tabs.form import Form, PictureForm, Values, choices, keep_in_browser
from ether_diffusion.ui.tabs.parts import QUIET, SMALL, Refresh, TakingParts, Updates

MAX_AT_ONCE = 24
"""Visitors that wait for the engine at a time; each takes a thread of the server while it does."""
IN_CONTROL = "It followed a control image, and only the tab Control draws with those: drop it there."
EMPTY = '<div class="empty"><p>{}</p></div>'
Cells = Callable[[Sequence[SavedPicture], bool], Updates]


class DrawingTab:
    """A tab that draws what its form says; made inside a gr.Tab.

    Looks while drawing are in the status: a widget mounted anew at every step makes the page lose updates.
    """

    go_label, what, has_looks = "Generate", "picture", True
    empty = EMPTY.format("Your pictures appear here.")
    status: gr.HTML
    notes: gr.HTML

    def __init__(self, form: Form) -> None:
        self.form, self.studio, self.prefix = form, form.studio, form.prefix
        self.is_small = self.studio.engine.native_size < SMALL
        self.look = ["picture", "sharp"] if self.is_small else ["picture"]
        self.jobs = RunningJobs()
        with gr.Row(elem_classes="prompt-row", equal_height=True):
            form.put(form.first)
            with gr.Column(scale=1, min_width=150, elem_classes="go-column"):
                self.go = gr.Button(self.go_label, variant="primary", elem_id=f"{self.prefix}-go")
                self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id=f"{self.prefix}-stop")
        self.lay_out_head()
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=2, min_width=300, elem_classes="settings"):
                self.lay_out_settings()
            with gr.Column(scale=3, min_width=300, elem_classes="results"):
                self.lay_out_results()
        self.tie()
        self.stop.click(handler(self.stop_drawing), outputs=[self.stop], queue=False, **QUIET)
        keep_in_browser(self.prefix, form.kept(), form.fill_from_kept)

    def lay_out_head(self) -> None:
        """Lay out what stands between the prompt and the columns."""

    def lay_out_settings(self) -> None:
        """Lay out the rest of the form."""

    def lay_out_results(self) -> None:
        """Lay out `status` and `notes`, and between them what is drawn."""

    def tie(self) -> None:
        """Tie the events."""

    def starting(self, request: Any) -> Updates:
        """Return what makes room for a new job."""
        return {}

    def cells_of(self, request: Any) -> Cells:
        """Return what shows the cells of a grid while it is drawn, if it is one."""
        return lambda cells, is_running: {}

    def finished(self, event: Finished) -> Updates:
        """Return what shows the end of a job."""
        return {}

    def failed(self) -> Updates:
        """Return what shows nothing; the error says why."""
        return {}

    def draw(self, values: Values, visitor: gr.Request) -> Iterator[Updates]:
        """Draw what the form says and show what the job tells; a visitor who leaves stops it."""
        request = self.form.read(values)
        cells, show_cells = list[SavedPicture](), self.cells_of(request)
        ready = {self.go: gr.update(visible=True), self.stop: gr.update(visible=False)}
        with self.jobs.hold(visitor.session_hash) as stop:
            yield {
                self.go: gr.update(visible=False),
                self.stop: gr.update(visible=True, value="Stop", interactive=True),
                self.status: gr.update(value=progress_html(0, "Starting …"), visible=True),
                self.notes: gr.update(visible=False),
                **show_cells(cells, True),
                **self.starting(request),
            }
            try:
                for event in self.studio.engine.draw(request, stop):
                    if isinstance(event, CellDone):
                        cells.append(event.picture)
                        yield show_cells(cells, True)
                    elif isinstance(event, Finished):  # in one piece, as pages drop updates that come at once
                        notes = notes_html("Good to know", event.notes)
                        yield {
                            **ready,
                            self.notes: gr.update(value=notes, visible=bool(event.notes)),
                            **show_cells(event.pictures, False),
                            **self.finished(event),
                        }
                    else:
                        shown = progress_html(*state_words(event, what=self.what))
                        if self.has_looks and isinstance(event, Previewing) and event.image is not None:
                            shown += preview_html(event.image, is_small=self.is_small)
                        yield {self.status: shown}
            except Exception:
                yield ready | self.failed()
                raise

    def stop_drawing(self, request: gr.Request) -> Updates:
        """Stop what this visitor draws; the engine ends at the next step."""
        self.jobs.stop(request.session_hash)
        return {self.stop: gr.update(value="Stopping …", interactive=False)}


class PictureTab(DrawingTab):
    """A tab of pictures of one prompt, each beside the base's, with a field that takes a picture back in."""

    form: PictureForm
    beside = "With adapter"

    def lay_out_head(self) -> None:
        self.restored = gr.HTML(visible=False, elem_id=f"{self.prefix}-restored")
        self.missing = gr.HTML(visible=False, elem_id=f"{self.prefix}-missing")

    def lay_out_settings(self) -> None:
        self.form.put_rest()
        self.drop = gr.File(
            label="Restore settings from a picture", file_types=[".png"], height=104,
            elem_id=f"{self.prefix}-drop", elem_classes="drop",
        )  # fmt: skip

    def lay_out_results(self) -> None:
        """Lay out what is drawn: one of pair and single is visible at a time."""
        prefix = self.prefix
        large: dict[str, Any] = {
            "visible": False, "show_label": False, "format": "png", "type": "filepath",
            "buttons": ["fullscreen"], "interactive": False, "elem_classes": self.look,
        }  # fmt: skip
        self.status = gr.HTML(self.empty, elem_id=f"{prefix}-status")
        self.pair = gr.ImageSlider(
            label="Base and adapter", max_height=640, elem_id=f"{prefix}-pair", **large
        )
        sides = f'<div class="sides"><span>Base</span><span>{self.beside}</span></div>'
        self.caption = gr.HTML(sides, visible=False, elem_id=f"{prefix}-sides")
        self.single = gr.Image(label="Picture", elem_id=f"{prefix}-picture", **large)
        self.gallery = thumbnails(f"{prefix}-gallery")
        self.download = gr.DownloadButton("Download PNG", visible=False, elem_id=f"{prefix}-download")
        self.notes = gr.HTML(visible=False, elem_id=f"{prefix}-notes")
        self.settings = gr.Accordion(
            "Settings of this picture", open=False, visible=False, elem_id=f"{prefix}-facts"
        )
        with self.settings:
            self.facts = gr.HTML()
        self.used = gr.HTML(visible=False, elem_id=f"{prefix}-used")
        self.shown, self.selected = gr.State(), gr.State(0)

    def shows(self) -> list[Block]:
        """Return what `select` gives values to."""
        pictures = [self.pair, self.caption, self.single, self.gallery, self.download]
        return [*pictures, self.settings, self.facts, self.shown, self.selected]

    def tie(self) -> None:
        form = self.form
        self.on_start(
            [self.go.click, form["prompt"].submit],
            fn=handler(self.draw),
            inputs=form.all(),
            outputs=[
                self.go, self.stop, form["seed"], form.reuse, self.used, self.status, self.notes,
                *self.shows(),
            ],
            concurrency_limit=MAX_AT_ONCE,
            **QUIET,
        )  # fmt: skip
        form.tie()
        on_show, seeds = [self.shown, self.selected], [form["seed"], form["new_seed"]]
        form.reuse.click(handler(self.last_seed), on_show, seeds, **QUIET)
        self.gallery.select(handler(self.select), [self.shown], self.shows(), **QUIET)
        self.drop.upload(handler(self.take_picture), [self.drop], self.filled(), **QUIET)

    def on_start(self, events: list[Any], **draw: Any) -> None:
        """Draw on events."""
        gr.on(events, **draw)

    def starting(self, request: GenerateRequest) -> Updates:
        return {self.form["seed"]: request.seed, self.used: self.followed(request), **self._hidden()}

    def failed(self) -> Updates:
        hidden = gr.update(visible=False)
        return {self.status: gr.update(value=self.empty, visible=True), self.used: hidden, **self._hidden()}

    def _hidden(self) -> Updates:
        pictures = (self.pair, self.single, self.gallery)
        emptied: Updates = {widget: gr.update(value=None, visible=False) for widget in pictures}
        others = (self.caption, self.download, self.settings)
        return emptied | {widget: gr.update(visible=False) for widget in others}

    def finished(self, event: Finished) -> Updates:
        reuse = {self.form.reuse: gr.update(interactive=True)}
        if not event.pictures:
            return (
                self._hidden()
                | reuse
                | {self.status: notes_html("Stopped before the first picture was done")}
            )
        words = [f"{counted(len(event.pictures), 'picture')} in {duration(event.seconds)}"]
        words = ["Stopped", *words] if event.stopped else words
        if event.touched_layers:
            words.append(f"the adapter acts on {counted(event.touched_layers, 'layer')}")
        seeds = [(picture.path, f"Seed {_seed(picture)}") for picture in event.pictures]
        return {
            self.shown: event,
            self.status: quiet_html(" · ".join(words)),
            self.gallery: gr.update(value=seeds, visible=len(event.pictures) > 1, selected_index=0),
            **self._show(event, 0),
            **reuse,
        }

    def _show(self, event: Finished, index: int) -> Updates:
        picture, base = event.pictures[index], next(iter(event.base_pictures[index : index + 1]), None)
        facts = [] if picture.metadata is None else picture_facts(picture.metadata)
        return {
            self.selected: index,
            self.pair: gr.update(value=(base.path, picture.path) if base else None, visible=base is not None),
            self.caption: gr.update(visible=base is not None),
            self.single: gr.update(value=None if base else picture.path, visible=base is None),
            self.download: gr.update(value=picture.path, visible=True),
            self.settings: gr.update(visible=bool(facts)),
            self.facts: facts_html(facts),
        }

    def select(self, shown: Finished | None, chosen: gr.SelectData) -> Updates:
        """Show one of several pictures large."""
        index = chosen.index if isinstance(chosen.index, int) else 0
        return self._show(shown, index) if shown and 0 <= index < len(shown.pictures) else {}

    def last_seed(self, shown: Finished | None, selected: int) -> tuple[Any, Any]:
        """Return the seed of the picture on show for the form, which then keeps it."""
        seed = None if shown is None else _seed(shown.pictures[selected])
        return (gr.skip(), gr.skip()) if seed is None else (seed, False)

    def parts(self, tab: gr.Tab) -> TakingParts:
        """Return what other tabs need of this one."""
        refresh = Refresh(handler(self.refresh), self.refreshed())
        return TakingParts(tab, refresh=refresh, take=handler(self.take), taken=self.filled())

    def filled(self) -> list[Any]:
        """Return what `take` gives values to."""
        return [*self.form.widgets.values(), self.used, self.drop, self.restored]

    def refreshed(self) -> list[Any]:
        """Return what `refresh` gives values to."""
        return [self.form["adapters"], self.missing]

    def refresh(self) -> Updates:
        """Show the adapters there are: those for another base are named, with the reason, but not offered."""
        unfit = [f"{c.name}: {c.why_not}" for c in self.studio.library.cards() if not c.fits_base]
        heading = f"{counted(len(unfit), 'adapter')} cannot be used here"
        return {
            self.form["adapters"]: gr.update(choices=choices(self.form.names())),
            self.missing: gr.update(value=notes_html(heading, unfit), visible=bool(unfit)),
        }

    def take_picture(self, path: str | None) -> Updates:
        """Fill the form from a picture that was dropped, and say what differs."""
        return {} if path is None else self.take(restore(Path(path), self.studio))

    def take(self, restored: Restored) -> Updates:
        """Fill the form with restored settings, and say what is not as it was."""
        return self.taken(restored, IN_CONTROL if restored.followed_control else "")

    def taken(self, restored: Restored, further: str) -> Updates:
        """Fill what every form has; `further` is a difference that this tab makes."""
        differences = [*restored.differences, *filter(None, [further])]
        usual = "Settings restored, with differences" if differences else "All settings restored"
        heading = restored.heading or usual if restored.request else "The form was left as it is"
        said = notes_html(heading, differences, kind="warning" if differences else "note")
        filled = {} if restored.request is None else PictureForm.fill(self.form, restored.request)
        return filled | {self.drop: None, self.restored: gr.update(value=said, visible=True)}

    def followed(self, asked: GenerateRequest) -> Any:
        """Return the update that shows the control image that is followed."""
        if asked.control_image is None:
            return gr.update(visible=False)
        figure = figure_html(asked.control_image, "Control image that is followed", is_small=self.is_small)
        return gr.update(value=figure, visible=True)


def thumbnails(elem_id: str) -> gr.Gallery:
    """Lay out small pictures to choose from."""
    return gr.Gallery(
        visible=False, label="Pictures", show_label=False, format="png", columns=4, height="auto", buttons=[],
        allow_preview=False, interactive=False, object_fit="cover", elem_id=elem_id,
    )  # fmt: skip


def _seed(picture: SavedPicture) -> int | None:
    return None if picture.metadata is None else picture.metadata.seed

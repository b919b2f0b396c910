"""The buttons that draw and stop, and what a tab shows of a job: its progress with looks, then pictures."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.blocks import Block

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.events import CellDone, Event, Finished, Previewing, SavedPicture, StopToken
from ether_diffusion.ui.facts import (
    counted,
    duration,
    facts_html,
    notes_html,
    picture_facts,
    preview_html,
    progress_html,
    state_words,
)
from ether_diffusion.ui.jobs import RunningJobs
from ether_diffusion.ui.tabs.parts import Updates

MAX_AT_ONCE = 24
"""Visitors that wait for the engine at a time; each takes a thread of the server while it does."""
EMPTY = '<div class="empty"><p>Your pictures appear here.</p></div>'


@dataclass(frozen=True)
class Shown:
    """The pictures of the last job: each with that of the base, where it was drawn."""

    pictures: tuple[SavedPicture, ...] = ()
    base_pictures: tuple[SavedPicture, ...] = ()
    selected: int = 0


@dataclass(frozen=True)
class Result:
    """The widgets, one of pair and single visible at a time.

    Looks while drawing are in the status: a widget mounted anew at every step makes the page lose updates.
    """

    status: gr.HTML
    pair: gr.ImageSlider
    caption: gr.HTML
    single: gr.Image
    gallery: gr.Gallery
    download: gr.DownloadButton
    settings: gr.Accordion
    facts: gr.HTML
    notes: gr.HTML
    shown: gr.State
    is_small: bool

    def all(self) -> list[Block]:
        """Return every widget and the state."""
        return [part for part in vars(self).values() if isinstance(part, Block)]

    def tie(self, private: Mapping[str, Any]) -> None:
        """Let a click on one of several pictures show it."""
        self.gallery.select(handler(self.select), [self.shown], self.all(), **private)

    def starting(self) -> Updates:
        """Make room for a new job."""
        return {
            self.status: gr.update(value=progress_html(0, "Starting …"), visible=True),
            self.notes: gr.update(visible=False),
            **self._hidden(),
        }

    def failed(self) -> Updates:
        """Show nothing; the error says why."""
        return {self.status: gr.update(value=EMPTY, visible=True), **self._hidden()}

    def _hidden(self) -> Updates:
        pictures = (self.pair, self.single, self.gallery)
        others = (self.caption, self.download, self.settings)
        return {
            **{widget: gr.update(value=None, visible=False) for widget in pictures},
            **{widget: gr.update(visible=False) for widget in others},
        }

    def after(self, event: Event) -> Updates:
        """Show what a job just told."""
        if isinstance(event, Finished):
            return self._finished(event)
        assert not isinstance(event, CellDone)
        image = event.image if isinstance(event, Previewing) else None
        look = "" if image is None else preview_html(image, is_small=self.is_small)
        return {self.status: progress_html(*state_words(event)) + look}

    def _finished(self, event: Finished) -> Updates:
        shown = Shown(event.pictures, event.base_pictures)
        if not event.pictures:
            box = notes_html("Stopped before the first picture was done", ())
            return {**self.failed(), self.status: gr.update(value=box, visible=True)}
        words = [f"{counted(len(event.pictures), 'picture')} in {duration(event.seconds)}"]
        if event.stopped:
            words.insert(0, "Stopped")
        if event.touched_layers:
            words.append(f"the adapter acts on {counted(event.touched_layers, 'layer')}")
        return {
            self.shown: shown,
            self.status: gr.update(
                value=f'<p class="quiet" role="status">{" · ".join(words)}</p>', visible=True
            ),
            self.gallery: gr.update(
                value=[(picture.path, f"Seed {_seed(picture)}") for picture in event.pictures],
                visible=len(event.pictures) > 1,
                selected_index=0,
            ),
            self.notes: gr.update(value=notes_html("Good to know", event.notes), visible=bool(event.notes)),
            **self._show(shown),
        }

    def _show(self, shown: Shown) -> Updates:
        picture = shown.pictures[shown.selected]
        base = shown.base_pictures[shown.selected] if shown.selected < len(shown.base_pictures) else None
        facts = [] if picture.metadata is None else picture_facts(picture.metadata)
        return {
            self.pair: gr.update(value=(base.path, picture.path) if base else None, visible=base is not None),
            self.caption: gr.update(visible=base is not None),
            self.single: gr.update(value=None if base else picture.path, visible=base is None),
            self.download: gr.update(value=picture.path, visible=True),
            self.settings: gr.update(visible=bool(facts)),
            self.facts: facts_html(facts),
        }

    def select(self, shown: Shown, chosen: gr.SelectData) -> Updates:
        """Show one of several pictures large."""
        index = chosen.index if isinstance(chosen.index, int) else 0
        if not 0 <= index < len(shown.pictures):
            return {}
        shown = Shown(shown.pictures, shown.base_pictures, index)
        return {self.shown: shown, **self._show(shown)}

    def last_seed(self, shown: Shown) -> tuple[Any, Any]:
        """Return the seed of the picture on show for the form, which then keeps it."""
        seed = _seed(shown.pictures[shown.selected]) if shown.pictures else None
        return (gr.skip(), gr.skip()) if seed is None else (seed, False)


def _seed(picture: SavedPicture) -> int | None:
    return None if picture.metadata is None else picture.metadata.seed


def lay_out_result(prefix: str, *, is_small: bool, beside: str = "With adapter") -> Result:
    """Lay out the widgets, whose ids begin with `prefix`; small pictures are enlarged with sharp pixels.

    `beside` stands under the picture that is beside the base's.
    """
    look = ["picture", "sharp"] if is_small else ["picture"]
    status = gr.HTML(EMPTY, elem_id=f"{prefix}-status")
    pair = gr.ImageSlider(
        visible=False, label="Base and adapter", show_label=False, format="png", type="filepath",
        buttons=["fullscreen"], interactive=False, max_height=640, elem_id=f"{prefix}-pair",
        elem_classes=look,
    )  # fmt: skip
    caption = gr.HTML(
        f'<div class="sides"><span>Base</span><span>{beside}</span></div>',
        visible=False,
        elem_id=f"{prefix}-sides",
    )
    single = gr.Image(
        visible=False, label="Picture", show_label=False, format="png", type="filepath",
        buttons=["fullscreen"], interactive=False, elem_id=f"{prefix}-picture", elem_classes=look,
    )  # fmt: skip
    gallery = gr.Gallery(
        visible=False, label="Pictures", show_label=False, format="png", columns=4, height="auto", buttons=[],
        allow_preview=False, interactive=False, object_fit="cover", elem_id=f"{prefix}-gallery",
    )  # fmt: skip
    download = gr.DownloadButton("Download PNG", visible=False, elem_id=f"{prefix}-download")
    notes = gr.HTML(visible=False, elem_id=f"{prefix}-notes")
    with gr.Accordion(
        "Settings of this picture", open=False, visible=False, elem_id=f"{prefix}-facts"
    ) as settings:
        facts = gr.HTML()
    shown = gr.State(Shown())
    return Result(status, pair, caption, single, gallery, download, settings, facts, notes, shown, is_small)


class RunButtons:
    """The two buttons of a tab, and what each visitor has running there."""

    def __init__(self, prefix: str, label: str) -> None:
        """Lay out the buttons; their ids begin with `prefix`."""
        self.jobs = RunningJobs()
        with gr.Column(scale=1, min_width=150, elem_classes="go-column"):
            self.go = gr.Button(label, variant="primary", elem_id=f"{prefix}-go")
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id=f"{prefix}-stop")

    def both(self) -> list[gr.Button]:
        """Return the buttons."""
        return [self.go, self.stop]

    def tie(self, private: Mapping[str, Any]) -> None:
        """Let Stop stop."""
        self.stop.click(handler(self.stop_drawing), outputs=[self.stop], queue=False, **private)

    def run(
        self,
        visitor: gr.Request,
        work: Callable[[StopToken], Iterator[Event]],
        *,
        starting: Updates,
        after: Callable[[Event], Updates],
        failed: Callable[[], Updates],
    ) -> Iterator[Updates]:
        """Run a job of the engine and show what it tells; a visitor who leaves stops it."""
        stop = StopToken()
        with self.jobs.hold(visitor.session_hash, stop):
            yield {
                self.go: gr.update(visible=False),
                self.stop: gr.update(visible=True, value="Stop", interactive=True),
                **starting,
            }
            try:
                for event in work(stop):
                    updates = after(event)
                    if isinstance(event, Finished):
                        updates |= self._ready()  # in one piece, as pages drop updates that come at once
                    yield updates
            except Exception:
                yield self._ready() | failed()
                raise

    def _ready(self) -> Updates:
        return {self.go: gr.update(visible=True), self.stop: gr.update(visible=False)}

    def stop_drawing(self, request: gr.Request) -> Updates:
        """Stop what this visitor draws; the engine ends at the next step."""
        self.jobs.stop(request.session_hash)
        return {self.stop: gr.update(value="Stopping …", interactive=False)}

"""The tab Create: a prompt, adapters with their strengths, and pictures beside those of the base."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.events import Event, Finished
from ether_diffusion.ui.facts import counted, figure_html, notes_html
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.restore import Restored, restore
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.create_endpoint import add_endpoint
from ether_diffusion.ui.tabs.form import PictureForm, Values, choices, keep_in_browser
from ether_diffusion.ui.tabs.parts import SMALL, Refresh, TakingParts, Updates
from ether_diffusion.ui.tabs.result import MAX_AT_ONCE, RunButtons, lay_out_result

IN_CONTROL = "It followed a control image, and only the tab Control draws with those: drop it there."
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}


def build(studio: Studio) -> TakingParts:
    """Lay out the tab and tie its events."""
    with gr.Tab("Create", id="create") as tab:
        page = PictureTab(PictureForm(studio, "create"))
        add_endpoint(studio, page.form, page.buttons.jobs)
    return page.parts(tab)


class PictureTab:
    """A tab with a form, what it draws, and a field that takes a picture back in; made inside a gr.Tab."""

    beside, adapters, info = "With adapter", "Adapters", "None draws with the base alone."

    def __init__(self, form: PictureForm) -> None:
        self.form, self._studio = form, form.studio
        self._is_small = form.studio.engine.native_size < SMALL
        self._lay_out(form.prefix)
        self._tie()
        keep_in_browser(form.prefix, form.kept(), form.fill_from_kept)

    def _lay_out(self, prefix: str) -> None:
        form = self.form
        with gr.Row(elem_classes="prompt-row", equal_height=True):
            form.lay_out_prompt()
            self.buttons = RunButtons(prefix, "Generate")
        self.restored = gr.HTML(visible=False, elem_id=f"{prefix}-restored")
        self.missing = gr.HTML(visible=False, elem_id=f"{prefix}-missing")
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=2, min_width=300, elem_classes="settings"):
                self._lay_out_source()
                with gr.Group():
                    form.lay_out_adapters(self.adapters, self.info)
                form.lay_out_rest()
                self.drop = gr.File(
                    label="Restore settings from a picture", file_types=[".png"], height=104,
                    elem_id=f"{prefix}-drop", elem_classes="drop",
                )  # fmt: skip
            with gr.Column(scale=3, min_width=300, elem_classes="results"):
                self.result = lay_out_result(prefix, is_small=self._is_small, beside=self.beside)
                self.used = gr.HTML(visible=False, elem_id=f"{prefix}-used")

    def _lay_out_source(self) -> None:
        """Lay out what stands above the adapters."""

    def _tie(self) -> None:
        form = self.form
        self._on_start(
            [self.buttons.go.click, form["prompt"].submit],
            fn=handler(self.draw),
            inputs=set(form.all()),
            outputs=[*self.buttons.both(), form["seed"], form.reuse, self.used, *self.result.all()],
            concurrency_limit=MAX_AT_ONCE,
            **PRIVATE,
        )
        self.buttons.tie(PRIVATE)
        self.result.tie(PRIVATE)
        form.tie(self.result.last_seed, self.result.shown, PRIVATE)
        self.drop.upload(handler(self.take_picture), [self.drop], self.filled(), **PRIVATE)

    def _on_start(self, events: list[Any], **draw: Any) -> None:
        gr.on(events, **draw)

    def parts(self, tab: gr.Tab) -> TakingParts:
        """Return what other tabs need of this one."""
        refresh = Refresh(handler(self.refresh), self.refreshed())
        return TakingParts(tab, refresh=refresh, take=handler(self.take), taken=self.filled())

    def filled(self) -> list[Component]:
        """Return what `take` gives values to."""
        return [*self.form.all(), self.used, self.drop, self.restored]

    def refreshed(self) -> list[Component]:
        """Return what `refresh` gives values to."""
        return [self.form["adapters"], self.missing]

    def refresh(self) -> Updates:
        """Show the adapters there are: those for another base are named, with the reason, but not offered."""
        cards = self._studio.library.cards()
        unfit = [f"{card.name}: {card.why_not}" for card in cards if not card.fits_base]
        heading = f"{counted(len(unfit), 'adapter')} cannot be used here"
        return {
            self.form["adapters"]: gr.update(choices=choices(self.form.names())),
            self.missing: gr.update(value=notes_html(heading, unfit), visible=bool(unfit)),
        }

    def draw(self, values: Values, visitor: gr.Request) -> Iterator[Updates]:
        """Draw what the form says, showing how far it is, and which control image is followed."""
        asked, form = self.form.read(values), self.form

        def after(event: Event) -> Updates:
            further = {form.reuse: gr.update(interactive=True)} if isinstance(event, Finished) else {}
            return self.result.after(event) | further

        yield from self.buttons.run(
            visitor,
            lambda stop: self._studio.engine.draw(asked, stop),
            starting={form["seed"]: asked.seed, self.used: self._followed(asked), **self.result.starting()},
            after=after,
            failed=lambda: self.result.failed() | {self.used: gr.update(visible=False)},
        )

    def take_picture(self, path: str | None) -> Updates:
        """Fill the form from a picture that was dropped, and say what differs."""
        return {} if path is None else self.take(restore(Path(path), self._studio))

    def take(self, restored: Restored) -> Updates:
        """Fill the form with restored settings, and say what is not as it was."""
        filled = {} if restored.request is None else PictureForm.fill(self.form, restored.request)
        return {**filled, **self._tell(restored, [IN_CONTROL] if restored.followed_control else [])}

    def _tell(self, restored: Restored, further: list[str]) -> Updates:
        """Return the updates that empty the field for pictures and say what differs."""
        differences = [*restored.differences, *further]
        usual = "Settings restored, with differences" if differences else "All settings restored"
        heading = restored.heading or usual if restored.request else "The form was left as it is"
        said = notes_html(heading, differences, kind="warning" if differences else "note")
        return {self.drop: None, self.restored: gr.update(value=said, visible=True)}

    def _followed(self, asked: GenerateRequest) -> Any:
        if asked.control_image is None:
            return gr.update(visible=False)
        figure = figure_html(asked.control_image, "Control image that is followed", is_small=self._is_small)
        return gr.update(value=figure, visible=True)

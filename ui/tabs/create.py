"""The tab Create: a prompt, adapters with their strengths, and pictures beside those of the base."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.events import Event, Finished
from ether_diffusion.ui.facts import counted, notes_html
from ether_diffusion.ui.restore import Restored, restore
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.create_endpoint import add_endpoint
from ether_diffusion.ui.tabs.create_form import (
    Values,
    choices,
    lay_out_adapters,
    lay_out_form,
    lay_out_prompt,
)
from ether_diffusion.ui.tabs.create_result import lay_out_result
from ether_diffusion.ui.tabs.dropped_picture import DroppedPicture, lay_out_box, lay_out_drop
from ether_diffusion.ui.tabs.keep_form import keep_in_browser
from ether_diffusion.ui.tabs.parts import Refresh, TakingParts, Updates
from ether_diffusion.ui.tabs.run_buttons import MAX_AT_ONCE, RunButtons

SMALL = 256
"""Pictures of fewer pixels a side are shown with their pixels sharp."""
IN_CONTROL = "It followed a control image, and only the tab Control draws with those: drop it there."


def build(studio: Studio) -> TakingParts:
    """Lay out the tab and tie its events."""
    with gr.Tab("Create", id="create") as tab:
        page = CreateTab(studio)
    return TakingParts(
        tab,
        refresh=Refresh(handler(page.refresh), page.refreshed()),
        take=handler(page.take),
        taken=page.filled(),
    )


class CreateTab:
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._lay_out()
        self._tie()
        keep_in_browser("create", self.form.named(), self._fill_from_browser)
        add_endpoint(studio, self.form, self.buttons.jobs)

    def _lay_out(self) -> None:
        with gr.Row(elem_classes="prompt-row", equal_height=True):
            prompt = lay_out_prompt("create")
            self.buttons = RunButtons("create", "Generate")
        box = lay_out_box("create")
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=2, min_width=300, elem_classes="settings"):
                with gr.Group():
                    adapters, strengths = lay_out_adapters("create")
                self.unfit = gr.HTML(visible=False, elem_id="create-unfit")
                self.form, self.dice, self.reuse = lay_out_form(
                    "create", self._studio, prompt, adapters, strengths
                )
                self.dropped = DroppedPicture(lay_out_drop("create"), box)
            with gr.Column(scale=3, min_width=300, elem_classes="results"):
                self.result = lay_out_result("create", is_small=self._studio.engine.native_size < SMALL)

    def _tie(self) -> None:
        form, private = self.form, {"api_visibility": "private", "show_progress": "hidden"}
        gr.on(
            [self.buttons.go.click, form.prompt.submit],
            handler(self.draw),
            inputs=set(form.all()),
            outputs=[*self.buttons.both(), form.seed, self.reuse, *self.result.all()],
            concurrency_limit=MAX_AT_ONCE,
            **private,
        )
        self.buttons.tie(private)
        self.dice.click(None, js=f"() => Math.floor(Math.random() * {2**32})", outputs=[form.seed], **private)
        form.seed.input(None, js="() => false", outputs=[form.new_seed], **private)
        self.reuse.click(
            handler(self.result.last_seed), [self.result.shown], [form.seed, form.new_seed], **private
        )
        form.adapters.input(
            handler(self.choose),
            inputs={form.adapters, *form.strengths},
            outputs=list(form.strengths),
            **private,
        )
        self.dropped.file.upload(handler(self.take_picture), [self.dropped.file], self.filled(), **private)
        self.result.tie(private)

    def filled(self) -> list[Component]:
        """Return what `fill` gives values to."""
        return [*self.form.all(), *self.dropped.both()]

    def refreshed(self) -> list[Component]:
        """Return what `refresh` gives values to."""
        return [self.form.adapters, self.unfit]

    def names(self) -> dict[str, str]:
        """Return the adapters that can be chosen, id to name."""
        return {card.id: card.name for card in self._studio.library.cards() if card.fits_base}

    def refresh(self) -> Updates:
        """Show the adapters there are: those for another base are named, with the reason, but not offered."""
        unfit = [
            f"{card.name}: {card.why_not}" for card in self._studio.library.cards() if not card.fits_base
        ]
        heading = f"{counted(len(unfit), 'adapter')} cannot be used here"
        return {
            self.form.adapters: gr.update(choices=choices(self.names())),
            self.unfit: gr.update(value=notes_html(heading, unfit), visible=bool(unfit)),
        }

    def choose(self, values: Values) -> Updates:
        """Show a slider for every chosen adapter."""
        return self.form.show_strengths(values[self.form.adapters] or [], self.names(), {})

    def draw(self, values: Values, request: gr.Request) -> Iterator[Updates]:
        """Draw what the form says, showing how far it is."""
        asked = self.form.read(values)
        yield from self.buttons.run(
            request,
            lambda stop: self._studio.engine.draw(asked, stop),
            starting={self.form.seed: asked.seed, **self.result.starting()},
            after=self._after,
            failed=self.result.failed,
        )

    def _after(self, event: Event) -> Updates:
        further = {self.reuse: gr.update(interactive=True)} if isinstance(event, Finished) else {}
        return self.result.after(event) | further

    def take_picture(self, path: str | None) -> Updates:
        """Fill the form from a picture that was dropped, and say what differs."""
        if path is None:
            return {}
        return self.take(restore(Path(path), self._studio))

    def _fill_from_browser(self, kept: Mapping[str, Any]) -> Updates:
        names = self.names()
        return self.form.fill_from_kept(kept, names)

    def take(self, restored: Restored) -> Updates:
        """Fill the form with restored settings, and say what is not as it was."""
        request = restored.request
        filled = {} if request is None else self.form.fill(request, self.names())
        further = [IN_CONTROL] if restored.followed_control else []
        return {**filled, **self.dropped.tell(restored, further)}

"""The tab Control: a control image says where, a prompt says what, and subjects say who."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.events import Event, Finished
from ether_diffusion.ui.facts import figure_html, notes_html
from ether_diffusion.ui.library import Card
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.restore import Restored, restore
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.control_form import (
    DRAW,
    TAKE_DRAWING,
    UPLOAD,
    ControlForm,
    lay_out_following,
    lay_out_source,
)
from ether_diffusion.ui.tabs.create import SMALL
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

NONE_YET = "There is no control adapter yet"
IN_CREATE = "It followed no control image; the tab Create draws it as it was."
GET_ONE = "Train one with the command train-control, and add it in the tab Library."


def build(studio: Studio) -> TakingParts:
    """Lay out the tab and tie its events."""
    with gr.Tab("Control", id="control") as tab:
        page = ControlTab(studio)
    return TakingParts(
        tab,
        refresh=Refresh(handler(page.refresh), page.refreshed()),
        take=handler(page.take),
        taken=page.filled(),
    )


class ControlTab:
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._is_small = studio.engine.native_size < SMALL
        self._lay_out()
        self._tie()
        keep_in_browser("control", self.form.named(), self._fill_from_browser)

    def _lay_out(self) -> None:
        with gr.Row(elem_classes="prompt-row", equal_height=True):
            prompt = lay_out_prompt("control")
            self.buttons = RunButtons("control", "Generate")
        box = lay_out_box("control")
        self.none = gr.HTML(visible=False, elem_id="control-none")
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=2, min_width=300, elem_classes="settings"):
                following = lay_out_following()
                source = lay_out_source(self._studio)
                with gr.Group():
                    subjects, strengths = lay_out_adapters(
                        "control", label="Subjects", info="Drawn together with the control adapter."
                    )
                rest, self.dice, self.reuse = lay_out_form(
                    "control", self._studio, prompt, subjects, strengths
                )
                self.form = ControlForm(*following, *source, rest)
                self.dropped = DroppedPicture(lay_out_drop("control"), box)
            with gr.Column(scale=3, min_width=300, elem_classes="results"):
                self.result = lay_out_result("control", is_small=self._is_small, beside="With control")
                self.used = gr.HTML(visible=False, elem_id="control-used")

    def _tie(self) -> None:
        form, rest = self.form, self.form.rest
        private = {"api_visibility": "private", "show_progress": "hidden"}
        taken = gr.on(
            [self.buttons.go.click, rest.prompt.submit],
            None,
            js=TAKE_DRAWING,
            outputs=[form.drawing],
            api_visibility="private",
        )
        taken.then(
            handler(self.draw),
            inputs=set(form.all()),
            outputs=[*self.buttons.both(), rest.seed, self.reuse, self.used, *self.result.all()],
            concurrency_limit=MAX_AT_ONCE,
            **private,
        )
        self.buttons.tie(private)
        self.result.tie(private)
        gr.on(
            [form.adapter.change, rest.width.change, rest.height.change],
            handler(self.follow),
            inputs={form.adapter, rest.width, rest.height},
            outputs=[form.sketch, form.adapter_strength],
            trigger_mode="always_last",
            **private,
        )
        form.source.change(
            handler(form.show_source), [form.source], [form.sketch, form.upload, form.detector], **private
        )
        rest.adapters.input(
            handler(self.choose),
            inputs={rest.adapters, *rest.strengths},
            outputs=list(rest.strengths),
            **private,
        )
        self.dice.click(None, js=f"() => Math.floor(Math.random() * {2**32})", outputs=[rest.seed], **private)
        rest.seed.input(None, js="() => false", outputs=[rest.new_seed], **private)
        self.reuse.click(
            handler(self.result.last_seed), [self.result.shown], [rest.seed, rest.new_seed], **private
        )

        self.dropped.file.upload(handler(self.take_picture), [self.dropped.file], self.filled(), **private)

    def filled(self) -> list[Component]:
        """Return what `take` gives values to."""
        return [*self.form.all(), self.form.sketch, self.used, *self.dropped.both()]

    def _names(self, kind: str) -> dict[str, str]:
        return {card.id: card.name for card in self._cards() if card.kind == kind}

    def _cards(self) -> list[Card]:
        return [card for card in self._studio.library.cards() if card.fits_base]

    def refreshed(self) -> list[Component]:
        """Return what `refresh` gives values to."""
        return [self.form.adapter, self.form.rest.adapters, self.none]

    def refresh(self) -> Updates:
        """Show the adapters there are, those that follow and those of subjects; the only one is chosen."""
        following = self._names("control")
        chosen = {"value": next(iter(following))} if len(following) == 1 else {}
        return {
            self.form.adapter: gr.update(choices=choices(following), **chosen),
            self.form.rest.adapters: gr.update(choices=choices(self._names("subject"))),
            self.none: gr.update(value=notes_html(NONE_YET, [GET_ONE]), visible=not following),
        }

    def follow(self, values: Values) -> Updates:
        """Give the canvas the classes that the chosen adapter follows, and the size of the pictures."""
        return self.form.follow(values, self._studio)

    def choose(self, values: Values) -> Updates:
        """Show a slider for every chosen subject."""
        rest = self.form.rest
        return rest.show_strengths(values[rest.adapters] or [], self._names("subject"), {})

    def draw(self, values: Values, visitor: gr.Request) -> Iterator[Updates]:
        """Draw what the form says, showing how far it is and which control image is followed."""
        asked = self.form.read(values, self._studio)
        yield from self.buttons.run(
            visitor,
            lambda stop: self._studio.engine.draw(asked, stop),
            starting={
                self.form.rest.seed: asked.seed,
                self.used: self._followed(asked),
                **self.result.starting(),
            },
            after=self._after,
            failed=lambda: self.result.failed() | {self.used: gr.update(visible=False)},
        )

    def take_picture(self, path: str | None) -> Updates:
        """Fill the form from a picture that was dropped, its control image included, and say what differs."""
        return {} if path is None else self.take(restore(Path(path), self._studio))

    def take(self, restored: Restored) -> Updates:
        """Fill the form with restored settings, and say what is not as it was."""
        request, subjects = restored.request, self._names("subject")
        if request is None:
            return self.dropped.tell(restored)
        if not restored.followed_control:
            return {**self.form.rest.fill(request, subjects), **self.dropped.tell(restored, [IN_CREATE])}
        following = self._names("control")
        return {
            **self.form.fill(request, self._studio, following=following, subjects=subjects),
            **self.dropped.tell(restored),
            self.used: self._followed(request),
        }

    def _followed(self, asked: GenerateRequest) -> Any:
        if asked.control_image is None:
            return gr.update(visible=False)
        figure = figure_html(asked.control_image, "Control image that is followed", is_small=self._is_small)
        return gr.update(value=figure, visible=True)

    def _after(self, event: Event) -> Updates:
        further = {self.reuse: gr.update(interactive=True)} if isinstance(event, Finished) else {}
        return self.result.after(event) | further

    def _fill_from_browser(self, kept: Mapping[str, Any]) -> Updates:
        form, names = self.form, self._names("control")
        updates = form.rest.fill_from_kept(kept, self._names("subject"))
        adapter, source = kept.get("adapter"), kept.get("source")
        if adapter in names:
            updates[form.adapter] = gr.update(choices=choices(names), value=adapter)
        if source in (DRAW, UPLOAD):
            updates[form.source] = source
        for name in ("control_strength", "adapter_strength"):
            value = kept.get(name)
            if isinstance(value, int | float) and 0 <= value <= 2:
                updates[form.named()[name]] = value
        return updates

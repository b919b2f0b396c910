"""The tab Train: photos of a subject, a name and a preset; the run is a process of its own, watched here."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.create import SMALL
from ether_diffusion.ui.tabs.create_form import Values
from ether_diffusion.ui.tabs.keep_form import keep_in_browser
from ether_diffusion.ui.tabs.parts import Sending, TabParts, Updates
from ether_diffusion.ui.tabs.train_form import describe, lay_out_form, lay_out_subject
from ether_diffusion.ui.tabs.train_photos import TrainPhotos
from ether_diffusion.ui.tabs.train_watch import TrainWatch

SHOW_RUN = """() => { if (window.innerWidth <= 760) document.getElementById("train-watch")
  .scrollIntoView({ behavior: "smooth" }); }"""


def build(studio: Studio) -> TabParts:
    """Lay out the tab and tie its events."""
    with gr.Tab("Train", id="train") as tab:
        page = TrainTab(studio)
    watch = page.watch
    return TabParts(
        tab, sendings=[Sending(watch.used, watch.restored)], adapter_changes=[watch.taken, watch.used]
    )


class TrainTab:
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        with gr.Row(elem_classes="train-columns"):
            with gr.Column(scale=2, min_width=300, elem_classes="settings"):
                self.photos = TrainPhotos(studio)
                subject, name = lay_out_subject()
                self.described = gr.HTML(elem_id="train-described")
                self.form = lay_out_form(subject, name)
                with gr.Accordion("Command line", open=False):
                    self.command = gr.Textbox(
                        label="What Start runs, in the studio's folder", lines=3, max_lines=12,
                        interactive=False, buttons=["copy"], elem_id="train-command",
                    )  # fmt: skip
                self.go = gr.Button("Start training", variant="primary", elem_id="train-go")
            with gr.Column(scale=3, min_width=300, elem_classes="results", elem_id="train-watch"):
                self.watch = TrainWatch(studio, is_small=studio.engine.native_size < SMALL)
        self._tie()
        keep_in_browser("train", self.form.named(), self._fill_from_browser)

    def _tie(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        fields = self.form.all()
        described = [self.described, self.command]
        gr.on(
            [field.change for field in fields],
            handler(self.describe), inputs=set(fields), outputs=described, trigger_mode="always_last",
            queue=False, **quiet,
        )  # fmt: skip
        gr.context.Context.root_block.load(handler(self.describe), set(fields), described, **quiet)
        started = self.go.click(handler(self.start), {self.photos.kept, *fields}, self.watch.shown(), **quiet)
        started.success(None, js=SHOW_RUN, api_visibility="private")

    def describe(self, values: Values) -> tuple[str, str]:
        """Say how the subject will be called, and what command trains it."""
        return describe(self.form, values, self._studio)

    def start(self, values: Values) -> Updates:
        """Start a run of what the form says, and show it."""
        photos = tuple(photo.path for photo in self.photos.accepted(values[self.photos.kept]))
        return self.watch.show(self._studio.train(self.form.read(values, photos)))

    def _fill_from_browser(self, kept: Mapping[str, Any]) -> Updates:
        return self.form.fill_from_kept(kept)

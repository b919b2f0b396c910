"""What stands above the tabs: the base, what it is, and a panel that opens another one."""

from collections.abc import Iterator
from concurrent.futures import wait
from functools import partial
from typing import Any

import gradio as gr
from markupsafe import Markup

from ether_diffusion.bases.found import cached_bytes
from ether_diffusion.ui.jobs import in_background
from ether_diffusion.ui.tabs.page import Page, Panel, Updates
from ether_diffusion.ui.words import kilobytes, notes_html, progress_html
from ether_diffusion.wording import printable

POLL_SECONDS = 0.5
TOY = "a toy that draws {} drawn concepts: photographs of real things cannot be learned on it"
_HEADING = Markup('<h1>Ether studio</h1><p class="quiet" data-base="{base}">Base: {base}{what}</p>')
_ANYTHING = "Or type a folder in diffusers' layout, a .safetensors file, or a hub id like owner/name."
_LISTED = "Those that lie on the studio's machine; who works there can open others."


class BasePanel(Panel):
    """The heading and the panel; made where the page begins."""

    def __init__(self, page: Page, app: gr.Blocks) -> None:
        super().__init__(page, "base")
        self._app, is_shared = app, page.studio.is_shared
        with gr.Row(elem_classes="heading", equal_height=True):
            self.heading = gr.HTML(self.said(), elem_id="heading")
            small: dict[str, Any] = {"size": "sm", "min_width": 110, "scale": 0}
            change = self.button("change", "Change base", **small)
            dark = gr.Button("Dark or light", elem_id="scheme", **small)
            if is_shared:
                gr.Button("Log out", link="logout", elem_id="logout", **small)
        with gr.Column(visible=False, elem_classes="confirm", elem_id="base-panel") as self.panel:
            which: dict[str, Any] = {"info": _LISTED if is_shared else _ANYTHING, "elem_id": "base-name"}
            self.name = gr.Dropdown([], label="Base to open", allow_custom_value=not is_shared, **which)
            self.status = self.html("status", visible=False)
            with gr.Row(elem_classes="tool-row"):
                self.go, close = self.button("go", "Open", variant="primary"), self.button("close", "Close")
        dark.click(None, js="() => { window.etherStudio.switchScheme(); }", api_visibility="private")
        self.on(change.click, self._show)
        self.closes(close, self.panel)
        self.on(self.go.click, self._open, [self.name])

    def said(self) -> Markup:
        """Return the heading of now."""
        what = f", {TOY.format(len(self.studio.known))}" if self.studio.is_toy else ""
        return _HEADING.format(base=self.studio.engine.base_name, what=what)

    def _show(self) -> Updates:
        found = [
            (f"{name} ({each.problem or f'{each.kind}, {kilobytes(each.num_bytes)}'})"[:160], name)
            for name, each in self.studio.bases().items()
        ]
        return {
            self.panel: gr.update(visible=True),
            self.name: gr.update(choices=found, value=None),
            self.status: gr.update(visible=False),
        }

    def _open(self, name: str | None) -> Iterator[Updates]:
        """Open a base and tell meanwhile what came from the hub; pages load themselves anew then."""
        if not name or not name.strip():
            raise ValueError("there is no base chosen; choose one, or type where it is")
        opened = in_background(partial(self.studio.open_base, name.strip()))
        busy, ready = {self.go: gr.update(interactive=False)}, {self.go: gr.update(interactive=True)}
        try:
            before = cached_bytes(name.strip())
            while not wait([opened], POLL_SECONDS).done:
                came = cached_bytes(name.strip()) - before
                words = f"Downloading it: {kilobytes(came)} so far" if came else "Looking at its files …"
                yield busy | {self.status: gr.update(value=progress_html(0, words), visible=True)}
            opened.result()
            self.heading.value = self.said()
            self.page.begin_anew(self._app)
        except Exception:
            yield ready | {self.status: gr.update(visible=False)}
            raise
        said = notes_html(f"{printable(self.studio.engine.base_name)} is open")
        yield ready | {self.status: gr.update(value=said, visible=True), self.heading: self.said()}

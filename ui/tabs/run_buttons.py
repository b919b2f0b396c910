"""The button that draws and the one that stops: of the two, a visitor sees the one that makes sense."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import gradio as gr

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.events import Finished, StopToken
from ether_diffusion.ui.jobs import RunningJobs
from ether_diffusion.ui.tabs.parts import Updates

E = TypeVar("E")
MAX_AT_ONCE = 24
"""Visitors that wait for the engine at a time; each takes a thread of the server while it does."""


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
        work: Callable[[StopToken], Iterator[E]],
        *,
        starting: Updates,
        after: Callable[[E], Updates],
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

"""The field that takes a picture back in, and the box that says what of its settings came back."""

from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr
from gradio.components import Component

from ether_diffusion.ui.facts import notes_html
from ether_diffusion.ui.restore import Restored
from ether_diffusion.ui.tabs.parts import Updates


@dataclass(frozen=True)
class DroppedPicture:
    """The two widgets of a tab with a form."""

    file: gr.File
    box: gr.HTML

    def both(self) -> list[Component]:
        """Return what `tell` gives values to."""
        return [self.file, self.box]

    def tell(self, restored: Restored, further: Sequence[str] = ()) -> Updates:
        """Return the updates that empty the field and say what differs; `further` is what the tab says."""
        differences = [*restored.differences, *further]
        if restored.request is None:
            heading = "The form was left as it is"
        else:
            usual = "Settings restored, with differences" if differences else "All settings restored"
            heading = restored.heading or usual
        said = notes_html(heading, differences, kind="warning" if differences else "note")
        return {self.file: None, self.box: gr.update(value=said, visible=True)}


def lay_out_box(prefix: str) -> gr.HTML:
    """Lay out the box, which appears with the first picture."""
    return gr.HTML(visible=False, elem_id=f"{prefix}-restored")


def lay_out_drop(prefix: str) -> gr.File:
    """Lay out the field."""
    return gr.File(
        label="Restore settings from a picture",
        file_types=[".png"],
        height=104,
        elem_id=f"{prefix}-drop",
        elem_classes="drop",
    )

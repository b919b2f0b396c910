"""The tab Control: a control image says where, a prompt says what, and subjects say who."""

import io
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ether_diffusion.adapters import Adapter, read_adapter
from ether_diffusion.training.plain_files import UnusableFileError, read_plain_file
from ether_diffusion.ui.control_images import canvas_html, read_control_upload, read_drawing
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.restore import Restored
from ether_diffusion.ui.tabs.create import PictureTab
from ether_diffusion.ui.tabs.form import DRAW, UPLOAD, Form
from ether_diffusion.ui.tabs.page import Panel, Updates, Values
from ether_diffusion.ui.tabs.picture_form import PictureForm
from ether_diffusion.ui.uploads import MAX_PHOTO_BYTES, thumbnail_png
from ether_diffusion.ui.words import notes_html

NONE_YET = "There is no control adapter yet"
IN_CREATE = "It followed no control image; the tab Create draws it as it was."
GET_ONE = "Train one with the command train-control, and add it in the tab Library."


class ControlForm(PictureForm):
    """The settings of pictures whose adapters are subjects, and what says where: drawn or uploaded."""

    label, info = "Subjects", "Drawn together with the control adapter."

    def put_rest(self, panel: Panel) -> None:
        with gr.Group():
            self.put("adapter", "source")
        side = self.studio.engine.native_size
        self.put("sketch", value=canvas_html("palette", width=side, height=side))
        self.put("drawing", "upload", "detector")
        with gr.Group():
            self.put("control_strength", "adapter_strength")
        super().put_rest(panel)
        suiting = [self[name] for name in ("adapter", "width", "height")]
        suited, sources = (
            [self["sketch"], self["adapter_strength"]],
            [self["sketch"], self["upload"], self["detector"]],
        )
        changes = [widget.change for widget in suiting]
        panel.on(changes, self._follow, set(suiting), suited, trigger_mode="always_last")
        panel.on(self["source"].change, self.show_source, [self["source"]], sources)

    def asked(self, named: Mapping[str, Any]) -> GenerateRequest:
        """Return what the visitor asks for, but for the control image; the control adapter is the first."""
        request, adapter = super().asked(named), named["adapter"] or "none"
        strengths = {adapter: named["adapter_strength"], **request.adapters}
        return replace(request, adapters=strengths, control_strength=named["control_strength"])

    def read(self, named: Mapping[str, Any]) -> GenerateRequest:
        request, adapter, upload = super().read(named), named["adapter"], named["upload"]
        if not adapter:
            raise ValueError("there is no control adapter chosen; choose the one that shall follow")
        follower = self._follower(adapter)
        strength = named["adapter_strength"] if follower.parts else 1.0
        is_drawn, (height, width) = named["source"] == DRAW, request.size(self.studio.engine.base)
        if not is_drawn and not upload:
            raise ValueError("there is no control image; upload one, or draw it")
        with self.studio.reading:
            if is_drawn:
                image = read_drawing(named["drawing"] or "", _control_type(follower))
            else:
                how: Any = {"width": width, "height": height, "control_type": _control_type(follower)}
                image = read_control_upload(Path(upload["path"]), named["detector"] or "", **how)
        return replace(request, adapters={**request.adapters, adapter: strength}, control_image=image)

    def _follower(self, adapter_id: str) -> Adapter:
        adapter = read_adapter(self.studio.library.folder(adapter_id))
        if adapter.encoder is None:
            remedy = "choose one that was trained with control"
            raise ValueError(f"this adapter follows no control image; {remedy}")
        return adapter

    def _follow(self, values: Values) -> Updates:
        """Suit the canvas to the classes that the chosen adapter follows, and to the size of the pictures."""
        named = self.named(values)
        follower = self._follower(named["adapter"]) if named["adapter"] else None
        shown = gr.update(visible=follower is None or bool(follower.parts))
        page = canvas_html(_control_type(follower), **self.canvas_size(named))
        return {self["sketch"]: gr.update(value=page), self["adapter_strength"]: shown}

    def show_source(self, source: str, **upload: Any) -> Updates:
        """Show what belongs to drawing, or to uploading; `upload` is given to the field of uploads."""
        drawn = source == DRAW
        return {
            self["sketch"]: gr.update(visible=drawn),
            self["upload"]: gr.update(visible=not drawn, **upload),
            self["detector"]: gr.update(visible=not drawn, **({"value": ""} if upload else {})),
        }

    def follow_upload(self, path: Path | None) -> Updates:
        """Return the updates that make an upload the control image, if there is one."""
        upload = None if path is None else str(path)
        return {self["source"]: UPLOAD, **self.show_source(UPLOAD, value=upload)}

    def fill(self, restored: Restored) -> Updates:
        """Return the updates that make the form say a request, whether or not it follows a control image.

        One that did not come back is left to be uploaded: what was drawn on the canvas meanwhile is another.
        """
        filled, request = super().fill(restored), restored.request
        if request is None or not restored.followed_control:
            return filled
        names, image = self.names("control"), request.control_image
        adapter = next((name for name in request.adapters if name in names), "")
        kept = None if image is None else self.studio.engine.outputs.keep_control(image)
        strength = request.adapters.get(adapter, 1.0)
        said = {
            "adapter": adapter,
            "adapter_strength": strength,
            "control_strength": request.control_strength,
        }
        return filled | Form.shown(self, said) | self.follow_upload(kept)


class ControlTab(PictureTab):
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    form: ControlForm
    make_form, beside = ControlForm, "With control"

    def tie(self) -> None:
        super().tie()
        upload = self.form["upload"]
        self.on(upload.upload, lambda path: {self.used: self._preview(path)}, [upload], [self.used])

    def _preview(self, path: str | Path) -> Any:
        file = Path(path)
        with suppress(UnusableFileError), self.studio.reading:  # what is wrong is said when it is followed
            data = read_plain_file(file, inside=file.parent, max_bytes=MAX_PHOTO_BYTES)
            return self.followed(Image.open(io.BytesIO(thumbnail_png(data, file.suffix))))
        return self.followed(None)

    def refresh(self) -> Updates:
        """Show the adapters there are, those that follow and those of subjects; the only one is chosen."""
        following = self.form.names("control")
        chosen = {"value": next(iter(following))} if len(following) == 1 else {}
        missing = gr.update(value=notes_html(NONE_YET, [GET_ONE]), visible=not following)
        return {**self.form.offer("adapter", **chosen), **self.form.offer(), self.missing: missing}

    def beyond(self, restored: Restored) -> str:
        return "" if restored.request is None or restored.followed_control else IN_CREATE

    def take(self, restored: Restored) -> Updates:
        if (picture := restored.control_picture) is not None:
            said = notes_html("It is the control image now", ["Say below what it is, and write a prompt."])
            shown = {self.used: self._preview(picture), self.restored: gr.update(value=said, visible=True)}
            return self.form.follow_upload(picture) | shown
        image = None if restored.request is None else restored.request.control_image
        followed = {self.used: self.followed(image)} if restored.followed_control else {}
        return super().take(restored) | followed


def _control_type(adapter: Adapter | None) -> str | None:
    return None if adapter is None or adapter.encoder is None else adapter.encoder.config.control_type

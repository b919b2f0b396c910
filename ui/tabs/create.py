"""The tab Create: a prompt, adapters with their strengths, and pictures beside the base's; also /generate."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ether_diffusion.ui.control_images import read_control_upload
from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.jobs import Finished, RunningJobs, SavedPicture
from ether_diffusion.ui.numbers import read_number, read_text
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.drawing_tab import PictureTab
from ether_diffusion.ui.tabs.form import FIELDS, PictureForm
from ether_diffusion.ui.tabs.parts import TakingParts

MAX_AT_ONCE = 8
"""Scripts."""
Pictures = list[tuple[str, str]]


def build(studio: Studio) -> TakingParts:
    """Lay out the tab and tie its events."""
    with gr.Tab("Create", id="create") as tab:
        page = PictureTab(PictureForm(studio, "create"))
        add_endpoint(studio, page.form, page.jobs)
    return page.parts(tab)


def add_endpoint(studio: Studio, form: PictureForm, jobs: RunningJobs) -> None:
    """Add /generate to the API of the page; its own widgets are never shown."""

    @handler
    def generate(
        visitor: gr.Request,
        prompt: str,
        adapters: dict[str, float] | None,
        seed: float,
        steps: float,
        guidance_scale: float,
        width: float,
        height: float,
        num_images: float,
        negative_prompt: str,
        compare_with_base: bool,
        keep_metadata: bool,
        control_strength: float,
        control_detector: str,
        control_image: dict[str, Any] | None = None,
    ) -> tuple[Pictures, Pictures, dict[str, Any]]:
        """Draw pictures with adapters, {id: strength}, and by the base beside them on the same seeds.

        One of the adapters may follow a control image; the detector makes that of a photo. Returns the
        pictures, those of the base, and how it went: seconds, touched_layers, notes.
        """
        if not isinstance(prompt, str):
            raise ValueError("prompt must be text; found nothing")
        sent = {
            "prompt": prompt, "seed": seed, "steps": steps, "guidance_scale": guidance_scale, "width": width,
            "height": height, "num_images": num_images, "negative_prompt": negative_prompt,
            "compare_with_base": compare_with_base, "keep_metadata": keep_metadata,
            "control_strength": control_strength,
        }  # fmt: skip
        request = GenerateRequest(
            adapters=_strengths(adapters),
            **{name: FIELDS[name].read(value, name) for name, value in sent.items()},
        )
        studio.engine.cost.check(request.sampling())
        detector = read_text(control_detector, "control_detector")
        request = _with_control(studio, request, control_image, detector)
        with jobs.hold(visitor.session_hash) as stop:
            for end in studio.engine.draw(request, stop):  # noqa: B007 (the last one counts)
                pass
        assert isinstance(end, Finished)
        facts = {"touched_layers": end.touched_layers, "notes": list(end.notes)}
        return _files(end.pictures), _files(end.base_pictures), {"seconds": round(end.seconds, 3), **facts}

    numbers = [  # the page's own have limits, of which Gradio says no more than that they are passed
        gr.Number(form[name].value, visible=False, label=form[name].label)
        for name in ("seed", "steps", "guidance_scale", "width", "height", "num_images")
    ]
    inputs = [
        form["prompt"],
        gr.JSON({}, visible=False, label="Adapters: {id: strength}"),
        *numbers,
        *(form[name] for name in ("negative_prompt", "compare_with_base", "keep_metadata")),
        gr.Number(1.0, visible=False, label="Strength of the control image"),
        gr.Textbox("", visible=False, label="Detector: canny, silhouette, palette or none"),
        gr.JSON(visible=False, label="Control image, or the photo for a detector: an uploaded file"),
    ]
    outputs = [
        gr.Gallery(visible=False, label="Pictures", format="png"),
        gr.Gallery(visible=False, label="Pictures of the base", format="png"),
        gr.JSON(visible=False, label="How it went"),
    ]
    gr.Button(visible=False).click(
        generate, inputs, outputs, api_name="generate", concurrency_limit=MAX_AT_ONCE, show_progress="hidden"
    )


def _with_control(studio: Studio, request: GenerateRequest, file: object, detector: str) -> GenerateRequest:
    if file is None:
        if detector:
            raise ValueError("a detector was named, and there is no control_image for it; send one")
        return request
    if not isinstance(file, dict) or not isinstance(file.get("path"), str):
        raise ValueError("control_image must be a file that was uploaded, as by gradio_client's handle_file")
    native = studio.engine.native_size
    width, height = request.width or native, request.height or native
    with studio.reading:
        image = read_control_upload(Path(file["path"]), detector, width=width, height=height)
    return replace(request, control_image=image)


def _strengths(adapters: object) -> dict[str, float]:
    if not isinstance(adapters, dict | None):
        raise ValueError('adapters are given as {id: strength}, for example {"fox": 0.8}')
    return {str(name): read_number(strength, "a strength") for name, strength in (adapters or {}).items()}


def _files(pictures: tuple[SavedPicture, ...]) -> Pictures:
    return [(str(picture.path), picture.id) for picture in pictures]

"""The endpoint /generate for scripts: the work of Create and Control, with adapters by their ids."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ether_diffusion.ui.control_source import read_control_upload
from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.events import Event, Finished, SavedPicture, StopToken
from ether_diffusion.ui.jobs import RunningJobs
from ether_diffusion.ui.numbers import read_number, read_text
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.form import PictureForm

MAX_AT_ONCE = 8
Pictures = list[tuple[str, str]]
Answer = tuple[Pictures, Pictures, dict[str, Any]]


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
    ) -> Answer:
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
        }  # fmt: skip
        request = GenerateRequest(
            adapters=_strengths(adapters),
            control_strength=read_number(control_strength, "control_strength"),
            **{name: form.fields[name].read(value, name) for name, value in sent.items()},
        )
        studio.engine.check(request)
        request = _with_control(
            studio, request, control_image, read_text(control_detector, "control_detector")
        )
        stop = StopToken()
        with jobs.hold(visitor.session_hash, stop):
            return _answer(studio.engine.draw(request, stop))

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
    if adapters is None:
        return {}
    if not isinstance(adapters, dict):
        raise ValueError('adapters are given as {id: strength}, for example {"fox": 0.8}')
    return {str(name): read_number(strength, "a strength") for name, strength in adapters.items()}


def _answer(events: Iterator[Event]) -> Answer:
    for event in events:
        if isinstance(event, Finished):
            facts = {
                "seconds": round(event.seconds, 3),
                "touched_layers": event.touched_layers,
                "notes": list(event.notes),
            }
            return _files(event.pictures), _files(event.base_pictures), facts
    raise ValueError("the studio is being closed; try again later")


def _files(pictures: tuple[SavedPicture, ...]) -> Pictures:
    return [(str(picture.path), picture.id) for picture in pictures]

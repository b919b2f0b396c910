"""The endpoint /generate for scripts: the work of Create and Control, with adapters by their ids."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ether_diffusion.ui.control_source import read_control_upload
from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.events import Event, Finished, SavedPicture, StopToken
from ether_diffusion.ui.jobs import RunningJobs
from ether_diffusion.ui.numbers import read_number, read_optional, read_switch, read_text, read_whole
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.create_form import Form

MAX_AT_ONCE = 8
Pictures = list[tuple[str, str]]
Answer = tuple[Pictures, Pictures, dict[str, Any]]


def add_endpoint(studio: Studio, form: Form, jobs: RunningJobs) -> None:
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
        sides = read_optional(width, "width"), read_optional(height, "height")
        if not isinstance(prompt, str):
            raise ValueError("prompt must be text; found nothing")
        request = GenerateRequest(
            prompt=prompt,
            adapters=_strengths(adapters),
            seed=read_whole(seed, "seed"),
            steps=read_whole(steps, "steps"),
            guidance_scale=read_number(guidance_scale, "guidance_scale"),
            num_images=read_whole(num_images, "num_images"),
            negative_prompt=read_text(negative_prompt, "negative_prompt"),
            compare_with_base=read_switch(compare_with_base, "compare_with_base"),
            control_strength=read_number(control_strength, "control_strength"),
            keep_metadata=read_switch(keep_metadata, "keep_metadata"),
            width=sides[0],
            height=sides[1],
        )
        studio.engine.check(request)
        detector = read_text(control_detector, "control_detector")
        image = _control_image(studio, control_image, detector, *sides)
        request = replace(request, control_image=image)
        stop = StopToken()
        with jobs.hold(visitor.session_hash, stop):
            return _answer(studio.engine.draw(request, stop))

    numbers = {  # the page's own have limits, of which Gradio says no more than that they are passed
        name: gr.Number(getattr(form, name).value, visible=False, label=getattr(form, name).label)
        for name in ("seed", "steps", "guidance_scale", "width", "height", "num_images")
    }
    adapters = gr.JSON({}, visible=False, label="Adapters: {id: strength}")
    strength = gr.Number(1.0, visible=False, label="Strength of the control image")
    detector = gr.Textbox("", visible=False, label="Detector: canny, silhouette, palette or none")
    image = gr.JSON(visible=False, label="Control image, or the photo for a detector: an uploaded file")
    outputs = [
        gr.Gallery(visible=False, label="Pictures", format="png"),
        gr.Gallery(visible=False, label="Pictures of the base", format="png"),
        gr.JSON(visible=False, label="How it went"),
    ]
    inputs = [
        form.prompt, adapters, *numbers.values(), form.negative_prompt, form.compare_with_base,
        form.keep_metadata, strength, detector, image,
    ]  # fmt: skip
    gr.Button(visible=False).click(
        generate, inputs, outputs, api_name="generate", concurrency_limit=MAX_AT_ONCE, show_progress="hidden"
    )


def _control_image(
    studio: Studio, file: object, detector: str, width: int | None, height: int | None
) -> Image.Image | None:
    if file is None:
        if detector:
            raise ValueError("a detector was named, and there is no control_image for it; send one")
        return None
    if not isinstance(file, dict) or not isinstance(file.get("path"), str):
        raise ValueError("control_image must be a file that was uploaded, as by gradio_client's handle_file")
    native = studio.engine.native_size
    with studio.reading:
        return read_control_upload(
            Path(file["path"]), detector, width=width or native, height=height or native
        )


def _strengths(adapters: object) -> dict[str, float]:
    if adapters is None:
        return {}
    if not isinstance(adapters, dict) or not all(
        isinstance(strength, int | float) and not isinstance(strength, bool) for strength in adapters.values()
    ):
        raise ValueError('adapters are given as {id: strength}, for example {"fox": 0.8}')
    return {str(name): float(strength) for name, strength in adapters.items()}


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

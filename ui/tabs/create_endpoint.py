"""The endpoint /generate for scripts: the work of Create and Control, with adapters by their ids."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ether_diffusion.ui.control_source import read_control_upload
from ether_diffusion.ui.events import Event, Finished, SavedPicture, StopToken
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.create_form import Form, whole
from ether_diffusion.ui.wiring import RunningJobs, handler

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
        control_image: str | None = None,
    ) -> Answer:
        """Draw pictures with adapters, {id: strength}, and by the base beside them on the same seeds.

        One of the adapters may follow a control image; the detector makes that of a photo. Returns the
        pictures, those of the base, and how it went: seconds, touched_layers, notes.
        """
        request = GenerateRequest(
            prompt=prompt,
            adapters=_strengths(adapters),
            seed=int(seed),
            steps=int(steps),
            guidance_scale=guidance_scale,
            width=whole(width),
            height=whole(height),
            num_images=int(num_images),
            negative_prompt=negative_prompt,
            compare_with_base=compare_with_base,
            control_image=_control_image(studio, control_image, control_detector, width, height),
            control_strength=control_strength,
            keep_metadata=keep_metadata,
        )
        stop = StopToken()
        with jobs.hold(visitor.session_hash, stop):
            return _answer(studio.engine.generate(request, stop))

    adapters = gr.JSON({}, visible=False, label="Adapters: {id: strength}")
    strength = gr.Number(1.0, visible=False, label="Strength of the control image")
    detector = gr.Textbox("", visible=False, label="Detector: canny, silhouette, palette or none")
    image = gr.File(visible=False, label="Control image, or the photo for a detector")
    outputs = [
        gr.Gallery(visible=False, label="Pictures", format="png"),
        gr.Gallery(visible=False, label="Pictures of the base", format="png"),
        gr.JSON(visible=False, label="How it went"),
    ]
    inputs = [
        form.prompt, adapters, form.seed, form.steps, form.guidance_scale, form.width, form.height,
        form.num_images, form.negative_prompt, form.compare_with_base, form.keep_metadata,
        strength, detector, image,
    ]  # fmt: skip
    gr.Button(visible=False).click(
        generate, inputs, outputs, api_name="generate", concurrency_limit=MAX_AT_ONCE, show_progress="hidden"
    )


def _control_image(
    studio: Studio, path: str | None, detector: str, width: float, height: float
) -> Image.Image | None:
    if path is None:
        if detector:
            raise ValueError("a detector was named, and there is no control_image for it; send one")
        return None
    native = studio.engine.native_size
    return read_control_upload(
        Path(path), detector, width=whole(width) or native, height=whole(height) or native
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

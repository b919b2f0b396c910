"""The endpoint /generate for scripts: the work of the tab, with adapters by their ids in one argument."""

from typing import Any

import gradio as gr

from ether_diffusion.ui.events import Finished, SavedPicture, StopToken
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.create_form import Form
from ether_diffusion.ui.wiring import RunningJobs, handler

MAX_AT_ONCE = 8
Pictures = list[tuple[str, str]]


def add_endpoint(studio: Studio, form: Form, jobs: RunningJobs) -> None:
    """Add /generate to the API of the page; its widgets are never shown."""

    @handler
    def generate(
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
        visitor: gr.Request,
    ) -> tuple[Pictures, Pictures, dict[str, Any]]:
        """Draw pictures with adapters, {id: strength}, and by the base beside them on the same seeds.

        Returns the pictures, those of the base, and how it went: seconds, touched_layers, notes.
        """
        request = GenerateRequest(
            prompt=prompt,
            adapters=_strengths(adapters),
            seed=int(seed),
            steps=int(steps),
            guidance_scale=guidance_scale,
            width=int(width),
            height=int(height),
            num_images=int(num_images),
            negative_prompt=negative_prompt,
            compare_with_base=compare_with_base,
            keep_metadata=keep_metadata,
        )
        stop = StopToken()
        with jobs.hold(visitor.session_hash, stop):
            for event in studio.engine.generate(request, stop):
                if isinstance(event, Finished):
                    facts = {
                        "seconds": round(event.seconds, 3),
                        "touched_layers": event.touched_layers,
                        "notes": list(event.notes),
                    }
                    return _files(event.pictures), _files(event.base_pictures), facts
        raise ValueError("the studio is being closed; try again later")

    adapters = gr.JSON({}, visible=False, label="Adapters: {id: strength}")
    outputs = [
        gr.Gallery(visible=False, label="Pictures", format="png"),
        gr.Gallery(visible=False, label="Pictures of the base", format="png"),
        gr.JSON(visible=False, label="How it went"),
    ]
    inputs = [
        form.prompt, adapters, form.seed, form.steps, form.guidance_scale, form.width, form.height,
        form.num_images, form.negative_prompt, form.compare_with_base, form.keep_metadata,
    ]  # fmt: skip
    gr.Button(visible=False).click(
        generate, inputs, outputs, api_name="generate", concurrency_limit=MAX_AT_ONCE, show_progress="hidden"
    )


def _strengths(adapters: object) -> dict[str, float]:
    if adapters is None:
        return {}
    if not isinstance(adapters, dict) or not all(
        isinstance(strength, int | float) and not isinstance(strength, bool) for strength in adapters.values()
    ):
        raise ValueError('adapters are given as {id: strength}, for example {"fox": 0.8}')
    return {str(name): float(strength) for name, strength in adapters.items()}


def _files(pictures: tuple[SavedPicture, ...]) -> Pictures:
    return [(str(picture.path), picture.id) for picture in pictures]

"""The tab Create, and what one begins with on the embedded base: what to click; also /generate."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from ether_diffusion.ui.control_images import read_control_upload
from ether_diffusion.ui.library import Card
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.restore import restore
from ether_diffusion.ui.studio import EXAMPLE, Studio
from ether_diffusion.ui.tabs.create import PictureTab
from ether_diffusion.ui.tabs.form import STRENGTHS, Form
from ether_diffusion.ui.tabs.page import ON_PRESS, Page, Updates, owner_of, told_by
from ether_diffusion.ui.tabs.picture_form import PictureForm
from ether_diffusion.ui.uploads import data_address
from ether_diffusion.ui.words import handler

MAX_SCRIPTS = 8  # that wait for the engine at a time; each takes a thread of the server while it does
Pictures = list[tuple[str, str]]
PROMPTS = (
    "a sks animal on a beach", "a sks animal in space", "a cat in the snow",
    "a rocket on a yellow background", "a strawberry on a teal background", "a castle in the desert",
)  # fmt: skip
"""Chips; the first two call the shipped fox."""
_KNOWS = Markup(
    '<p class="quiet">This base draws {} things, as {}, on a beach, in the snow, in space or on a '
    'plain colour; of others it knows nothing. {}Try:</p><div class="chips">{}</div>'
)
_CALLS = Markup("<b>sks animal</b> calls the fox of the adapter. ")
_EXAMPLES = Markup('<div class="examples">{}</div>')
_CHIP = Markup('<button type="button" data-prompt="{0}">{0}</button>')
_EXAMPLE = Markup(
    '<button type="button" data-example="{0}" aria-label="Take over the settings of an example: {0}">'
    '<img alt="" src="{1}"></button>'
)


def examples() -> dict[str, Path]:
    """Return the example pictures, which say how they were made, by their prompts."""
    folder = Path(str(files("ether_diffusion.ui").joinpath("examples")))
    return {path.stem.replace("_", " "): path for path in sorted(folder.glob("*.png"))}


class CreateForm(PictureForm):
    """The form of a stranger has the shipped fox in it, and a prompt that calls it."""

    def begin(self) -> None:
        super().begin()
        shipped = shipped_fox(self.studio)
        self["adapters"].choices = [(name, each) for each, name in self.names().items()]
        self["adapters"].value = [shipped.id] if shipped else []
        self["prompt"].value = f"{shipped.trigger} on a beach" if shipped else ""
        first = self[STRENGTHS[0]]
        first.visible, first.label = shipped is not None, f"Strength of {EXAMPLE}"


class CreateTab(PictureTab):
    """The tab Create, with chips and examples above its form; also /generate."""

    make_form = CreateForm

    def __init__(self, page: Page, prefix: str) -> None:
        super().__init__(page, prefix)
        add_endpoint(self.form)

    def lay_out_head(self) -> None:
        self.knows = self.html("knows", visible=False, js_on_load=ON_PRESS)
        super().lay_out_head()

    def tie(self) -> None:
        super().tie()
        self.on(self.knows.click, self._take)
        self.on_load(self._tell, None, [self.knows])

    def _tell(self) -> Updates:
        return {self.knows: gr.update(value=first_html(self.studio), visible=self.studio.is_toy)}

    def _take(self, event: gr.EventData) -> Updates:
        chosen, found = told_by(event), examples()
        if (prompt := chosen.get("prompt")) in PROMPTS:
            return {self.form["prompt"]: prompt}
        picture = found.get(str(chosen.get("example")))
        return {} if picture is None else self.take(restore(picture, self.studio))


def shipped_fox(studio: Studio) -> Card | None:
    """Return the card of the shipped fox, if it is there and of the base."""
    cards = studio.library.cards()
    return next((card for card in cards if card.name == EXAMPLE and card.fits_base), None)


def first_html(studio: Studio) -> Markup:
    """Return what is shown above the form: of the fox and of examples, only where they can be drawn."""
    known, fox = [concept.phrase for concept in studio.known], shipped_fox(studio)
    drawn = [each for each in PROMPTS if not studio.doubts([each], [fox.id] if fox else [])]
    calls, chips = _CALLS if fox else "", Markup("").join(map(_CHIP.format, drawn))
    said = _KNOWS.format(len(known), ", ".join(known[:12]), calls, chips)
    if not studio.has_examples:
        return said
    shown = ((name, data_address(path, 128)) for name, path in examples().items())
    pictures = Markup("").join(_EXAMPLE.format(name, address) for name, address in shown if address)
    return said + _EXAMPLES.format(pictures)


def add_endpoint(form: Form) -> None:
    """Add /generate to the API of the page, described by a form; its own widgets are never shown."""
    studio = form.studio

    @handler
    def generate(
        visitor: gr.Request, prompt: str, adapters: dict[str, float] | None, seed: float, steps: float,
        guidance_scale: float, width: float, height: float, num_images: float, negative_prompt: str,
        compare_with_base: bool, keep_metadata: bool, control_strength: float, control_detector: str,
        control_image: dict[str, Any] | None = None,
    ) -> tuple[Pictures, Pictures, dict[str, Any]]:  # fmt: skip
        """Draw pictures with adapters, {id: strength}, and by the base beside them on the same seeds.

        One of the adapters may follow a control image; the detector makes that of a photo. Returns the
        pictures, those of the base, and how it went: seconds, touched_layers, notes.
        """
        asked: dict[str, Any] = {
            "adapters": adapters, "seed": seed, "steps": steps, "guidance_scale": guidance_scale,
            "width": width, "height": height, "num_images": num_images, "negative_prompt": negative_prompt,
            "compare_with_base": compare_with_base, "keep_metadata": keep_metadata,
            "control_strength": control_strength,
        }  # fmt: skip
        request = GenerateRequest(prompt, **asked)
        studio.engine.cost.check(request.sampling())
        if control_image is not None:
            path = control_image.get("path") if isinstance(control_image, dict) else None
            if not isinstance(path, str) or not isinstance(control_detector, str | None):
                wrong = "control_image must be a file that was uploaded, as by gradio_client's handle_file"
                raise ValueError(f"{wrong}, and control_detector text")
            width, height = (side or studio.engine.native_size for side in (request.width, request.height))
            with studio.reading:
                image = read_control_upload(Path(path), control_detector or "", width=width, height=height)
            request = replace(request, control_image=image)
        elif control_detector:
            raise ValueError("a detector was named, and there is no control_image for it; send one")
        job = studio.engine.start(request, owner=owner_of(visitor))
        job.ended.result()
        drawn, of_base = ([(str(p.path), p.id) for p in each] for each in (job.pictures, job.base_pictures))
        facts = {"touched_layers": job.touched_layers, "notes": list(job.notes)}
        return drawn, of_base, {"seconds": round(job.seconds, 3), **facts}

    numbers = [  # the page's own have limits, of which Gradio says no more than that they are passed
        gr.Number(form[name].value, visible=False, label=form[name].label)
        for name in ("seed", "steps", "guidance_scale", "width", "height", "num_images")
    ]
    inputs = [
        form["prompt"], gr.JSON({}, visible=False, label="Adapters: {id: strength}"), *numbers,
        *(form[name] for name in ("negative_prompt", "compare_with_base", "keep_metadata")),
        gr.Number(1.0, visible=False, label="Strength of the control image"),
        gr.Textbox("", visible=False, label="Detector: canny, silhouette, palette or none"),
        gr.JSON(visible=False, label="Control image, or the photo for a detector: an uploaded file"),
    ]  # fmt: skip
    labels = "Pictures", "Pictures of the base"
    outputs = [gr.Gallery(visible=False, label=label, format="png") for label in labels]
    told: dict[str, Any] = {"concurrency_limit": MAX_SCRIPTS, "show_progress": "hidden"}
    went = gr.JSON(visible=False, label="How it went")
    gr.Button(visible=False).click(generate, inputs, [*outputs, went], api_name="generate", **told)

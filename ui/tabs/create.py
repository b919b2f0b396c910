"""Tabs of pictures of one prompt: beside the base's, begun with, varied, enlarged, taken back in."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from markupsafe import Markup
from PIL import Image
from PIL.Image import Resampling

from ether_diffusion.pipelines.sampling import SIDE, Start
from ether_diffusion.ui.jobs import BASE_SUFFIX, Job, SavedPicture
from ether_diffusion.ui.outputs import plain_png
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.restore import Restored, restore, restore_metadata
from ether_diffusion.ui.tabs.drawing import DrawingTab
from ether_diffusion.ui.tabs.form import CANVASES
from ether_diffusion.ui.tabs.page import EMPTY, LOOK, ON_SLIDE, Updates, Values, pair_html
from ether_diffusion.ui.tabs.picture_form import PictureForm, new_seed
from ether_diffusion.ui.words import (
    counted,
    duration,
    facts_html,
    folded_html,
    notes_html,
    picture_address,
    picture_facts,
    quiet_html,
    sentence,
)

VARIED, ENLARGED = 0.5, 0.3
"""How far a picture is from the one that it varies, and from the one that it is twice as large as."""
OFFERS = {"begin": "Begin with it", "vary": "Vary", "enlarge": "Upscale 2×"}
"""What can be done with a picture: the labels of buttons by name."""
IN_CONTROL = "It followed a control image, and only the tab Control draws with those: drop it there."
_FIGURE = Markup(
    '<figure class="small"><img alt="" src="{}">'
    "<figcaption>Control image that is followed</figcaption></figure>"
)
_ON_CANVAS = """() => {{
  const drawn = {}.map((name) => document.querySelector(`#${{name}} canvas`)?.toDataURL("image/png") ?? "");
  return drawn.length > 1 ? drawn : drawn[0];
}}"""


class PictureTab(DrawingTab):
    """A tab of pictures of one prompt, each beside the base's, with a field that takes a picture back in."""

    form: PictureForm
    beside, nothing = "With adapter", "Write a prompt to see what the pictures cost."

    def lay_out_head(self) -> None:
        self.restored = self.html("restored", visible=False)
        self.undo, self.before = (
            self.button("undo", "Put back what was there", size="sm", visible=False),
            gr.State(),
        )
        self.missing = self.html("missing", visible=False)

    def lay_out_settings(self) -> None:
        self.form.put_rest(self)
        self.drop = gr.File(
            label="Restore settings from a picture", file_types=[".png"], height=104,
            elem_id=f"{self.prefix}-drop", elem_classes="drop",
        )  # fmt: skip

    def lay_out_results(self) -> None:  # one of pair and single is visible at a time
        self.status = self.html("status", EMPTY.format("Your pictures appear here."))
        self.pair = self.html("pair", js_on_load=ON_SLIDE, visible=False)
        self.single = gr.Image(elem_id=f"{self.prefix}-picture", visible=False, **LOOK)
        self.gallery = gr.Gallery(
            visible=False, label="Pictures", show_label=False, format="png", columns=4, height="auto",
            buttons=[], allow_preview=False, interactive=False, object_fit="cover",
            elem_id=f"{self.prefix}-gallery",
        )  # fmt: skip
        with gr.Row(elem_classes="tool-row", visible=False) as self.tools:
            self.download = gr.DownloadButton("Download PNG", elem_id=f"{self.prefix}-download")
            self.offers = {name: self.button(name, label) for name, label in OFFERS.items()}
        self.notes = self.html("notes", visible=False)
        with gr.Accordion("Settings of this picture", open=False, visible=False) as self.settings:
            self.facts = self.html("facts")
        self.used = self.html("used", visible=False)
        self.last, self.selected = self.kept(f"{self.prefix}-pictures"), gr.State("")

    @property
    def shown(self) -> list[Any]:
        return [*super().shown, self.form.reuse]

    @property
    def offered(self) -> list[Any]:
        return [*super().offered, self.missing]

    def tie(self) -> None:
        form = self.form
        self.draws_on([self.go.click, form["prompt"].submit], [form["seed"]])
        self.on(form.reuse.click, self._last_seed, [self.selected], [form["seed"], form["new_seed"]])
        self.on(self.gallery.select, self._select, [self.last], self.shown)
        self.on(self.drop.upload, self._take_picture, [self.drop, form.kept])
        self.on(self.undo.click, self._put_back, [self.before])
        self.on(self.offers["begin"].click, self._begin_with, {*form.all(), self.selected})
        begun = self.told_of([form["seed"], *self.shown[1:]])
        for name, draw in (("vary", self._vary), ("enlarge", self._enlarge)):
            self.on(self.offers[name].click, draw, {*form.plain(), self.selected}, begun)

    def start(self, events: Sequence[Any], **draw: Any) -> None:
        """Draw on events, after a look at the canvases."""
        drawn = {
            self.form[name]: self.form[canvas].elem_id
            for name, canvas in CANVASES.items()
            if name in self.form.widgets
        }
        seen: dict[str, Any] = {"js": _ON_CANVAS.format([*drawn.values()]), "api_visibility": "private"}
        gr.on(events, None, outputs=[*drawn], **seen).then(**draw)

    def begun(self, request: GenerateRequest) -> Updates:
        return {self.form["seed"]: request.seed}

    def drawn(self, job: Job) -> Updates:
        """Show the newest picture, beside the base's once that is there; until the first, what was there."""
        own, of_base = job.pictures, job.base_pictures
        if not job.is_done and len(job.request.sampling().choices) > 1:
            own = own[: len(of_base)]
        followed = {self.used: self.followed(job.request.control_image)}
        if own:
            return self._shown(own) | followed
        if not job.is_done:
            return followed
        emptied = {w: gr.update(value=None, visible=False) for w in (self.single, self.gallery)}
        hidden = (self.pair, self.tools, self.settings)
        return followed | emptied | {widget: gr.update(visible=False) for widget in hidden}

    def ended(self, job: Job) -> Updates:
        if not job.pictures:
            return {self.status: notes_html("Stopped before the first picture was done")}
        words = ["Stopped"] * job.stopped
        words.append(f"{counted(len(job.pictures), 'picture')} in {duration(job.seconds)}")
        if job.touched_layers:
            words.append(f"the adapter acts on {counted(job.touched_layers, 'layer')}")
        return {self.status: quiet_html(" · ".join(words))}

    def _shown(self, own: Sequence[SavedPicture]) -> Updates:
        seeds, last = [(picture.path, f"Seed {_seed(picture)}") for picture in own], len(own) - 1
        return {
            self.last: [picture.id for picture in own],
            self.gallery: gr.update(value=seeds, visible=last > 0, selected_index=last),
            self.form.reuse: gr.update(interactive=True),
            **self._show(own[last]),
        }

    def _show(self, picture: SavedPicture) -> Updates:
        """Show a picture, beside the base's on its seed where that was drawn."""
        facts = [] if picture.metadata is None else picture_facts(picture.metadata)
        base = picture.path.with_stem(f"{picture.id}{BASE_SUFFIX}")
        sides = [base, picture.path] if base.is_file() else []
        addresses = [f"gradio_api/file={quote(str(path))}" for path in sides]
        return {
            self.selected: picture.id,
            self.pair: gr.update(value=pair_html(addresses, self.beside), visible=bool(sides)),
            self.single: gr.update(value=None if sides else picture.path, visible=not sides),
            self.download: gr.update(value=picture.path),
            self.tools: gr.update(visible=True),
            self.settings: gr.update(visible=bool(facts)),
            self.facts: facts_html(facts),
        }

    def recall(self, last: Sequence[str]) -> Updates:
        own = [self.studio.history.picture(each) for each in last]
        return self._shown(own) | {self.status: quiet_html("What was drawn last")}

    def _select(self, last: Sequence[str], chosen: gr.SelectData) -> Updates:
        index = chosen.index if isinstance(chosen.index, int) else 0
        return self._show(self.studio.history.picture(last[index])) if 0 <= index < len(last) else {}

    def _last_seed(self, selected: str) -> Updates:
        """Have the form keep the seed of the picture on show."""
        seed = _seed(self.studio.history.picture(selected))
        return {} if seed is None else {self.form["seed"]: seed, self.form["new_seed"]: False}

    def refresh(self) -> Updates:
        """Show the adapters there are: those for another base are named, with the reason, but not offered."""
        unfit = [f"{c.name}: {c.why_not}" for c in self.studio.library.cards() if not c.fits_base]
        heading = f"{counted(len(unfit), 'adapter')} cannot be used with this base"
        missing = gr.update(value=folded_html(heading, unfit), visible=bool(unfit))
        return {**self.form.offer(), self.missing: missing}

    def _take_picture(self, path: str | None, kept: Any) -> Updates:
        if path is None:
            return {}
        undo = {self.before: kept, self.undo: gr.update(visible=bool(kept))}
        return self.take(restore(Path(path), self.studio)) | undo

    def _put_back(self, before: Mapping[str, Any]) -> Updates:
        named = {name: value for name, value in before.items() if name in self.form.widgets}
        hidden = {widget: gr.update(visible=False) for widget in (self.undo, self.restored)}
        return self.form.shown(named) | hidden

    def beyond(self, restored: Restored) -> str:
        """Say what of restored settings this tab does not draw with."""
        follows = [self.form.names("control").get(each) for each in getattr(restored.request, "adapters", ())]
        without = [f"{name}, which follows control images, is not offered here." for name in follows if name]
        return IN_CONTROL if restored.followed_control else "".join(without)

    def take(self, restored: Restored) -> Updates:
        """Fill the form with restored settings, and say what is not as it was."""
        differences = [*restored.differences, *filter(None, [self.beyond(restored)])]
        usual = "Settings restored, with differences" if differences else "All settings restored"
        heading = restored.heading or usual if restored.request else "The form was left as it is"
        said = notes_html(heading, differences, kind="warning" if differences else "note")
        shown = {self.drop: None, self.restored: gr.update(value=said, visible=True)}
        return self.form.fill(restored) | shown

    def followed(self, image: Image.Image | None) -> Any:
        """Return the update that shows the control image that is followed."""
        address = None if image is None else picture_address(image, "PNG")
        return gr.update(value=_FIGURE.format(address), visible=True) if address else gr.update(visible=False)

    def _on_show(self, values: Values) -> tuple[SavedPicture, Image.Image]:
        picture = self.studio.history.picture(values[self.selected])
        with Image.open(picture.path) as image:
            return picture, image.convert("RGB")

    def _begin_with(self, values: Values) -> Updates:
        shown, image = self._on_show(values)
        start = Start(image, strength=self.form["start_strength"].value, name=shown.path.name)
        sides = {self.form["width"]: image.width, self.form["height"]: image.height}
        return self.form.begin_with(start) | sides

    def _asked(self, values: Values, strength: float, **changes: Any) -> GenerateRequest:
        """Return what drew the picture on show, as far as that is known, from itself and with changes."""
        shown, image = self._on_show(values)
        said, named = shown.metadata, self.form.named(values)
        found = None if said is None else restore_metadata(said, self.studio).request
        kept = {"keep_metadata": named["keep_metadata"], "compare_with_base": False}
        start = Start(image, strength=strength, name=shown.path.name)
        return replace(found or self.form.asked(named), **{**kept, "start": start, **changes})

    def _vary(self, values: Values, visitor: gr.Request) -> Updates:
        """Draw the picture on show again from itself and other noise, as many as the form says."""
        many = values[self.form["num_images"]]
        return self.begin(self._asked(values, VARIED, seed=new_seed(), num_images=many), visitor)

    def _enlarge(self, values: Values, visitor: gr.Request) -> Updates:
        """Draw the picture on show at twice its size from itself, or only enlarge it where that cannot be."""
        _, image = self._on_show(values)
        width, height = 2 * image.width, 2 * image.height
        try:
            if self.studio.is_toy:
                raise ValueError("the embedded base knows things at one size alone")
            if width > SIDE.most or height > SIDE.most:
                raise ValueError(f"at most {SIDE.most:g} px are drawn")
            asked = self._asked(values, ENLARGED, num_images=1, width=width, height=height)
            self.studio.engine.cost.check(asked.sampling())
        except ValueError as error:
            outputs = self.studio.engine.outputs
            large, (job, day) = image.resize((width, height), Resampling.LANCZOS), outputs.new_job()
            path = outputs.write(day, f"{job}-i00.png", plain_png(large))
            said = f"Enlarged twice by Lanczos alone, as the base cannot draw that: {sentence(error)}"
            notes = gr.update(value=notes_html("Good to know", [said]), visible=True)
            told = {self.notes: notes, self.status: quiet_html("1 picture enlarged")}
            return self._shown([SavedPicture(path.stem, path, None)]) | told
        gr.Info(f"Enlarged twice by Lanczos, and drawn over at strength {ENLARGED:g}.")
        return self.begin(asked, visitor)


def _seed(picture: SavedPicture) -> int | None:
    return None if picture.metadata is None else picture.metadata.seed

"""The tab Create: a prompt, adapters with their strengths, and pictures beside the base's; also /generate."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar
from urllib.parse import quote

import gradio as gr
from markupsafe import Markup
from PIL import Image

from ether_diffusion.ui.control_images import read_control_upload, take_drawing
from ether_diffusion.ui.jobs import Job, SavedPicture
from ether_diffusion.ui.requests import NUM_IMAGES, SEED, GenerateRequest
from ether_diffusion.ui.restore import Restored, restore
from ether_diffusion.ui.tabs.drawing import DrawingTab
from ether_diffusion.ui.tabs.library import MixBox
from ether_diffusion.ui.tabs.page import (
    EMPTY,
    LOOK,
    ON_SLIDE,
    QUIET,
    STRENGTHS,
    Form,
    Page,
    Updates,
    owner_of,
    pair_html,
)  # fmt: skip
from ether_diffusion.ui.words import (
    counted,
    duration,
    facts_html,
    folded_html,
    handler,
    notes_html,
    picture_address,
    picture_facts,
    quiet_html,
)

MAX_SCRIPTS = 8  # that wait for the engine at a time; each takes a thread of the server while it does
IN_CONTROL = "It followed a control image, and only the tab Control draws with those: drop it there."
_FIGURE = Markup(
    '<figure class="small"><img alt="" src="{}">'
    "<figcaption>Control image that is followed</figcaption></figure>"
)


class PictureForm(Form):
    """The settings of pictures of one prompt, with a strength for each chosen adapter."""

    label, info = "Adapters", "None draws with the base alone."
    around: Sequence[Any] = ()
    """What fields stand in that may be opened."""

    def put_rest(self) -> None:
        """Lay out what stands below the prompt; sliders appear as adapters are chosen."""
        with gr.Group():
            self.put("adapters", label=self.label, info=self.info)
            self.put(*STRENGTHS)
        self.mix = MixBox(self)
        small: dict[str, Any] = {"size": "sm", "min_width": 84, "scale": 1}
        with gr.Group(elem_classes="seed-group"):
            with gr.Row(elem_classes="seed-row"):
                self.put("seed")
                dice = gr.Button("New seed", elem_id=f"{self.prefix}-dice", **small)
                reuse = f"{self.prefix}-reuse"
                self.reuse = gr.Button("Last seed", interactive=False, elem_id=reuse, **small)
            self.put("new_seed")
        with gr.Group():
            self.put("num_images")
            self.put_sampling()
            self.put("compare_with_base")
        self.put_advanced()
        dice.click(None, js=f"() => Math.floor(Math.random() * {2**32})", outputs=[self["seed"]], **QUIET)
        self["seed"].input(None, js="() => false", outputs=[self["new_seed"]], **QUIET)
        sliders = [self[name] for name in STRENGTHS]
        self["adapters"].input(handler(self._sliders), [self["adapters"]], sliders, **QUIET)
        labelled = handler(lambda chosen: self._sliders(chosen, None))  # what the browser kept is chosen, too
        self["adapters"].change(labelled, [self["adapters"]], sliders, **QUIET)

    def _sliders(
        self, chosen: Sequence[str] | None, strengths: Mapping[str, float] | None = MappingProxyType({})
    ) -> Updates:
        """Show a slider for each chosen adapter, at its strength or else as trained; None leaves them."""
        names, updates = self.names(), Updates()
        shown = [adapter for adapter in chosen or [] if adapter in names]
        for index, slider in enumerate(STRENGTHS):
            update: dict[str, Any] = gr.update(visible=False)
            if index < len(shown):
                update = gr.update(visible=True, label=f"Strength of {names[shown[index]]}")
            if strengths is not None:
                strength = strengths.get(shown[index], 1.0) if index < len(shown) else 1.0
                update |= self.show(slider, strength)
            updates[self[slider]] = update
        return updates

    def asked(self, named: Mapping[str, Any]) -> GenerateRequest:
        """Return what the visitor asks for, with a seed drawn here where a new one is wanted."""
        found = {name: named[name] for name in GenerateRequest.__dataclass_fields__.keys() & named.keys()}
        if named["new_seed"]:
            found["seed"] = secrets.randbelow(int(SEED.most - NUM_IMAGES.most))
        elif named["seed"] in (None, ""):
            raise ValueError("seed is missing; type a whole number, or let a new one be drawn each time")
        strengths = [named[name] for name in STRENGTHS]
        return GenerateRequest(
            **found | {"adapters": dict(zip(found["adapters"] or [], strengths, strict=False))}
        )

    def canvas_size(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Return width and height (px) of what is drawn on, whatever stands in their fields."""
        native = self.studio.engine.native_size
        return {side: max(8, min(4096, int(named[side] or native))) for side in ("width", "height")}

    def shown(self, named: Mapping[str, Any]) -> Updates:
        chosen, names = named["adapters"] or [], self.names()  # what follows a control image is not offered
        by_place = zip(chosen, (named.get(name, 1.0) for name in STRENGTHS), strict=False)
        strengths = chosen if isinstance(chosen, Mapping) else dict(by_place)
        offered = self.offer(value=[each for each in chosen if each in names])
        filled = super().shown({name: value for name, value in named.items() if name not in STRENGTHS})
        return {**filled, self["adapters"]: offered, **self._sliders(list(chosen), strengths)}

    def fill(self, request: GenerateRequest, *, is_picture: bool = True) -> Updates:
        """Return the updates that make the form say a request, or only what it is of, and with what."""
        taken = ["prompt", "adapters"]
        if is_picture:
            taken += ["seed", "steps", "guidance_scale", "width", "height", "num_images", "negative_prompt"]
            taken.append("unconditional_strength")
        named = {name: getattr(request, name) for name in taken}
        return PictureForm.shown(self, {**named, **({"new_seed": False} if is_picture else {})})


Pairs = tuple[Sequence[SavedPicture], Sequence[SavedPicture]]
"""Pictures with adapters, and the base's on the same seeds."""


class PictureTab(DrawingTab):
    """A tab of pictures of one prompt, each beside the base's, with a field that takes a picture back in."""

    form: PictureForm
    beside, nothing = "With adapter", "Write a prompt to see what the pictures cost."
    drawing: str
    """The field that takes what is drawn on the canvas."""
    offers: ClassVar[Mapping[str, str]] = {}
    """What can be done with a result: the labels of buttons by name."""

    def lay_out_head(self) -> None:
        self.restored = gr.HTML(visible=False, elem_id=f"{self.prefix}-restored")
        undo: dict[str, Any] = {"size": "sm", "visible": False, "elem_id": f"{self.prefix}-undo"}
        self.undo, self.before = gr.Button("Put back what was there", **undo), gr.State()
        self.missing = gr.HTML(visible=False, elem_id=f"{self.prefix}-missing")

    def lay_out_settings(self) -> None:
        self.form.put_rest()
        self.drop = gr.File(
            label="Restore settings from a picture", file_types=[".png"], height=104,
            elem_id=f"{self.prefix}-drop", elem_classes="drop",
        )  # fmt: skip

    def lay_out_results(self) -> None:  # one of pair and single is visible at a time
        prefix, hidden, look = self.prefix, {"visible": False}, {**LOOK, "visible": False}
        self.status = gr.HTML(EMPTY.format("Your pictures appear here."), elem_id=f"{prefix}-status")
        self.pair = gr.HTML(js_on_load=ON_SLIDE, elem_id=f"{prefix}-pair", **hidden)
        self.single = gr.Image(elem_id=f"{prefix}-picture", **look)
        self.gallery = Page.thumbnails(f"{prefix}-gallery")
        with gr.Row(elem_classes="tool-row"):
            self.download = gr.DownloadButton("Download PNG", elem_id=f"{prefix}-download", **hidden)
            self.tools: dict[str, Any] = {
                name: gr.Button(label, elem_id=f"{prefix}-{name}", **hidden)
                for name, label in self.offers.items()
            }
        self.notes = gr.HTML(elem_id=f"{prefix}-notes", **hidden)
        title = "Settings of this picture"
        with gr.Accordion(title, open=False, elem_id=f"{prefix}-facts", **hidden) as self.settings:
            self.facts = gr.HTML()
        self.used = gr.HTML(elem_id=f"{prefix}-used", **hidden)
        self.pictures, self.selected = gr.State(((), ())), gr.State(0)
        self.last = Page.browser_state(f"{prefix}-pictures")
        self.shows = [
            self.form.reuse, self.used, self.pair, self.single, self.gallery, self.download,
            self.settings, self.facts, self.pictures, self.selected, self.last, *self.tools.values(),
        ]  # fmt: skip

    def tie(self) -> None:
        self.form.mix.tie(self.page)
        form, seeds, chosen = (
            self.form,
            [self.form["seed"], self.form["new_seed"]],
            [self.pictures, self.selected],
        )
        self.draws_on([self.go.click, form["prompt"].submit], [form["seed"]])
        form.reuse.click(handler(self._last_seed), chosen, seeds, **QUIET)
        self.gallery.select(handler(self._select), [self.pictures], self.shows, **QUIET)
        filled = [*form.all(), *form.around, self.used, self.drop, self.restored]
        taken, there = [*filled, self.before, self.undo], [self.drop, form.kept]
        self.drop.upload(handler(self._take_picture), there, taken, **QUIET)
        self.undo.click(handler(self._put_back), [self.before], taken, **QUIET)
        self.page.takers[self.prefix] = self.take, filled

    def start(self, events: list[Any], **draw: Any) -> None:
        """Draw on events, after a look at the canvas."""
        seen: dict[str, Any] = {"js": take_drawing(self.prefix), "api_visibility": "private"}
        gr.on(events, None, outputs=[self.form[self.drawing]], **seen).then(**draw)

    def begun(self, request: GenerateRequest) -> Updates:
        return {self.form["seed"]: request.seed}

    def drawn(self, job: Job) -> Updates:
        """Show the newest picture, beside the base's once that is there; until the first, what was there."""
        own, of_base = job.pictures, job.base_pictures
        if not job.is_done and len(job.request.sampling().choices) > 1:
            own = own[: len(of_base)]
        followed = {self.used: self.followed(job.request)}
        if own:
            return self._shown(own, of_base) | followed
        return followed if not job.is_done else followed | self._emptied()

    def _emptied(self) -> Updates:
        emptied: Updates = {w: gr.update(value=None, visible=False) for w in (self.single, self.gallery)}
        shown = (self.pair, self.download, self.settings, *self.tools.values())
        return emptied | {widget: gr.update(visible=False) for widget in shown}

    def ended(self, job: Job) -> Updates:
        if not job.pictures:
            return {self.status: notes_html("Stopped before the first picture was done")}
        words = ["Stopped"] * job.stopped
        words.append(f"{counted(len(job.pictures), 'picture')} in {duration(job.seconds)}")
        if job.touched_layers:
            words.append(f"the adapter acts on {counted(job.touched_layers, 'layer')}")
        return {self.status: quiet_html(" · ".join(words))}

    def _shown(self, own: Sequence[SavedPicture], of_base: Sequence[SavedPicture]) -> Updates:
        seeds, last = [(picture.path, f"Seed {_seed(picture)}") for picture in own], len(own) - 1
        return {
            self.pictures: (tuple(own), tuple(of_base)),
            self.last: [[picture.id for picture in side] for side in (own, of_base)],
            self.gallery: gr.update(value=seeds, visible=last > 0, selected_index=last),
            self.form.reuse: gr.update(interactive=True),
            **self._show(own, of_base, last),
        }

    def _show(self, own: Sequence[SavedPicture], of_base: Sequence[SavedPicture], index: int) -> Updates:
        picture, base = own[index], next(iter(of_base[index : index + 1]), None)
        facts = [] if picture.metadata is None else picture_facts(picture.metadata)
        sides = [f"gradio_api/file={quote(str(each.path))}" for each in (base, picture) if each is not None]
        return {
            self.selected: index,
            self.pair: gr.update(value=pair_html(sides, self.beside), visible=base is not None),
            self.single: gr.update(value=None if base else picture.path, visible=base is None),
            self.download: gr.update(value=picture.path, visible=True),
            **{tool: gr.update(visible=True) for tool in self.tools.values()},
            self.settings: gr.update(visible=bool(facts)),
            self.facts: facts_html(facts),
        }

    def recall(self, last: Any) -> Updates:
        there = {picture.id: picture for picture in self.studio.history.pictures()}
        own, of_base = ([there[each] for each in side] for side in last)
        return self._shown(own, of_base) | {self.status: quiet_html("What was drawn last")} if own else {}

    def _select(self, pictures: Pairs, chosen: gr.SelectData) -> Updates:
        index = chosen.index if isinstance(chosen.index, int) else 0
        return self._show(*pictures, index) if 0 <= index < len(pictures[0]) else {}

    def _last_seed(self, pictures: Pairs, selected: int) -> tuple[Any, Any]:
        """Return the seed of the picture on show for the form, which then keeps it."""
        seed = _seed(pictures[0][selected]) if selected < len(pictures[0]) else None
        return (gr.skip(), gr.skip()) if seed is None else (seed, False)

    def refresh(self) -> Updates:
        """Show the adapters there are: those for another base are named, with the reason, but not offered."""
        unfit = [f"{c.name}: {c.why_not}" for c in self.studio.library.cards() if not c.fits_base]
        heading = f"{counted(len(unfit), 'adapter')} cannot be used with this base"
        return {
            self.form["adapters"]: self.form.offer(),
            self.missing: gr.update(value=folded_html(heading, unfit), visible=bool(unfit)),
        }

    def _take_picture(self, path: str | None, kept: Any) -> Updates:
        if path is None:
            return {}
        undo = {self.before: kept, self.undo: gr.update(visible=bool(kept))}
        return self.take(restore(Path(path), self.studio)) | undo

    def _put_back(self, before: Mapping[str, Any]) -> Updates:
        named = {name: value for name, value in before.items() if name in self.form.widgets}
        return self.form.shown(named) | {
            self.undo: gr.update(visible=False),
            self.restored: gr.update(visible=False),
        }

    def take(self, restored: Restored) -> Updates:
        """Fill the form with restored settings, and say what is not as it was."""
        follows = [self.form.names("control").get(each) for each in getattr(restored.request, "adapters", ())]
        without = [f"{name}, which follows control images, is not offered here." for name in follows if name]
        return self.taken(restored, IN_CONTROL if restored.followed_control else "".join(without))

    def taken(self, restored: Restored, further: str) -> Updates:
        """Fill what every form has; `further` is a difference that this tab makes."""
        differences = [*restored.differences, *filter(None, [further])]
        usual = "Settings restored, with differences" if differences else "All settings restored"
        heading = restored.heading or usual if restored.request else "The form was left as it is"
        said = notes_html(heading, differences, kind="warning" if differences else "note")
        filled: Updates = {}
        if restored.request is not None:
            filled = PictureForm.fill(self.form, restored.request, is_picture=not restored.heading)
        return filled | {self.drop: None, self.restored: gr.update(value=said, visible=True)}

    def followed(self, asked: GenerateRequest) -> Any:
        """Return the update that shows the control image that is followed."""
        image = asked.control_image
        return gr.update(visible=False) if image is None else self.shown_control(image)

    def shown_control(self, image: Image.Image) -> Any:
        """Return the update that shows a control image."""
        address = picture_address(image, "PNG")
        return gr.update(value=_FIGURE.format(address), visible=True)


def _seed(picture: SavedPicture) -> int | None:
    return None if picture.metadata is None else picture.metadata.seed


Pictures = list[tuple[str, str]]


def add_endpoint(tab: PictureTab) -> None:
    """Add /generate to the API of the page; its own widgets are never shown."""
    studio, form = tab.studio, tab.form

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
        pictures, of_base = (
            [(str(p.path), p.id) for p in each] for each in (job.pictures, job.base_pictures)
        )
        facts = {"touched_layers": job.touched_layers, "notes": list(job.notes)}
        return pictures, of_base, {"seconds": round(job.seconds, 3), **facts}

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
    outputs = [
        gr.Gallery(visible=False, label="Pictures", format="png"),
        gr.Gallery(visible=False, label="Pictures of the base", format="png"),
        gr.JSON(visible=False, label="How it went"),
    ]
    gr.Button(visible=False).click(
        generate, inputs, outputs, api_name="generate", concurrency_limit=MAX_SCRIPTS, show_progress="hidden"
    )

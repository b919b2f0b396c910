"""The tab Create: a prompt, adapters with their strengths, and pictures beside the base's; also /generate."""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context
from markupsafe import Markup
from PIL import Image

from ether_diffusion.ui.control_images import read_control_upload
from ether_diffusion.ui.jobs import Finished, RunningJobs, SavedPicture
from ether_diffusion.ui.requests import NUM_IMAGES, SEED, GenerateRequest
from ether_diffusion.ui.restore import Restored, restore
from ether_diffusion.ui.tabs.page import EMPTY, LOOK, QUIET, STRENGTHS, Form, Page, Updates, Values
from ether_diffusion.ui.words import (
    counted,
    duration,
    facts_html,
    folded_html,
    handler,
    notes_html,
    picture_address,
    picture_facts,
    progress_html,
    quiet_html,
)

MAX_VISITORS, MAX_SCRIPTS = 24, 8
"""That wait for the engine at a time; each takes a thread of the server while it does."""
IN_CONTROL = "It followed a control image, and only the tab Control draws with those: drop it there."
_LOOK = Markup('<div class="look"><img alt="How the picture looks by now" src="{}"></div>')
_FIGURE = Markup(
    '<figure class="small"><img alt="" src="{}">'
    "<figcaption>Control image that is followed</figcaption></figure>"
)


class DrawingTab:
    """A tab that draws what its form says; made inside a gr.Tab.

    Looks while drawing are in the status: a widget mounted anew at every step makes the page lose updates.
    """

    first, go_label, has_looks = "prompt", "Generate", True
    """The field beside the button, what stands on that, and whether one looks at what is being drawn."""
    status: gr.HTML
    notes: gr.HTML
    # what stands between the prompt and the columns; the form's rest; `status`, what is drawn and `notes`
    lay_out_head: Callable[[], None]
    lay_out_settings: Callable[[], None]
    lay_out_results: Callable[[], None]
    tie: Callable[[], None]
    begun: Callable[[Any], Updates]  # what makes room for a new job
    ended: Callable[[Finished], Updates]  # what shows the end of a job
    failed: Callable[[], Updates]  # what shows nothing; the error says why

    def __init__(self, page: Page, form: Form) -> None:
        self.page, self.form, self.studio, self.prefix = page, form, page.studio, form.prefix
        self.jobs = RunningJobs()
        with gr.Row(elem_classes="prompt-row", equal_height=True):
            form.put(self.first)
            with gr.Column(scale=1, min_width=150, elem_classes="go-column"):
                self.go = gr.Button(self.go_label, variant="primary", elem_id=f"{self.prefix}-go")
                self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id=f"{self.prefix}-stop")
        self.lay_out_head()
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=2, min_width=300, elem_classes="settings"):
                self.lay_out_settings()
            with gr.Column(scale=3, min_width=300, elem_classes="results"):
                self.lay_out_results()
        self.tie()
        self.stop.click(handler(self._stop), outputs=[self.stop], queue=False, **QUIET)
        form.keep_in_browser()

    def drawn(self, request: Any, cells: Sequence[SavedPicture], *, is_running: bool) -> Updates:
        """Return what shows the cells of a grid."""
        return {}

    def draw(self, values: Values, visitor: gr.Request) -> Iterator[Updates]:
        """Draw what the form says and show what the job tells; a visitor who leaves stops it."""
        request, cells = self.form.read(self.form.named(values)), list[SavedPicture]()
        ready = {self.go: gr.update(visible=True), self.stop: gr.update(visible=False)}
        with self.jobs.hold(visitor.session_hash) as stop:
            starting = gr.update(value=progress_html(0, "Starting …"), visible=True)
            yield {
                self.go: gr.update(visible=False),
                self.stop: gr.update(visible=True, value="Stop", interactive=True),
                self.status: starting,
                self.notes: gr.update(visible=False),
                **self.drawn(request, cells, is_running=True),
                **self.begun(request),
            }
            try:
                for event in self.studio.engine.draw(request, stop):
                    if isinstance(event, SavedPicture):
                        cells.append(event)
                        yield self.drawn(request, cells, is_running=True)
                    elif isinstance(event, Finished):  # in one piece, as pages drop updates that come at once
                        prompts = request.sampling().prompts
                        told = [*self.studio.doubts(prompts, request.adapters), *event.notes]
                        notes = notes_html("Good to know", told)
                        yield {
                            **ready,
                            self.notes: gr.update(value=notes, visible=bool(told)),
                            **self.drawn(request, event.pictures, is_running=False),
                            **self.ended(event),
                        }
                    else:
                        shown = progress_html(event.done, event.words)
                        if self.has_looks and event.image is not None:
                            address = picture_address(event.image, "WEBP", quality=80)
                            shown += _LOOK.format(address)
                        yield {self.status: shown}
            except Exception:
                yield ready | self.failed()
                raise

    def _stop(self, request: gr.Request) -> Updates:
        self.jobs.stop(request.session_hash)
        return {self.stop: gr.update(value="Stopping …", interactive=False)}


class PictureForm(Form):
    """The settings of pictures of one prompt, with a strength for each chosen adapter."""

    label, info = "Adapters", "None draws with the base alone."

    def put_rest(self) -> None:
        """Lay out what stands below the prompt; sliders appear as adapters are chosen."""
        with gr.Group():
            self.put("adapters", label=self.label, info=self.info)
            self.put(*STRENGTHS)
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

    def _sliders(self, chosen: Sequence[str] | None, strengths: Mapping[str, float] | None = None) -> Updates:
        names, updates = self.names(), Updates()
        shown = [adapter for adapter in chosen or [] if adapter in names]
        for index, slider in enumerate(STRENGTHS):
            update = gr.update(visible=False, value=1.0)
            if index < len(shown):
                label = f"Strength of {names[shown[index]]}"
                strength = self.show(slider, (strengths or {}).get(shown[index], 1.0))
                update = strength | {"visible": True, "label": label}
            updates[self[slider]] = update
        return updates

    def read(self, named: Mapping[str, Any]) -> GenerateRequest:
        """Return what the visitor asks for, with a seed drawn here where a new one is wanted."""
        found = {name: named[name] for name in GenerateRequest.__dataclass_fields__.keys() & named.keys()}
        if named["new_seed"]:
            found["seed"] = secrets.randbelow(int(SEED.most - NUM_IMAGES.most))
        elif named["seed"] in (None, ""):
            raise ValueError("there is no seed; type a whole number, or let a new one be drawn each time")
        strengths = [named[name] for name in STRENGTHS]
        return GenerateRequest(
            **found | {"adapters": dict(zip(found["adapters"] or [], strengths, strict=False))}
        )

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
        named = {name: getattr(request, name) for name in taken}
        return PictureForm.shown(self, {**named, **({"new_seed": False} if is_picture else {})})


class PictureTab(DrawingTab):
    """A tab of pictures of one prompt, each beside the base's, with a field that takes a picture back in."""

    form: PictureForm
    beside = "With adapter"

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
        pair = {**look, "label": "Base and adapter"}
        self.pair = gr.ImageSlider(max_height=640, elem_id=f"{prefix}-pair", **pair)
        sides = f'<div class="sides"><span>Base</span><span>{self.beside}</span></div>'
        self.caption = gr.HTML(sides, elem_id=f"{prefix}-sides", **hidden)
        self.single = gr.Image(elem_id=f"{prefix}-picture", **look)
        self.gallery = Page.thumbnails(f"{prefix}-gallery")
        self.download = gr.DownloadButton("Download PNG", elem_id=f"{prefix}-download", **hidden)
        self.notes = gr.HTML(elem_id=f"{prefix}-notes", **hidden)
        title = "Settings of this picture"
        with gr.Accordion(title, open=False, elem_id=f"{prefix}-facts", **hidden) as self.settings:
            self.facts = gr.HTML()
        self.used = gr.HTML(elem_id=f"{prefix}-used", **hidden)
        self.event, self.selected = gr.State(), gr.State(0)
        self.last = Page.browser_state(f"{prefix}-pictures")
        self.shows: list[Any] = [
            self.pair, self.caption, self.single, self.gallery, self.download, self.settings, self.facts,
            self.event, self.selected, self.last,
        ]  # fmt: skip

    def tie(self) -> None:
        form, seeds = self.form, [self.form["seed"], self.form["new_seed"]]
        about = [self.go, self.stop, form["seed"], form.reuse, self.used, self.status, self.notes]
        self.start(
            [self.go.click, form["prompt"].submit], fn=handler(self.draw), inputs=form.all(),
            outputs=[*about, *self.shows], concurrency_limit=MAX_VISITORS, **QUIET,
        )  # fmt: skip
        form.reuse.click(handler(self._last_seed), [self.event, self.selected], seeds, **QUIET)
        self.gallery.select(handler(self._select), [self.event], self.shows, **QUIET)
        recalled = [self.status, form.reuse, *self.shows]
        Context.root_block.load(handler(self._recall), [self.last], recalled, **QUIET)
        filled = [*form.all(), self.used, self.drop, self.restored]
        taken, there = [*filled, self.before, self.undo], [self.drop, form.kept]
        self.drop.upload(handler(self._take_picture), there, taken, **QUIET)
        self.undo.click(handler(self._put_back), [self.before], taken, **QUIET)
        self.page.takers[self.prefix] = self.take, filled

    def start(self, events: list[Any], **draw: Any) -> None:
        """Draw on events."""
        gr.on(events, **draw)

    def begun(self, request: GenerateRequest) -> Updates:
        return {self.form["seed"]: request.seed, self.used: self.followed(request), **self._emptied()}

    def failed(self) -> Updates:
        status = gr.update(value=EMPTY.format("Your pictures appear here."), visible=True)
        return {self.status: status, self.used: gr.update(visible=False), **self._emptied()}

    def _emptied(self) -> Updates:
        pictures = (self.pair, self.single, self.gallery)
        emptied: Updates = {widget: gr.update(value=None, visible=False) for widget in pictures}
        return emptied | {w: gr.update(visible=False) for w in (self.caption, self.download, self.settings)}

    def ended(self, event: Finished) -> Updates:
        reuse = {self.form.reuse: gr.update(interactive=True)}
        if not event.pictures:
            stopped = notes_html("Stopped before the first picture was done")
            return self._emptied() | reuse | {self.status: stopped}
        words = ["Stopped"] * event.stopped
        words.append(f"{counted(len(event.pictures), 'picture')} in {duration(event.seconds)}")
        if event.touched_layers:
            words.append(f"the adapter acts on {counted(event.touched_layers, 'layer')}")
        seeds = [(picture.path, f"Seed {_seed(picture)}") for picture in event.pictures]
        return {
            self.event: event,
            self.last: [[picture.id for picture in side] for side in (event.pictures, event.base_pictures)],
            self.status: quiet_html(" · ".join(words)),
            self.gallery: gr.update(value=seeds, visible=len(event.pictures) > 1, selected_index=0),
            **self._show(event, 0),
            **reuse,
        }

    def _show(self, event: Finished, index: int) -> Updates:
        picture, base = event.pictures[index], next(iter(event.base_pictures[index : index + 1]), None)
        facts = [] if picture.metadata is None else picture_facts(picture.metadata)
        return {
            self.selected: index,
            self.pair: gr.update(value=(base.path, picture.path) if base else None, visible=base is not None),
            self.caption: gr.update(visible=base is not None),
            self.single: gr.update(value=None if base else picture.path, visible=base is None),
            self.download: gr.update(value=picture.path, visible=True),
            self.settings: gr.update(visible=bool(facts)),
            self.facts: facts_html(facts),
        }

    def _recall(self, last: Any) -> Updates:
        there = {picture.id: picture for picture in self.studio.history.pictures()} if last else {}
        try:
            pictures, of_base = (tuple(there[each] for each in side) for side in last)
        except (TypeError, ValueError, KeyError):  # none, or deleted meanwhile
            return {}
        shown = (
            self.ended(Finished(pictures, of_base, 0.0, stopped=False, touched_layers=0)) if pictures else {}
        )
        return shown | {self.status: quiet_html("What was drawn last")} if shown else {}

    def _select(self, event: Finished | None, chosen: gr.SelectData) -> Updates:
        index = chosen.index if isinstance(chosen.index, int) else 0
        return self._show(event, index) if event and 0 <= index < len(event.pictures) else {}

    def _last_seed(self, event: Finished | None, selected: int) -> tuple[Any, Any]:
        """Return the seed of the picture on show for the form, which then keeps it."""
        seed = None if event is None else _seed(event.pictures[selected])
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
        with tab.jobs.hold(visitor.session_hash) as stop:
            for end in studio.engine.draw(request, stop):  # noqa: B007 (the last one counts)
                pass
        assert isinstance(end, Finished)
        pictures, of_base = (
            [(str(p.path), p.id) for p in each] for each in (end.pictures, end.base_pictures)
        )
        facts = {"touched_layers": end.touched_layers, "notes": list(end.notes)}
        return pictures, of_base, {"seconds": round(end.seconds, 3), **facts}

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

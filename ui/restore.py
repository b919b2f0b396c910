"""A picture that was dropped, as the request that draws it again, and sentences on what differs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ether_diffusion.pipelines import metadata
from ether_diffusion.pipelines.foreign import A1111, COMFYUI, read_foreign_metadata
from ether_diffusion.pipelines.metadata import ImageMetadata
from ether_diffusion.pipelines.sampling import STRENGTH, Start
from ether_diffusion.training.plain_files import UnusableFileError, read_plain_file
from ether_diffusion.ui.library import Card
from ether_diffusion.ui.requests import MAX_ADAPTERS, MAX_PROMPT, GenerateRequest
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.words import sentence
from ether_diffusion.wording import listed, printable

MAX_BYTES = 64 * 2**20
_CONTROL = ("control", "control_strength", "control_image_sha256", "control_encoder_sha256")
_START = ("start_image", "start_strength", "start_image_sha256", "start_mask_sha256", "template")
"""Options of a call that a request has a place for."""


@dataclass(frozen=True)
class Restored:
    """What draws a picture again; None where it cannot be known, and then `differences` says why."""

    request: GenerateRequest | None
    differences: tuple[str, ...]
    heading: str = ""  # tells what was filled in where it is not a picture's settings
    followed_control: bool = False  # the picture did, whether or not its control image came back
    control_picture: Path | None = None  # that shall be followed, whatever it says of itself


def request_with(studio: Studio, adapter_id: str, prompt: str) -> Restored:
    """Return a request of a prompt with one adapter, and all else as the form begins with."""
    request = replace(_usual(studio), prompt=prompt, adapters={adapter_id: 1.0})
    name = studio.library.card(adapter_id).name
    return Restored(request, (), heading=f"{name} is chosen; write what it should do, and generate.")


def _usual(studio: Studio) -> GenerateRequest:
    engine = studio.engine
    sides: dict[str, Any] = {"width": engine.native_size, "height": engine.native_size}
    return GenerateRequest("", steps=engine.default_steps, guidance_scale=engine.default_guidance, **sides)


def restore(picture: Path, studio: Studio) -> Restored:
    """Read how a PNG was made; whatever stands in it, the answer is a checked request and sentences."""
    try:
        data = read_plain_file(picture, inside=picture.parent, max_bytes=MAX_BYTES)
        said = metadata.read_image_metadata(data) or read_foreign_metadata(data)
    except UnusableFileError as error:
        return Restored(None, (f"The picture {error}.",))
    except ValueError as error:
        return Restored(None, (sentence(error),))
    if said is None:
        return Restored(None, ("The picture does not say how it was made.",))
    return restore_metadata(said, studio)


def restore_metadata(said: ImageMetadata, studio: Studio) -> Restored:
    """Return the request of what a picture says of itself, for this studio's base and adapters."""
    reading = _Reading(said, studio)
    try:
        request = reading.request()
    except ValueError as error:
        return Restored(None, (sentence(error),))
    return Restored(request, tuple(reading.notes), followed_control="control_image_sha256" in said.options)


class _Reading:
    """Goes through what a picture says, and notes what cannot be taken over as it is."""

    def __init__(self, said: ImageMetadata, studio: Studio) -> None:
        self._said, self._engine = said, studio.engine
        self._cards, self._begun = studio.library.cards(), _usual(studio)
        foreign = f"It was made with {said.pipeline}; what means the same here is taken over."
        self.notes = [foreign] * (said.pipeline in (A1111, COMFYUI))

    def request(self) -> GenerateRequest:
        said, request = self._said, self._begun
        self._compare_base()
        found = self._adapters()
        fields = {name: getattr(said, name) for name in ("seed", "steps", "guidance_scale")}
        fields["control_strength"] = said.options.get("control_strength", 1.0)
        for name, value in fields.items():
            usual = getattr(request, name)
            says = "is not said" if value is None else f"of {printable(value, 40)} cannot be taken here"
            called = name.removesuffix("_scale").replace("control_strength", "strength of control")
            called = called.replace("_", " ")
            note = f"Its {called} {says}; {usual:g} is set, and the picture will be another."
            request = self._with(request, note, **{name: value})
        size = f"{said.width} × {said.height} px does not suit this base"
        note = f"Its size of {size}; its usual {self._engine.native_size} px are set."
        request = self._with(request, note, width=said.width, height=said.height)
        texts = {"prompt": said.prompt or "", "negative_prompt": said.negative_prompt or ""}
        for name, text in texts.items():
            if len(text) > MAX_PROMPT:
                what = f"Its {name.replace('_', ' ')} has {len(text)} characters"
                self.notes.append(f"{what}; the first {MAX_PROMPT} are taken.")
        image = self._control_image({name: card for name, (card, _) in found.items()})
        self._compare_rest()
        taken: dict[str, Any] = {name: text[:MAX_PROMPT] for name, text in texts.items()}
        adapters = {card.id: strength for card, strength in found.values()}
        return replace(request, adapters=adapters, control_image=image, start=self._start(), **taken)

    def _with(self, request: GenerateRequest, note: str, **fields: Any) -> GenerateRequest:
        """Return a request with fields, or without them and with a note where they cannot be taken."""
        try:
            return replace(request, **fields)
        except ValueError:
            self.notes.append(note)
            return request

    def _compare_base(self) -> None:
        said, here, name = self._said, self._engine.fingerprint, self._engine.base_name
        names = f"{printable(said.base or 'an unnamed base')}, and this studio draws with {name}"
        if said.base_fingerprint is None and said.base != name:
            self.notes.append(f"It was drawn with {names}.")
        elif said.base_fingerprint is not None and said.base_fingerprint != here:
            same_shape = here is not None and said.base_fingerprint.split("-")[0] == here.split("-")[0]
            why = "other weights, or other precision" if same_shape else "another architecture"
            self.notes.append(f"It was drawn with {names} ({why}); the picture will be another.")
        scheduler = self._engine.pipeline.scheduler
        if said.scheduler != (kind := type(scheduler).__name__):
            self.notes.append(f"Its sampler was {printable(said.scheduler)}, and here it is {kind}.")
        elif dict(said.scheduler_config) != metadata.scheduler_settings(scheduler):
            self.notes.append("Its sampler had other settings than here.")

    def _adapters(self) -> dict[str, tuple[Card, float]]:
        """Return the adapters that are here with their strengths, by the names in the picture.

        A control encoder without an adapter is among them, though pictures do not list it.
        """
        found: dict[str, tuple[Card, float]] = {}
        for use in self._said.adapters:
            name, hashes = printable(use.name), frozenset(use.sha256.values())
            same = [each for each in self._cards if hashes and each.hashes == hashes]
            card = min(same, key=lambda each: (not each.fits_base, each.name != use.name), default=None)
            if card is None or not card.fits_base or len(found) == MAX_ADAPTERS:
                why = f"one more than the {MAX_ADAPTERS} that are taken"
                if card is None:
                    name += f" ({next(iter(use.sha256.values()))[:10]}…)" if use.sha256 else ""
                    known = any(each.name == use.name for each in self._cards)
                    why = "not in the library" + "; the one of that name is another" * known
                elif not card.fits_base:
                    why = "not for this base"
                self.notes.append(f"The adapter {name} is {why}. It is left out.")
                continue
            strength = 1.0 if use.strength is None else max(STRENGTH.least, min(STRENGTH.most, use.strength))
            if strength != use.strength:
                was = "differed from layer to layer" if use.strength is None else f"was {use.strength:g}"
                self.notes.append(f"The strength of {name} {was}; {strength:g} is set.")
            found[use.name] = card, strength
        control, wanted = self._said.options.get("control"), self._said.options.get("control_encoder_sha256")
        same = [c for c in self._cards if c.kind == "control" and c.fits_base and c.hash == wanted]
        if isinstance(control, str) and control not in found and len(found) < MAX_ADAPTERS and same:
            found[control] = min(same, key=lambda card: card.name != control), 1.0
        return found

    def _control_image(self, cards: dict[str, Card]) -> Image.Image | None:
        options = self._said.options
        if "control_image_sha256" not in options:
            return None
        card = cards.get(str(options.get("control")))
        if card is None or card.kind != "control":
            by = "by an adapter that is not here; neither comes back."
            self.notes.append(f"It followed a control image {by}")
            return None
        if card.encoder_hash != options.get("control_encoder_sha256"):
            self.notes.append(f"The control encoder of {card.name} is another than the picture's.")
        image = self._engine.outputs.find_control(str(options["control_image_sha256"]))
        if image is None:
            self.notes.append("Its control image is not stored here; add it again in the tab Control.")
        return image

    def _start(self) -> Start | None:
        """Return the picture that it began with, where the studio kept that."""
        options, outputs = self._said.options, self._engine.outputs
        if "start_image_sha256" not in options:
            return None
        hashes = (str(options.get(f"start_{what}_sha256")) for what in ("image", "mask"))
        image, mask = map(outputs.find_control, hashes)
        if image is None or (mask is None and "start_mask_sha256" in options):
            name = printable(options.get("start_image") or "a picture", 80)
            self.notes.append(f"It began with {name}, which is not stored here; add it again.")
            return None
        strength: Any = options.get("start_strength")
        try:
            name = str(options["start_image"])
            return Start(image, strength=strength, mask=mask and mask.convert("L"), name=name)
        except (KeyError, ValueError):
            self.notes.append("What it says of the picture that it began with cannot be taken; add it again.")
            return None

    def _compare_rest(self) -> None:
        said, here = self._said, metadata.library_versions()
        unknown = [
            *(name for name in said.options if name not in (*_CONTROL, *_START)),
            *said.unrecorded,
        ]
        if unknown:
            self.notes.append(f"It was drawn with settings that have no place here: {listed(unknown)}.")
        other = {n: printable(v, 40) for n, v in said.versions.items() if n in here and v != here[n]}
        if other:
            by = ", ".join(f"{name} {version} (here {here[name]})" for name, version in other.items())
            self.notes.append(f"It was drawn with {by}; pixels may differ a little.")

"""A picture that was dropped, as the request that draws it again, and sentences on what differs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ether_diffusion.adapters import read_adapter
from ether_diffusion.adapters.format import content_hash
from ether_diffusion.pipelines.metadata import (
    AdapterUse,
    ImageMetadata,
    library_versions,
    read_image_metadata,
    scheduler_settings,
)
from ether_diffusion.pipelines.sampling import GUIDANCE, SIDE, STEPS, STRENGTH
from ether_diffusion.ui.errors import sentence
from ether_diffusion.ui.library import Card
from ether_diffusion.ui.requests import MAX_ADAPTERS, MAX_PROMPT, SEED, GenerateRequest
from ether_diffusion.ui.studio import Studio
from ether_diffusion.wording import listed, printable

MAX_BYTES = 64 * 2**20
_CONTROL = ("control", "control_strength", "control_image_sha256", "control_encoder_sha256")
"""Options of a call that a request has a place for."""


@dataclass(frozen=True)
class Restored:
    """What draws a picture again; None where it cannot be known, and then `differences` says why.

    `heading` tells what was filled in where it is not a picture's settings; `followed_control` says that the
    picture followed a control image, whether or not that came back.
    """

    request: GenerateRequest | None
    differences: tuple[str, ...]
    heading: str = ""
    followed_control: bool = False


def request_with(studio: Studio, adapter_id: str, prompt: str) -> Restored:
    """Return a request of a prompt with one adapter, and all else as the form begins with."""
    engine = studio.engine
    request = GenerateRequest(
        prompt=prompt,
        adapters={adapter_id: 1.0},
        steps=engine.default_steps,
        guidance_scale=engine.default_guidance,
        width=engine.native_size,
        height=engine.native_size,
    )
    name = studio.library.card(adapter_id).name
    return Restored(request, (), heading=f"{name} is chosen; write what it should do, and generate.")


def restore(picture: Path, studio: Studio) -> Restored:
    """Read how a PNG was made; whatever stands in it, the answer is a checked request and sentences."""
    try:
        if picture.stat().st_size > MAX_BYTES:
            return Restored(None, (f"The file is larger than {MAX_BYTES >> 20} MiB; it is not read.",))
        metadata = read_image_metadata(picture.read_bytes())
    except FileNotFoundError:
        return Restored(None, ("The picture is no longer there; drop it again.",))
    except ValueError as error:
        return Restored(None, (sentence(error),))
    if metadata is None:
        return Restored(None, ("The picture does not say how it was made.",))
    return restore_metadata(metadata, studio)


def restore_metadata(metadata: ImageMetadata, studio: Studio) -> Restored:
    """Return the request of what a picture says of itself, for this studio's base and adapters."""
    reading = _Reading(metadata, studio)
    try:
        request = reading.request()
    except ValueError as error:
        return Restored(None, (sentence(error),))
    followed = "control_image_sha256" in metadata.options
    return Restored(request, tuple(reading.notes), followed_control=followed)


class _Reading:
    """Goes through what a picture says, and notes what cannot be taken over as it is."""

    def __init__(self, said: ImageMetadata, studio: Studio) -> None:
        self._said, self._studio, self._engine = said, studio, studio.engine
        self._cards = studio.library.cards()
        self.notes: list[str] = []

    def request(self) -> GenerateRequest:
        said, engine, options = self._said, self._engine, self._said.options
        self._compare_base()
        found = self._adapters()
        fields: dict[str, Any] = {"width": said.width, "height": said.height}
        for name, value, bounds, usual in (
            ("seed", said.seed, SEED, 0),
            ("steps", said.steps, STEPS, engine.default_steps),
            ("guidance_scale", said.guidance_scale, GUIDANCE, engine.default_guidance),
            ("control_strength", options.get("control_strength", 1.0), STRENGTH, 1.0),
        ):
            fields[name] = value
            if value is None or isinstance(value, str) or not bounds.holds(value):
                says = "is not said" if value is None else f"of {printable(value, 40)} cannot be taken here"
                called = name.removesuffix("_scale").replace("control_strength", "strength of control")
                self.notes.append(f"Its {called} {says}; {usual:g} is set, and the picture will be another.")
                fields[name] = usual
        if not (SIDE.holds(said.width) and SIDE.holds(said.height)):
            fields |= {"width": None, "height": None}
            self.notes.append(
                f"Its size of {said.width} × {said.height} px does not suit this base; its usual "
                f"{engine.native_size} px are set."
            )
        fields["control_strength"] = float(fields["control_strength"])
        for name in ("prompt", "negative_prompt"):
            text = getattr(said, name) or ""
            fields[name] = text[:MAX_PROMPT]
            if len(text) > MAX_PROMPT:
                what = f"Its {name.replace('_', ' ')} has {len(text)} characters"
                self.notes.append(f"{what}; the first {MAX_PROMPT} are taken.")
        image = self._control_image({name: card for name, (card, _) in found.items()})
        request = GenerateRequest(
            adapters={c.id: s for c, s in found.values()}, control_image=image, **fields
        )
        self._compare_rest()
        return request

    def _compare_base(self) -> None:
        said, here = self._said, self._engine.fingerprint
        made_with = printable(said.base or "an unnamed base")
        names = f"{made_with}, and this studio draws with {self._engine.base_name}"
        if said.base_fingerprint is None and said.base != self._engine.base_name:
            self.notes.append(f"It was drawn with {names}.")
        elif said.base_fingerprint is not None and said.base_fingerprint != here:
            same_shape = here is not None and said.base_fingerprint.split("-")[0] == here.split("-")[0]
            why = "other weights, or other precision" if same_shape else "another architecture"
            self.notes.append(f"It was drawn with {names} ({why}); the picture will be another.")
        scheduler = self._engine.pipeline.scheduler
        if said.scheduler != (name := type(scheduler).__name__):
            self.notes.append(f"Its sampler was {printable(said.scheduler)}, and here it is {name}.")
        elif dict(said.scheduler_config) != scheduler_settings(scheduler):
            self.notes.append("Its sampler had other settings than here.")

    def _adapters(self) -> dict[str, tuple[Card, float]]:
        """Return the adapters that are here with their strengths, by the names in the picture.

        A control encoder that came without an adapter is among them, though pictures do not list it.
        """
        found: dict[str, tuple[Card, float]] = {}
        for use in self._said.adapters:
            card = self._card(use)
            if card is not None and len(found) < MAX_ADAPTERS:
                found[use.name] = card, self._strength(use)
            elif card is not None:
                self.notes.append(
                    f"It has more than {MAX_ADAPTERS} adapters; {printable(use.name)} is left out."
                )
        name, wanted = self._said.options.get("control"), self._said.options.get("control_encoder_sha256")
        same = [c for c in self._cards if c.kind == "control" and c.fits_base and c.hash == wanted]
        if isinstance(name, str) and name not in found and len(found) < MAX_ADAPTERS and same:
            found[name] = min(same, key=lambda card: card.name != name), 1.0
        return found

    def _card(self, use: AdapterUse) -> Card | None:
        same = [card for card in self._cards if self._is(card, use)]
        if not same:
            hashes = f" ({next(iter(use.sha256.values()))[:10]}…)" if use.sha256 else ""
            known = any(card.name == use.name for card in self._cards)
            but = "; the one of that name is another" if known else ""
            name = f"{printable(use.name)}{hashes}"
            self.notes.append(f"The adapter {name} is not in the library{but}. It is left out.")
            return None
        card = min(same, key=lambda card: (not card.fits_base, card.name != use.name))
        if not card.fits_base:
            self.notes.append(f"The adapter {card.name} is not for this base. It is left out.")
            return None
        return card

    def _is(self, card: Card, use: AdapterUse) -> bool:
        if not card.hash or card.hash not in use.sha256.values():
            return False
        try:
            one_part = len(use.sha256) == 1
            return one_part or dict(read_adapter(self._studio.library.folder(card.id)).hashes) == use.sha256
        except (FileNotFoundError, ValueError):  # deleted or damaged meanwhile
            return False

    def _strength(self, use: AdapterUse) -> float:
        name, strength = printable(use.name), use.strength
        if strength is None:
            self.notes.append(f"The strength of {name} differed from layer to layer; 1 is set.")
            return 1.0
        taken = max(STRENGTH.least, min(STRENGTH.most, strength))
        if taken != strength:
            self.notes.append(f"The strength of {name} was {strength:g}; {taken:g} is set.")
        return taken

    def _control_image(self, cards: dict[str, Card]) -> Image.Image | None:
        options = self._said.options
        if "control_image_sha256" not in options:
            return None
        card = cards.get(str(options.get("control")))
        if card is None or card.kind != "control":
            self.notes.append(
                "It followed a control image by an adapter that is not here; neither comes back."
            )
            return None
        encoder = read_adapter(self._studio.library.folder(card.id)).encoder
        if encoder is None or content_hash(encoder.state_dict()) != options.get("control_encoder_sha256"):
            self.notes.append(f"The control encoder of {card.name} is another than the picture's.")
        image = self._engine.outputs.find_control(str(options["control_image_sha256"]))
        if image is None:
            self.notes.append("Its control image is not stored here; add it again in the tab Control.")
        return image

    def _compare_rest(self) -> None:
        said, here = self._said, library_versions()
        unknown = [*(name for name in said.options if name not in _CONTROL), *said.unrecorded]
        if unknown:
            self.notes.append(f"It was drawn with settings that have no place here: {listed(unknown)}.")
        other = [
            f"{printable(name, 40)} {printable(version, 40)} (here {here[name]})"
            for name, version in said.versions.items()
            if name in here and version != here[name]
        ]
        if other:
            self.notes.append(f"It was drawn with {', '.join(other)}; pixels may differ a little.")

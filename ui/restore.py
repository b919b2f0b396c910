"""A picture that was dropped, as the request that draws it again, and sentences on what differs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ether_diffusion.adapters.content_hash import content_hash
from ether_diffusion.adapters.export import read_adapters
from ether_diffusion.control import read_control
from ether_diffusion.pipelines.describe import library_versions
from ether_diffusion.pipelines.metadata import AdapterUse, ImageMetadata, read_image_metadata
from ether_diffusion.pipelines.sampling import MAX_GUIDANCE, MAX_SIDE_PX, MAX_STEPS, MAX_STRENGTH
from ether_diffusion.ui.cards import Card
from ether_diffusion.ui.errors import sentence
from ether_diffusion.ui.requests import MAX_ADAPTERS, MAX_PROMPT, MAX_SEED, GenerateRequest
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
    return Restored(request, tuple(reading.differences), followed_control=followed)


class _Reading:
    """Goes through what a picture says, and notes what cannot be taken over as it is."""

    def __init__(self, said: ImageMetadata, studio: Studio) -> None:
        self._said, self._studio, self._engine = said, studio, studio.engine
        self.differences: list[str] = []

    def request(self) -> GenerateRequest:
        """Return the request.

        Raises:
            ValueError: it cannot be drawn here.
        """
        self._compare_base()
        prompt, negative = self._prompt(self._said.prompt), self._prompt(self._said.negative_prompt)
        found = self._adapters()
        width, height = self._size()
        self._compare_rest()
        return GenerateRequest(
            prompt=prompt,
            negative_prompt=negative,
            adapters={card.id: strength for card, strength in found.values()},
            seed=self._seed(),
            steps=self._steps(),
            guidance_scale=self._guidance(),
            width=width,
            height=height,
            control_image=self._control_image({name: card for name, (card, _) in found.items()}),
            control_strength=self._control_strength(),
        )

    def _note(self, sentence: str) -> None:
        self.differences.append(sentence)

    def _compare_base(self) -> None:
        said, facts = self._said, self._engine.machine.facts
        here = None if facts.fingerprint is None else facts.fingerprint.id
        made_with = printable(said.base or "an unnamed base")
        names = f"{made_with}, and this studio draws with {self._engine.base_name}"
        if said.base_fingerprint is None and said.base != self._engine.base_name:
            self._note(f"It was drawn with {names}.")
        elif said.base_fingerprint is not None and said.base_fingerprint != here:
            same_shape = here is not None and said.base_fingerprint.split("-")[0] == here.split("-")[0]
            why = "other weights, or other precision" if same_shape else "another architecture"
            self._note(f"It was drawn with {names} ({why}); the picture will be another.")
        if said.scheduler != facts.scheduler:
            self._note(f"Its sampler was {printable(said.scheduler)}, and here it is {facts.scheduler}.")
        elif dict(said.scheduler_config) != dict(facts.scheduler_config):
            self._note("Its sampler had other settings than here.")

    def _prompt(self, text: str | None) -> str:
        if text is not None and len(text) > MAX_PROMPT:
            self._note(f"Its prompt has {len(text)} characters; the first {MAX_PROMPT} are taken.")
        return (text or "")[:MAX_PROMPT]

    def _seed(self) -> int:
        seed = self._said.seed
        if seed is None:
            self._note("It does not say its seed; the picture will be another.")
        elif seed > MAX_SEED:
            self._note(
                f"Its seed {seed} is beyond {MAX_SEED}, the largest here; the picture will be another."
            )
        return 0 if seed is None or seed > MAX_SEED else seed

    def _steps(self) -> int:
        steps, usual = self._said.steps, self._engine.default_steps
        if steps is None or not 1 <= steps <= MAX_STEPS:
            self._note(f"It does not say a number of steps that can be taken; {usual} are set.")
            return usual
        return steps

    def _guidance(self) -> float:
        guidance, usual = self._said.guidance_scale, self._engine.default_guidance
        if guidance is None or not 0 <= guidance <= MAX_GUIDANCE:
            self._note(f"It does not say a guidance that can be taken; {usual:g} is set.")
            return usual
        return float(guidance)

    def _size(self) -> tuple[int | None, int | None]:
        sides = self._said.width, self._said.height
        multiple = self._engine.size_multiple
        if any(side % multiple or not multiple <= side <= MAX_SIDE_PX for side in sides):
            self._note(
                f"Its size of {sides[0]} × {sides[1]} px does not suit this base; its usual "
                f"{self._engine.native_size} px are set."
            )
            return None, None
        return sides

    def _adapters(self) -> dict[str, tuple[Card, float]]:
        """Return the adapters that are here with their strengths, by the names in the picture."""
        found: dict[str, tuple[Card, float]] = {}
        cards = self._studio.library.cards()
        for use in self._said.adapters:
            card = self._card(use, cards)
            if card is not None and len(found) < MAX_ADAPTERS:
                found[use.name] = card, self._strength(use)
            elif card is not None:
                self._note(f"It has more than {MAX_ADAPTERS} adapters; {printable(use.name)} is left out.")
        return found | self._lone_encoder(found, cards)

    def _lone_encoder(self, found: Mapping[str, object], cards: list[Card]) -> dict[str, tuple[Card, float]]:
        """Return the control encoder by its name where it came without an adapter, which pictures list."""
        name, wanted = self._said.options.get("control"), self._said.options.get("control_encoder_sha256")
        if not isinstance(name, str) or name in found or len(found) >= MAX_ADAPTERS:
            return {}
        same = [card for card in cards if card.kind == "control" and card.fits_base and card.hash == wanted]
        return {name: (min(same, key=lambda card: card.name != name), 1.0)} if same else {}

    def _card(self, use: AdapterUse, cards: list[Card]) -> Card | None:
        same = [card for card in cards if self._is(card, use)]
        if not same:
            hashes = f" ({next(iter(use.sha256.values()))[:10]}…)" if use.sha256 else ""
            known = any(card.name == use.name for card in cards)
            but = "; the one of that name is another" if known else ""
            self._note(
                f"The adapter {printable(use.name)}{hashes} is not in the library{but}. It is left out."
            )
            return None
        card = min(same, key=lambda card: (not card.fits_base, card.name != use.name))
        if not card.fits_base:
            self._note(f"The adapter {card.name} is not for this base. It is left out.")
            return None
        return card

    def _is(self, card: Card, use: AdapterUse) -> bool:
        if not card.hash or card.hash not in use.sha256.values():
            return False
        if len(use.sha256) == 1:
            return True
        try:
            adapters = read_adapters(self._studio.library.folder(card.id))
        except (FileNotFoundError, ValueError):  # deleted or damaged meanwhile
            return False
        return {name: content_hash(one.tensors) for name, one in adapters.items()} == dict(use.sha256)

    def _strength(self, use: AdapterUse) -> float:
        if use.strength is None:
            self._note(f"The strength of {printable(use.name)} differed from layer to layer; 1 is set.")
            return 1.0
        if abs(use.strength) > MAX_STRENGTH:
            self._note(
                f"The strength of {printable(use.name)} was {use.strength:g}; {MAX_STRENGTH:g} is set."
            )
        return max(-MAX_STRENGTH, min(MAX_STRENGTH, float(use.strength)))

    def _control_strength(self) -> float:
        strength = self._said.options.get("control_strength", 1.0)
        if isinstance(strength, str) or not abs(strength) <= MAX_STRENGTH:
            self._note("It does not say a strength of control that can be taken; 1 is set.")
            return 1.0
        return float(strength)

    def _control_image(self, cards: Mapping[str, Card]) -> Image.Image | None:
        options = self._said.options
        if "control_image_sha256" not in options:
            return None
        card = cards.get(str(options.get("control")))
        if card is None or card.kind != "control":
            self._note("It followed a control image by an adapter that is not here; neither comes back.")
            return None
        encoder = read_control(self._studio.library.folder(card.id))
        if content_hash(encoder.state_dict()) != options.get("control_encoder_sha256"):
            self._note(f"The control encoder of {card.name} is another than the picture's.")
        image = self._engine.outputs.find_control(str(options["control_image_sha256"]))
        if image is None:
            self._note("Its control image is not stored here; add it again in the tab Control.")
        return image

    def _compare_rest(self) -> None:
        said = self._said
        unknown = [*(name for name in said.options if name not in _CONTROL), *said.unrecorded]
        if unknown:
            self._note(f"It was drawn with settings that have no place here: {listed(unknown)}.")
        here = library_versions()
        other = [
            f"{printable(name, 40)} {printable(version, 40)} (here {here[name]})"
            for name, version in said.versions.items()
            if name in here and version != here[name]
        ]
        if other:
            self._note(f"It was drawn with {', '.join(other)}; pixels may differ a little.")

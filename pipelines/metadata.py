"""What a picture says of how it was made: written into PNGs as text, and read back strictly."""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import cast

from PIL import Image, PngImagePlugin

from ether_diffusion.adapters.adapter import Fact
from ether_diffusion.pipelines.png_text import MAX_TEXT_BYTES, read_png_text
from ether_diffusion.strict_json import Json, is_number, is_whole, parse_json
from ether_diffusion.wording import listed, printable

KEYWORD = "ether_diffusion"
"""Of the text chunk that holds the JSON."""
PARAMETERS_KEYWORD = "parameters"
"""Of the text chunk for people, in the lines that other tools show."""
FORMAT_VERSION = 1


@dataclass(frozen=True)
class AdapterUse:
    """An adapter in force while a picture was made.

    Attributes:
        strength: s of W + s (W' - W); None where it differs from layer to layer.
        sha256: `content_hash` of its tensors by component, e.g. {"unet": "9f86…"}, as `ether inspect` shows
            it; {} where these are offloaded.
    """

    name: str
    strength: float | None
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class ImageMetadata:
    """How one picture was made.

    Attributes:
        seed: of the picture's own generator on the CPU; None where the caller gave a used or shared one.
        base: hub id or name of the base, without its path.
        base_fingerprint: short name of the base's weights, as `BaseFingerprint.id`.
        scheduler_config: what differs from the scheduler's defaults.
        options: further arguments of the call that were set.
        unrecorded: arguments that were set and are no text or number, such as latents.
        versions: of the libraries, by name.
    """

    prompt: str | None
    negative_prompt: str | None
    seed: int | None
    steps: int | None
    guidance_scale: float | None
    width: int
    height: int
    pipeline: str
    scheduler: str
    scheduler_config: Mapping[str, Fact] = field(default_factory=dict)
    base: str | None = None
    base_fingerprint: str | None = None
    adapters: tuple[AdapterUse, ...] = ()
    options: Mapping[str, Fact] = field(default_factory=dict)
    unrecorded: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Return it as one line of ASCII."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)


def attach_metadata(image: Image.Image, metadata: ImageMetadata) -> None:
    """Let a picture carry its metadata: `image.save("x.png")` writes it, but not that of a copy.

    Raises:
        ValueError: it is larger than what would be read back.
    """
    text = metadata.to_json()
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(
            f"the metadata of a picture has {len(text)} bytes and {MAX_TEXT_BYTES} are read; "
            "shorten its prompt"
        )
    image.info[KEYWORD] = text
    image.encoderinfo = {"pnginfo": _chunks(metadata)}


def png_bytes(image: Image.Image) -> bytes:
    """Return a picture as a PNG with the metadata that it or the picture it is a copy of carries.

    Raises:
        ValueError: it carries something else under our keyword.
    """
    text, buffer = image.info.get(KEYWORD), io.BytesIO()
    chunks = None if text is None else _chunks(parse_metadata(text, "the metadata of the picture"))
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def _chunks(metadata: ImageMetadata) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(KEYWORD, metadata.to_json())
    chunks.add_text(PARAMETERS_KEYWORD, parameters_text(metadata))
    return chunks


def parameters_text(metadata: ImageMetadata) -> str:
    """Return the lines for people: prompt, negative prompt, then settings in the order that A1111 uses."""
    adapters = ", ".join(
        f"{use.name} {'by layer' if use.strength is None else format(use.strength, 'g')}"
        f" ({next(iter(use.sha256.values()), '')[:10]})"
        for use in metadata.adapters
    )
    facts = {
        "Steps": metadata.steps,
        "Sampler": metadata.scheduler,
        "CFG scale": None if metadata.guidance_scale is None else f"{metadata.guidance_scale:g}",
        "Seed": metadata.seed,
        "Size": f"{metadata.width}x{metadata.height}",
        "Model": metadata.base,
        "ETHER": f'"{adapters}"' if adapters else None,
    }
    lines = [metadata.prompt or ""]
    if metadata.negative_prompt:
        lines.append(f"Negative prompt: {metadata.negative_prompt}")
    lines.append(", ".join(f"{name}: {fact}" for name, fact in facts.items() if fact is not None))
    return "\n".join(lines)


def read_image_metadata(picture: str | Path | bytes) -> ImageMetadata | None:
    """Read what a PNG says of how it was made, without decoding it; None where it says nothing of ours.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no PNG, or what it says is damaged, too large, or of a newer release.
    """
    where = "the picture" if isinstance(picture, bytes) else printable(picture, 300)
    text = read_png_text(picture if isinstance(picture, bytes) else Path(picture), KEYWORD, where)
    return None if text is None else parse_metadata(text, f"the metadata of {where}")


def parse_metadata(text: str | bytes, where: str) -> ImageMetadata:
    """Read metadata from its JSON; `where` opens the messages.

    Raises:
        ValueError: it is not of the closed schema, or a newer release made it.
    """
    found = parse_json(text, where)
    if not isinstance(found, dict):
        raise ValueError(f"{where} is no JSON object; the file is damaged")
    version = found.get("format_version")
    if is_whole(version) and cast(int, version) > FORMAT_VERSION:
        raise ValueError(
            f"{where} was made by a newer release (format {version}; this one reads up to {FORMAT_VERSION}); "
            "upgrade ether-diffusion"
        )
    names = {known.name for known in fields(ImageMetadata)}
    if found.keys() != names:
        raise ValueError(
            f"{where} has other entries than expected ({listed(sorted(found.keys() ^ names))}); "
            "the file is damaged"
        )
    wrong = [name for name, is_valid in _validity(found).items() if not is_valid]
    if wrong:
        shown = printable(json.dumps(found[wrong[0]]))
        raise ValueError(f"{where}: the entry {wrong[0]} is {shown}; the file is damaged")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    adapters = [_use(use) for use in cast(list[dict[str, Json]], found["adapters"])]
    return ImageMetadata(**values | {"adapters": tuple(adapters)})  # type: ignore[arg-type]  # checked above


def _validity(found: dict[str, Json]) -> dict[str, bool]:
    adapters, unrecorded = found["adapters"], found["unrecorded"]
    texts = {name: isinstance(found[name], str) for name in ("pipeline", "scheduler")}
    texts |= {
        name: isinstance(found[name], str | None)
        for name in ("prompt", "negative_prompt", "base", "base_fingerprint")
    }
    sides = {name: _is_from(found[name], 1) for name in ("width", "height")}
    return texts | {
        **sides,
        "format_version": found["format_version"] == FORMAT_VERSION and is_whole(found["format_version"]),
        "seed": found["seed"] is None or _is_from(found["seed"], 0),
        "steps": found["steps"] is None or _is_from(found["steps"], 0),
        "guidance_scale": found["guidance_scale"] is None or is_number(found["guidance_scale"]),
        "scheduler_config": _is_flat(found["scheduler_config"]),
        "options": _is_flat(found["options"]),
        "unrecorded": isinstance(unrecorded, list) and all(isinstance(name, str) for name in unrecorded),
        "versions": _is_texts(found["versions"]),
        "adapters": isinstance(adapters, list) and all(map(_is_use, adapters)),
    }


def _is_from(value: Json, least: int) -> bool:
    return is_whole(value) and cast(int, value) >= least


def _is_flat(value: Json) -> bool:
    return isinstance(value, dict) and all(isinstance(fact, str | int | float) for fact in value.values())


def _is_texts(value: Json) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_use(value: Json) -> bool:
    if not isinstance(value, dict) or value.keys() != {known.name for known in fields(AdapterUse)}:
        return False
    strength, hashes = value["strength"], value["sha256"]
    return (
        isinstance(value["name"], str)
        and (strength is None or is_number(strength))
        and isinstance(hashes, dict)
        and all(isinstance(text, str) and _is_sha256(text) for text in hashes.values())
    )


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _use(value: dict[str, Json]) -> AdapterUse:
    return AdapterUse(**value)  # type: ignore[arg-type]  # checked by _is_use


def recordable(value: object) -> bool:
    """Say whether a value is a fact that metadata holds: text, a finite number, or true or false."""
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))

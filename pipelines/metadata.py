"""What a picture says of how it was made: written into PNGs as text, and read back strictly."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import Field

from ether_diffusion.adapters.format import Fact, check_version
from ether_diffusion.strict_json import checked, parse_json, validate
from ether_diffusion.wording import printable

KEYWORD = "ether_diffusion"
"""Of the text chunk that holds the JSON."""
PARAMETERS_KEYWORD = "parameters"
"""Of the text chunk for people, in the lines that other tools show."""
FORMAT_VERSION = 1
MAX_TEXT_BYTES = 1 << 18
MAX_HEAD_BYTES = 1 << 20
"""Of a PNG that are read: what says how it was made stands before its pixels. Pillow bounds the unpacking."""


@checked()
class AdapterUse:
    """An adapter in force while a picture was made.

    Attributes:
        strength: s of W + s (W' - W); None where it differs from layer to layer.
        sha256: `content_hash` of its tensors by component, e.g. {"unet": "9f86…"}, as `ether inspect` shows
            it; {} where these are offloaded.
    """

    name: str
    strength: float | None
    sha256: Mapping[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]


@checked()
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
    seed: Annotated[int, Field(ge=0)] | None
    steps: Annotated[int, Field(ge=0)] | None
    guidance_scale: float | None
    width: Annotated[int, Field(ge=1)]
    height: Annotated[int, Field(ge=1)]
    pipeline: str
    scheduler: str
    scheduler_config: Mapping[str, Fact] = Field(default_factory=dict)
    base: str | None = None
    base_fingerprint: str | None = None
    adapters: tuple[AdapterUse, ...] = ()
    options: Mapping[str, Fact] = Field(default_factory=dict)
    unrecorded: tuple[str, ...] = ()
    versions: Mapping[str, str] = Field(default_factory=dict)
    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)] = FORMAT_VERSION

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


def metadata_of(image: Image.Image) -> ImageMetadata | None:
    """Return what a picture in memory carries; None where that is nothing."""
    text = image.info.get(KEYWORD)
    return None if text is None else parse_metadata(text, "the metadata of a picture")


def png_bytes(image: Image.Image) -> bytes:
    """Return a picture as a PNG with the metadata that it or the picture it is a copy of carries."""
    metadata, buffer = metadata_of(image), io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=None if metadata is None else _chunks(metadata))
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
    text = read_png_text(picture, KEYWORD, where)
    return None if text is None else parse_metadata(text, f"the metadata of {where}")


def read_png_text(picture: str | Path | bytes, keyword: str, where: str) -> str | None:
    """Return the text of a keyword that stands before a PNG's pixels, which are not decoded."""
    if not isinstance(picture, bytes):
        if not Path(picture).exists():
            raise FileNotFoundError(f"there is no file {where}")
        if not Path(picture).is_file():
            raise ValueError(f"{where} is not a regular file; give a PNG")
        with Path(picture).open("rb") as file:
            picture = file.read(MAX_HEAD_BYTES)
    try:
        with Image.open(io.BytesIO(picture[:MAX_HEAD_BYTES]), formats=["PNG"]) as image:
            text = image.info.get(keyword)
    except UnidentifiedImageError:
        raise ValueError(f"{where} is not a PNG, or damaged; metadata is read from PNGs only") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} is damaged or hostile ({printable(error)}); it is not read") from None
    if text is not None and len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"{where} carries {len(text)} bytes of metadata; at most {MAX_TEXT_BYTES} are read")
    return text


def parse_metadata(text: str | bytes, where: str) -> ImageMetadata:
    """Read metadata from its JSON; `where` opens the messages."""
    found = parse_json(text, where)
    if isinstance(found, dict):
        check_version(found.get("format_version"), where, FORMAT_VERSION)
    return validate(found, ImageMetadata, where)

"""What a picture says of how it was made: taken from the call, written into PNGs, and read back strictly."""

import inspect
import io
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import Field
from torch import nn

import ether_diffusion
from ether_diffusion.adapters import models
from ether_diffusion.adapters.format import Fact, check_version, is_fact
from ether_diffusion.strict_json import checked, parse_json, validate
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.wording import printable

KEYWORD, PARAMETERS_KEYWORD = "ether_diffusion", "parameters"
"""Of the text chunks that hold the JSON, and the lines for people that other tools show."""
FORMAT_VERSION = 1
MAX_TEXT_BYTES, MAX_HEAD_BYTES = 1 << 18, 1 << 20
"""Of the JSON, and of a PNG that are read: it stands before the pixels. Pillow bounds the unpacking."""
MAX_SEED = 2**63 - 1
_RECORDED = {"prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "height", "width"}
_IRRELEVANT = {"num_images_per_prompt", "output_type", "return_dict", "generator"}


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


@dataclass(frozen=True)
class Call:
    """Arguments as a diffusers pipeline takes them, with the defaults of its signature beside them."""

    arguments: Mapping[str, Any]
    defaults: Mapping[str, Any]
    num_prompts: int
    images_per_prompt: int
    seeds: Sequence[int | None]

    @property
    def scale(self) -> float:
        """What the call multiplies the strengths of all active adapters by."""
        return float((self.arguments.get("cross_attention_kwargs") or {}).get("scale", 1.0))

    def describe(self, pipeline: models.Pipeline, *, fingerprint: str | None) -> Callable[..., ImageMetadata]:
        """Return what tells of the picture of an index, `describe(index, image, adapters)`."""
        given, scheduler = self.arguments, pipeline.components["scheduler"]
        further = {
            name: value
            for name, value in given.items()
            if name not in _RECORDED | _IRRELEVANT and not _same(value, self.defaults.get(name))
        }
        has_own_steps = given.get("timesteps") is not None or given.get("sigmas") is not None
        common: dict[str, Any] = {
            "steps": None if has_own_steps else int(given["num_inference_steps"]),
            "guidance_scale": float(given["guidance_scale"] or given.get("true_cfg_scale") or 0.0),
            "pipeline": type(pipeline).__name__,
            "options": {name: value for name, value in further.items() if is_fact(value)},
            "unrecorded": tuple(name for name, value in further.items() if not is_fact(value)),
            **base_facts(pipeline, scheduler, fingerprint),
        }

        def of_picture(index: int, image: Image.Image, adapters: tuple[AdapterUse, ...]) -> ImageMetadata:
            prompts = {name: given.get(name) for name in ("prompt", "negative_prompt")}
            own: dict[str, Any] = {
                name: each if each is None or isinstance(each, str) else each[index // self.images_per_prompt]
                for name, each in prompts.items()
            }
            own |= {"seed": self.seeds[index], "width": image.width, "height": image.height}
            return ImageMetadata(adapters=adapters, **own, **common)

        return of_picture


def bind_call(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    keywords: Mapping[str, Any],
    *,
    seed: int | Sequence[int] | None,
) -> Call:
    """Bind the arguments of a call of `function`, with a generator for each picture.

    Generators are on the CPU, whose draws are the same on every machine.
    """
    signature = inspect.signature(function)
    if keywords.get("negative_prompt") is None:
        keywords = {name: value for name, value in keywords.items() if name != "negative_prompt"}
    elif "negative_prompt" not in signature.parameters:
        raise ValueError("this base's pipeline takes no negative prompt; leave it out")
    bound = signature.bind(*arguments, **keywords)
    bound.apply_defaults()
    values = dict(bound.arguments)
    values |= values.pop("kwargs", {})
    num_prompts, images_per_prompt = num_prompts_of(values), values["num_images_per_prompt"] or 1
    num_images, given, seeds = num_prompts * images_per_prompt, values["generator"], list[int | None]()
    if given is None:
        drawn = _expand_seeds(seed, num_images)
        seeds += drawn
        values["generator"] = [torch.Generator("cpu").manual_seed(one) for one in drawn]
    elif seed is not None:
        raise ValueError("found both seed and generator; give one of them")
    else:
        generators = [given] if isinstance(given, torch.Generator) else list(given)
        told = len(generators) == num_images
        seeds += map(_fresh_seed, generators) if told else [None] * num_images
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    return Call(values, defaults, num_prompts, images_per_prompt, seeds)


def num_prompts_of(arguments: Mapping[str, Any]) -> int:
    """Return how many prompts, or rows of embeddings, a call has."""
    prompt, embeddings = arguments.get("prompt"), arguments.get("prompt_embeds")
    rows = embeddings if prompt is None else prompt
    return 1 if rows is None or isinstance(rows, str) else len(rows)


def base_facts(pipeline: models.Pipeline, scheduler: Any, fingerprint: str | None) -> dict[str, Any]:
    """Return the fields of metadata that say what drew."""
    return {
        "scheduler": type(scheduler).__name__,
        "scheduler_config": scheduler_settings(scheduler),
        "base": models.name_of_base(pipeline),
        "base_fingerprint": fingerprint,
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """Return the versions that decide on the pixels of a picture, by library."""
    libraries: tuple[Any, ...] = (ether_diffusion, diffusers, torch)
    return {library.__name__: library.__version__ for library in libraries}


def scheduler_settings(scheduler: Any) -> dict[str, Fact]:
    """Return what differs from the defaults in a scheduler's configuration."""
    settings: dict[str, Fact] = {}
    for name, parameter in inspect.signature(type(scheduler).__init__).parameters.items():
        value = scheduler.config.get(name, parameter.default)
        if name != "self" and not _same(value, parameter.default):
            settings[name] = value if is_fact(value) else str(value)
    return settings


def fingerprint_of(unet: nn.Module) -> str | None:
    """Return the short name of a UNet's own weights, those of its attention projections."""
    names = sorted(models.plain_targets(models.bare_model(unet), EtherConfig()))
    found = models.base_fingerprint(unet, names) if names else None
    return None if found is None else found.id


def _same(value: object, default: object) -> bool:
    return value is default or (is_fact(value) and value == default)


def _expand_seeds(seed: int | Sequence[int] | None, num_images: int) -> list[int]:
    """Return a seed per picture: seed, seed + 1, …, or those given; None draws the first from torch's own."""
    if seed is None:
        seed = int(torch.randint(2**32, ()))
    first = 0 if isinstance(seed, Sequence) else operator.index(seed)
    given = seed if isinstance(seed, Sequence) else range(first, first + num_images)
    seeds = [operator.index(value) for value in given]
    if len(seeds) != num_images:
        raise ValueError(f"found {len(seeds)} seeds for {num_images} pictures; give one per picture, or one")
    wrong = [value for value in seeds if not 0 <= value <= MAX_SEED]
    if wrong:
        raise ValueError(f"a seed is a whole number from 0 to 2^63 - 1; found {wrong[0]}")
    return seeds


def _fresh_seed(generator: torch.Generator) -> int | None:
    """Return the seed that a caller's generator stands for; None where a seed does not say it all."""
    seed = generator.initial_seed()
    if generator.device.type != "cpu" or not 0 <= seed <= MAX_SEED:
        return None
    is_fresh = torch.equal(torch.Generator("cpu").manual_seed(seed).get_state(), generator.get_state())
    return seed if is_fresh else None


def attach_metadata(image: Image.Image, metadata: ImageMetadata) -> None:
    """Let a picture carry its metadata: `image.save("x.png")` writes it, but not that of a copy."""
    text = metadata.to_json()
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"metadata has {len(text)} bytes of {MAX_TEXT_BYTES}; shorten its prompt")
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
    negative = [f"Negative prompt: {metadata.negative_prompt}"] if metadata.negative_prompt else []
    settings = ", ".join(f"{name}: {fact}" for name, fact in facts.items() if fact is not None)
    return "\n".join([metadata.prompt or "", *negative, settings])


def read_image_metadata(picture: str | Path | bytes) -> ImageMetadata | None:
    """Read what a PNG says of how it was made, without decoding it; None where it says nothing of ours.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no PNG, or what it says is damaged, too large, or of a newer release.
    """
    where = "the picture" if isinstance(picture, bytes) else printable(picture, 300)
    if not isinstance(picture, bytes):
        if not Path(picture).exists():
            raise FileNotFoundError(f"there is no file {where}")
        if not Path(picture).is_file():
            raise ValueError(f"{where} is not a regular file; give a PNG")
        with Path(picture).open("rb") as file:
            picture = file.read(MAX_HEAD_BYTES)
    try:
        with Image.open(io.BytesIO(picture[:MAX_HEAD_BYTES]), formats=["PNG"]) as image:
            text = image.info.get(KEYWORD)
    except UnidentifiedImageError:
        raise ValueError(f"{where} is not a PNG, or damaged; metadata is read from PNGs only") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} is damaged or hostile ({printable(error)}); it is not read") from None
    if text is not None and len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"{where} carries {len(text)} bytes of metadata; at most {MAX_TEXT_BYTES} are read")
    return None if text is None else parse_metadata(text, f"the metadata of {where}")


def parse_metadata(text: str | bytes, where: str) -> ImageMetadata:
    """Read metadata from its JSON; `where` opens the messages."""
    found = parse_json(text, where)
    if isinstance(found, dict):
        check_version(found.get("format_version"), where, FORMAT_VERSION)
    return validate(found, ImageMetadata, where)

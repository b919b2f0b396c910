"""What pictures of A1111's web UI and of ComfyUI say of how they were made, where it means the same here."""

import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image
from pydantic import BaseModel

from ether_diffusion.pipelines.metadata import (
    MAX_HEAD_BYTES,
    MAX_TEXT_BYTES,
    PARAMETERS_KEYWORD,
    ImageMetadata,
)
from ether_diffusion.pipelines.opening import SCHEDULERS
from ether_diffusion.strict_json import parse_json, validate
from ether_diffusion.wording import printable

A1111, COMFYUI = "A1111's web UI", "ComfyUI"
_SAMPLERS = {
    "ddim": "ddim", "euler": "euler", "euler a": "euler_a", "euler_ancestral": "euler_a", "heun": "heun",
    "lcm": "lcm", "dpm++ 2m": "dpm++", "dpmpp_2m": "dpm++", "unipc": "unipc", "uni_pc": "unipc",
    "plms": "pndm",
}  # fmt: skip
"""Their names of samplers, in small letters, by which ours are the same."""
_LORA = re.compile(r"<(?:lora|lyco|hypernet):([^<>]{1,200})>")
_PART = re.compile(r'\s*([A-Za-z][\w /-]{0,60}):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
_TAKEN = frozenset({"Steps", "Sampler", "CFG scale", "Seed", "Size", "Model"})
_SILENT = frozenset({"Model hash", "Version"})
_PLAIN = frozenset({"CLIPTextEncode", "EmptyLatentImage", "VAEDecode", "SaveImage", "PreviewImage"})
_LOADERS = {"CheckpointLoaderSimple": "ckpt_name", "UNETLoader": "unet_name"}
_MAX_LINKS = 50


class _Node(BaseModel):
    """A node of ComfyUI's graph as it is run: values, and links to other nodes as [id, output]."""

    class_type: str
    inputs: dict[str, Any]


def read_foreign_metadata(picture: bytes) -> ImageMetadata | None:
    """Return what a PNG of those tools says; what has no place here is named in `unrecorded`.

    Raises:
        ValueError: it says something of the kind that cannot be read.
    """
    with Image.open(io.BytesIO(picture[:MAX_HEAD_BYTES]), formats=["PNG"]) as image:
        texts, size = {n: image.info.get(n) for n in (PARAMETERS_KEYWORD, "prompt", "workflow")}, image.size
    for name, text in texts.items():
        if isinstance(text, str) and len(text) > MAX_TEXT_BYTES:
            raise ValueError(
                f"the picture has {len(text)} characters of {name}; at most {MAX_TEXT_BYTES} are read"
            )
    parameters, graph = texts[PARAMETERS_KEYWORD], texts["prompt"]
    if isinstance(parameters, str) and re.search(r"^Steps: \d", parameters, re.MULTILINE):
        return _of_lines(parameters, size)
    if isinstance(graph, str):
        return _of_graph(graph, size)
    if texts["workflow"] is not None:
        raise ValueError(
            "the picture has ComfyUI's workflow without what was run; save it with its prompt, too"
        )
    return None


def _of_lines(text: str, size: tuple[int, int]) -> ImageMetadata:
    """Read prompt, negative prompt and a line of settings."""
    head, _, line = f"\n{text}".rpartition("\nSteps: ")
    prompt, _, negative = head.partition("\nNegative prompt:")
    said = {name: value.strip(' "') for name, value in _PART.findall(f"Steps: {line}")}
    loras = [f"lora {each}" for each in _LORA.findall(text)]
    further = [name for name in said if name not in _TAKEN | _SILENT]
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", said.get("Size", ""))
    return _metadata(
        A1111,
        (int(found[1]), int(found[2])) if found else size,
        prompt=_LORA.sub("", prompt).strip(),
        negative_prompt=_LORA.sub("", negative).strip() or None,
        sampler=said.get("Sampler"),
        model=said.get("Model"),
        unrecorded=[*loras, *further],
        numbers={
            "steps": said.get("Steps"),
            "guidance_scale": said.get("CFG scale"),
            "seed": said.get("Seed"),
        },
    )


def _of_graph(text: str, size: tuple[int, int]) -> ImageMetadata:
    """Read the sampler of a graph and what leads to it."""
    where = "what ComfyUI wrote into the picture"
    nodes = validate(parse_json(text, where), dict[str, _Node], where)
    samplers = [node for node in nodes.values() if node.class_type in ("KSampler", "KSamplerAdvanced")]
    if not samplers:
        raise ValueError(f"{where} has no KSampler, by which alone its settings are known; type them in")
    sampler, values = samplers[0], samplers[0].inputs
    latents = _linked(nodes, sampler, "latent_image")
    sides = tuple(latents.inputs.get(side) for side in ("width", "height")) if latents else ()
    is_size = len(sides) == 2 and all(type(side) is int and 0 < side < 10**5 for side in sides)
    known = {*_PLAIN, *_LOADERS, sampler.class_type}
    further = [kind for kind in dict.fromkeys(n.class_type for n in nodes.values()) if kind not in known]
    if values.get("scheduler", "normal") not in ("normal", "simple"):
        further.append(f"scheduler {values['scheduler']}")
    further += [f"{len(samplers)} samplers, of which the first is taken"] * (len(samplers) > 1)
    further += [f"denoise {values['denoise']}"] * (values.get("denoise", 1) != 1)
    models = (n.inputs.get(_LOADERS[n.class_type]) for n in nodes.values() if n.class_type in _LOADERS)
    return _metadata(
        COMFYUI,
        sides if is_size else size,  # type: ignore[arg-type]
        prompt=_text(nodes, sampler, "positive") or "",
        negative_prompt=_text(nodes, sampler, "negative") or None,
        sampler=values.get("sampler_name"),
        model=next((str(each).rpartition(".")[0] or str(each) for each in models), None),
        unrecorded=further,
        numbers={
            "steps": values.get("steps"),
            "guidance_scale": values.get("cfg"),
            "seed": values.get("seed", values.get("noise_seed")),
        },
    )


def _linked(nodes: Mapping[str, _Node], node: _Node, name: str) -> _Node | None:
    link = node.inputs.get(name)
    return nodes.get(str(link[0])) if isinstance(link, list) and link else None


def _chain(nodes: Mapping[str, _Node], node: _Node, name: str) -> Iterator[_Node]:
    for _ in range(_MAX_LINKS):
        found = _linked(nodes, node, name)
        if found is None:
            return
        yield found
        node, name = found, name if name in found.inputs else "conditioning"


def _text(nodes: Mapping[str, _Node], sampler: _Node, name: str) -> str | None:
    """Return the prompt that a sampler is linked to, through what changes its conditioning."""
    for node in _chain(nodes, sampler, name):
        if isinstance(text := node.inputs.get("text"), str):
            return text
    return None


def _metadata(
    tool: str, size: tuple[int, int], *, sampler: object, model: object, numbers: Mapping[str, object],
    unrecorded: list[str], **texts: Any,
) -> ImageMetadata:  # fmt: skip
    named = str(sampler or "unknown")
    plain = re.sub(r" (?:karras|exponential|automatic)$", "", named.lower())
    schedule = [named[len(plain) :].strip()] if len(plain) < len(named) else []
    ours = _SAMPLERS.get(plain)
    read: dict[str, Any] = {}
    for name, value in numbers.items():
        text = str(value).strip()
        fits = re.fullmatch(r"\d{1,19}" if name != "guidance_scale" else r"\d{1,6}(?:\.\d{1,9})?", text)
        read[name] = None if not fits else float(text) if name == "guidance_scale" else int(text)
    return ImageMetadata(
        width=size[0],
        height=size[1],
        pipeline=tool,
        scheduler=SCHEDULERS[ours] if ours else printable(named, 80),
        base=None if model is None else printable(model, 200),
        unrecorded=tuple(printable(each, 80) for each in (*unrecorded, *schedule)),
        **read,
        **texts,
    )

"""The model card beside an adapter: what the Hub shows, and how to load what is there."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ether_diffusion.adapters.format import AdapterMetadata, AdapterPart
from ether_diffusion.adapters.methods import name_of, title_of
from ether_diffusion.tiny_world import ALIAS
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.wording import printable

_MARK = (
    "\n<!-- written by ether-diffusion, sha256 of the above: {digest}; once edited, it is left alone -->\n"
)
_MARKED = re.compile(
    r"(?P<text>.*)\n<!-- written by ether-diffusion, sha256 of the above: (?P<digest>[0-9a-f]{64}); .*-->\n",
    re.DOTALL,
)


Pictures = Sequence[tuple[str, str]]
"""Prompts, and the paths of what was drawn from them, relative to the card."""


CONTROL_PIPELINE, XL_CONTROL_PIPELINE = "EtherControlPipeline", "EtherControlXLPipeline"


def model_card(
    adapter: AdapterPart,
    *,
    has_lora_export: bool,
    pictures: Pictures = (),
    evaluation: Sequence[str] = (),
    control: str | None = None,
) -> str:
    """Return the README.md of an adapter: YAML for the Hub, the trigger, how to load, pictures.

    evaluation are lines of Markdown on what was measured; control is the pipeline of ours that takes the
    adapter with the control encoder beside it, where there is one.
    """
    metadata, config = adapter.metadata, adapter.config
    if not isinstance(config, EtherConfig):
        title = name_of(config)
        return plain_card(
            title,
            metadata,
            has_lora_export=has_lora_export,
            pictures=pictures,
            evaluation=evaluation,
            control=control,
        )
    base_model, method = metadata.base_model or config.base_model_name_or_path, title_of(config)
    is_for_text = config.task_type is not None  # PEFT sets it on language models
    intro = (
        f"An {method} adapter ([Bini et al. 2024](https://arxiv.org/abs/2405.20271)) of "
        f"{len(adapter.projections())} projections for {_shown_base(base_model)}: sides `{config.sides}`, "
        f"{config.num_blocks} blocks."
    )
    named = base_model or "path or Hub id of the base"
    example = (
        _example(named, is_for_text=is_for_text)
        if control is None
        else _control_example(named, control, metadata)
    )
    lines = [f"# {method} adapter", "", intro, "", *_follows(control), *_trigger(metadata)]
    lines += ["## Use", "", _fenced(example, "python"), "", *_lora(has_lora_export, control)]
    lines += _evaluation(evaluation)
    if metadata.base_fingerprint is not None:
        lines += [f"Fingerprint of the base: `{metadata.base_fingerprint.id}`.", ""]
    tags = ["ether"] if is_for_text else ["ether", "text-to-image", "diffusers"]
    return _finished(metadata, base_model, lines, pictures, tags)


def plain_card(
    method: str,
    metadata: AdapterMetadata,
    *,
    has_lora_export: bool,
    pictures: Pictures = (),
    evaluation: Sequence[str] = (),
    control: str | None = None,
) -> str:
    """Return the README.md of an adapter of another of PEFT's methods for a UNet; see `model_card`."""
    intro = f"A {method} adapter in PEFT's layout for {_shown_base(metadata.base_model)}."
    name = json.dumps(metadata.base_model or "path or Hub id of the base")
    example = (
        "from diffusers import DiffusionPipeline\n"
        "from peft import PeftModel\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({name})\n"
        'pipe.unet = PeftModel.from_pretrained(pipe.unet, "path or Hub id of this adapter")'
    )
    if control is not None:
        example = _control_example(metadata.base_model or "path or Hub id of the base", control, metadata)
    lines = [f"# {method} adapter", "", intro, "", *_follows(control), *_trigger(metadata)]
    lines += ["## Use", "", _fenced(example, "python"), "", *_lora(has_lora_export, control)]
    lines += _evaluation(evaluation)
    tags = [method.lower(), "text-to-image", "diffusers"]
    return _finished(metadata, metadata.base_model, lines, pictures, tags)


def encoder_card(
    metadata: AdapterMetadata,
    *,
    pictures: Pictures = (),
    evaluation: Sequence[str] = (),
    control: str = CONTROL_PIPELINE,
) -> str:
    """Return the README.md of a control encoder by itself; see `model_card`."""
    intro = f"A control encoder for {_shown_base(metadata.base_model)}, which it leaves as it is."
    example = _control_example(metadata.base_model or "path or Hub id of the base", control, metadata)
    lines = ["# Control encoder", "", intro, "", *_follows(control), *_trigger(metadata)]
    lines += ["## Use", "", _fenced(example, "python"), "", *_evaluation(evaluation)]
    tags = ["control-encoder", "text-to-image", "diffusers"]
    return _finished(metadata, metadata.base_model, lines, pictures, tags)


def _follows(control: str | None) -> list[str]:
    told = "Pictures follow a control image: it says where things are, the prompt what they are."
    return [] if control is None else [told, ""]


def _control_example(base_model: str, pipeline: str, metadata: AdapterMetadata) -> str:
    prompt = json.dumps(metadata.trigger or "what the picture shows", ensure_ascii=False)
    return (
        "from PIL import Image\n"
        f"from ether_diffusion.pipelines import {pipeline}\n\n"
        f"pipe = {pipeline}.from_pretrained({json.dumps(base_model)})\n"
        'pipe.load_control_weights("path or Hub id of this adapter")\n'
        'where = Image.open("control image, of the proportions of the picture")\n'
        f"picture = pipe({prompt}, control_image=where).images[0]"
    )


def _finished(
    metadata: AdapterMetadata, base_model: str | None, lines: list[str], pictures: Pictures, tags: list[str]
) -> str:
    """Add what was drawn, the facts of the training, the Hub's YAML, and the mark."""
    if pictures:
        shown = [f"![{printable(prompt)}]({path})" for prompt, path in pictures]
        lines = [*lines, "## Pictures", "", " ".join(shown), ""]
    if metadata.training:
        facts = "\n".join(f"{name}: {value}" for name, value in metadata.training.items())
        lines = [*lines, "## Training", "", _fenced(facts), ""]
    # the Hub refuses a card whose base_model is no Hub id, e.g. a local path
    is_hub_id = base_model is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) is not None
    data = ModelCardData(
        base_model=base_model if is_hub_id else None,
        instance_prompt=metadata.trigger,
        library_name="peft",
        pipeline_tag="text-to-image" if "text-to-image" in tags else None,
        tags=tags,
        widget=[{"text": prompt, "output": {"url": path}} for prompt, path in pictures] or None,
    )
    text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)))  # parses the YAML
    return text + _MARK.format(digest=_digest(text))


def is_ours(path: Path) -> bool:
    """Say whether a README.md was written here and not edited since, so that it may be replaced."""
    try:
        found = _MARKED.fullmatch(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return False
    return found is not None and _digest(found["text"]) == found["digest"]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _shown_base(base_model: str | None) -> str:
    return "its base model" if base_model is None else f"`{printable(base_model).replace('`', '')}`"


def _trigger(metadata: AdapterMetadata) -> list[str]:
    return ["## Trigger", "", _fenced(metadata.trigger), ""] if metadata.trigger else []


def _evaluation(lines: Sequence[str]) -> list[str]:
    return ["## Evaluation", "", *lines, ""] if lines else []


def _lora(has_lora_export: bool, control: str | None) -> list[str]:
    lora = 'pipe.load_lora_weights("path or Hub id of this adapter")'
    heading = "As LoRA, without ether-diffusion:"
    if control is not None:
        heading = "As LoRA, without ether-diffusion and without the control image:"
    return [heading, "", _fenced(lora, "python"), ""] if has_lora_export else []


def _example(base_model: str, *, is_for_text: bool) -> str:
    library, loader, name = "diffusers", "DiffusionPipeline", "pipe"
    if is_for_text:
        library, loader, name = "transformers", "AutoModelForCausalLM", "model"
    base, alias_import = json.dumps(base_model), ""
    if base_model == ALIAS:  # which diffusers does not know
        base, alias_import = "tiny_world_path()", "from ether_diffusion.tiny_world import tiny_world_path\n"
    return (
        f"from {library} import {loader}\n"
        f"from ether_diffusion import load_ether\n{alias_import}\n"
        f"{name} = {loader}.from_pretrained({base})\n"
        f'load_ether({name}, "path or Hub id of this adapter")'
    )


def _fenced(text: str, language: str = "") -> str:
    # a fence longer than any run of backticks inside cannot be closed from inside
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"

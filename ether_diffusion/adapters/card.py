"""The model card beside an adapter: what the Hub shows, and how to load what is there."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

from huggingface_hub import ModelCard, ModelCardData

from ether_diffusion.adapters.format import AdapterMetadata, AdapterPart
from ether_diffusion.adapters.methods import name_of, title_of
from ether_diffusion.tiny_world import ALIAS, EMBEDDED, FLOW_ALIAS
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.wording import printable

_MARK = "\n<!-- written by ether-diffusion, sha256 of the above: {}; {} -->\n"
_MARKED = re.compile(f"(?s)(.*){_MARK.format('([0-9a-f]{64})', '.*')}")
_BASE, _ADAPTER = "path or Hub id of the base", '"path or Hub id of this adapter"'
_FOLLOWS = "Pictures follow a control image: it says where things are, the prompt what they are."
_CONTROLLED = """\
from PIL import Image
from ether_diffusion.pipelines import {control}

pipe = {control}.from_pretrained({base})
pipe.load_control_weights({adapter})
where = Image.open("control image, of the proportions of the picture")
picture = pipe({prompt}, control_image=where).images[0]"""
CONTROL_PIPELINE = "EtherControlPipeline"


class Shown(TypedDict, total=False):
    """What a card may show beside the adapter.

    pictures are prompts, and the paths of what was drawn from them, relative to the card; evaluation are
    lines of Markdown on what was measured; control is the pipeline of ours that takes the adapter with the
    control encoder beside it, where there is one; doubt is a sentence on the base.
    """

    pictures: Sequence[tuple[str, str]]
    evaluation: Sequence[str]
    control: str | None
    has_lora_export: bool
    doubt: str | None


def model_card(adapter: AdapterPart, **shown: Unpack[Shown]) -> str:
    """Return the README.md of an adapter: YAML for the Hub, the trigger, how to load, pictures."""
    metadata, config = adapter.metadata, adapter.config
    if not isinstance(config, EtherConfig):
        return plain_card(name_of(config), metadata, **shown)
    title, base_model = title_of(config), metadata.base_model or config.base_model_name_or_path
    metadata = replace(metadata, base_model=base_model)
    intro = (
        f"An {title} adapter ([Bini et al. 2024](https://arxiv.org/abs/2405.20271)) of "
        f"{len(adapter.projections())} projections for {_shown_base(base_model)}: sides `{config.sides}`, "
        f"{config.num_blocks} blocks."
    )
    library, loader, name = "diffusers", "DiffusionPipeline", "pipe"
    if config.task_type is not None:  # PEFT sets it on language models
        library, loader, name = "transformers", "AutoModelForCausalLM", "model"
    base, further = json.dumps(base_model or _BASE), ""
    if base_model in EMBEDDED:  # which diffusers does not know
        named = "" if base_model == ALIAS else f'"{base_model}"'
        without_t5 = ", text_encoder_3=None, tokenizer_3=None" if base_model == FLOW_ALIAS else ""
        base = f"tiny_world_path({named}){without_t5}"
        further = "from ether_diffusion.tiny_world import tiny_world_path\n"
    example = (
        f"from {library} import {loader}\nfrom ether_diffusion import load_ether\n{further}\n"
        f"{name} = {loader}.from_pretrained({base})\nload_ether({name}, {_ADAPTER})"
    )
    return _card(f"{title} adapter", "ether", intro, example, metadata, config=config, **shown)


def plain_card(method: str, metadata: AdapterMetadata, **shown: Unpack[Shown]) -> str:
    """Return the README.md of an adapter of another of PEFT's methods for a UNet; see `model_card`."""
    base = metadata.base_model
    intro = f"A {method} adapter in PEFT's layout for {_shown_base(base)}."
    example = (
        "from diffusers import DiffusionPipeline\nfrom peft import PeftModel\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(base or _BASE)})\n"
        f"pipe.unet = PeftModel.from_pretrained(pipe.unet, {_ADAPTER})"
    )
    return _card(f"{method} adapter", method.lower(), intro, example, metadata, **shown)


def encoder_card(metadata: AdapterMetadata, **shown: Unpack[Shown]) -> str:
    """Return the README.md of a control encoder by itself; see `model_card`."""
    intro = f"A control encoder for {_shown_base(metadata.base_model)}, which it leaves as it is."
    shown = {"control": CONTROL_PIPELINE, **shown}
    return _card("Control encoder", "control-encoder", intro, "", metadata, **shown)


def _card(
    title: str,
    tag: str,
    intro: str,
    example: str,
    metadata: AdapterMetadata,
    *,
    config: EtherConfig | None = None,
    has_lora_export: bool = False,
    pictures: Sequence[tuple[str, str]] = (),
    evaluation: Sequence[str] = (),
    control: str | None = None,
    doubt: str | None = None,
) -> str:
    trigger, base, base_model = metadata.trigger, metadata.base_fingerprint, metadata.base_model
    if control is not None:
        prompt = json.dumps(trigger or "what the picture shows", ensure_ascii=False)
        of_base = json.dumps(base_model or _BASE)
        example = _CONTROLLED.format(control=control, base=of_base, adapter=_ADAPTER, prompt=prompt)
    without = "" if control is None else " and without the control image"
    lora = _fenced(f"pipe.load_lora_weights({_ADAPTER})", "python") if has_lora_export else ""
    drawn = " ".join(f"![{printable(prompt)}]({path})" for prompt, path in pictures)
    facts = "\n".join(f"{name}: {value}" for name, value in metadata.training.items())
    paragraphs = (
        f"# {title}",
        intro,
        doubt and f"{doubt}.",
        control and _FOLLOWS,
        trigger and f"## Trigger\n\n{_fenced(trigger)}",
        f"## Use\n\n{_fenced(example, 'python')}",
        lora and f"As LoRA, without ether-diffusion{without}:\n\n{lora}",
        "\n".join(["## Evaluation", "", *evaluation]) if evaluation else None,
        f"Fingerprint of the base: `{base.id}`." if config is not None and base is not None else None,
        drawn and f"## Pictures\n\n{drawn}",
        facts and f"## Training\n\n{_fenced(facts)}",
    )
    is_for_text = config is not None and config.task_type is not None
    data = ModelCardData(
        # the Hub refuses a card whose base_model is no Hub id, e.g. a local path
        base_model=base_model if re.fullmatch(r"[\w.-]+/[\w.-]+", base_model or "") else None,
        instance_prompt=trigger,
        library_name="peft",
        pipeline_tag=None if is_for_text else "text-to-image",
        tags=[tag] if is_for_text else [tag, "text-to-image", "diffusers"],
        widget=[{"text": prompt, "output": {"url": path}} for prompt, path in pictures] or None,
    )
    body = "\n\n".join(filter(None, paragraphs))
    text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))  # parses the YAML
    return text + _MARK.format(_digest(text), "once edited, it is left alone")


def is_ours(path: Path) -> bool:
    """Say whether a README.md was written here and not edited since, so that it may be replaced."""
    try:
        found = _MARKED.fullmatch(path.read_text(encoding="utf-8")) if path.is_file() else None
    except UnicodeDecodeError:
        return False
    return found is not None and _digest(found[1]) == found[2]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _shown_base(base_model: str | None) -> str:
    return "its base model" if base_model is None else f"`{printable(base_model).replace('`', '')}`"


def _fenced(text: str, language: str = "") -> str:
    # a fence longer than any run of backticks inside cannot be closed from inside
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"

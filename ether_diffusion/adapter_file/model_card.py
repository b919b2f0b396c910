"""The model card beside an adapter: what the Hub shows, and how to load what is there."""

import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ether_diffusion.adapter_file.adapter import Adapter
from ether_diffusion.adapter_file.wording import printable

_MARK = (
    "\n<!-- written by ether-diffusion, sha256 of the above: {digest}; once edited, it is left alone -->\n"
)
_MARKED = re.compile(
    r"(?P<text>.*)\n<!-- written by ether-diffusion, sha256 of the above: (?P<digest>[0-9a-f]{64}); .*-->\n",
    re.DOTALL,
)


def model_card(adapter: Adapter, *, has_lora_export: bool) -> str:
    """Return README.md: YAML for the Hub, the trigger, how to load."""
    metadata = adapter.metadata
    base_model = metadata.base_model or adapter.config.base_model_name_or_path
    # the Hub refuses a card whose base_model is no Hub id, e.g. a local path
    is_hub_id = base_model is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) is not None
    is_for_text = adapter.config.task_type is not None  # PEFT sets it on language models
    data = ModelCardData(
        base_model=base_model if is_hub_id else None,
        instance_prompt=metadata.trigger,
        library_name="peft",
        pipeline_tag=None if is_for_text else "text-to-image",
        tags=["ether"] if is_for_text else ["ether", "text-to-image", "diffusers"],
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(adapter, base_model, has_lora_export)}"
    text = str(ModelCard(text))  # parses the YAML that was made
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


def _body(adapter: Adapter, base_model: str | None, has_lora_export: bool) -> str:
    metadata, config = adapter.metadata, adapter.config
    method = {"ether": "ETHER", "ether_plus": "ETHER+"}[config.variant]
    count = len(adapter.projections())
    base = "its base model" if base_model is None else f"`{printable(base_model).replace('`', '')}`"
    lines = [
        f"# {method} adapter",
        "",
        f"An {method} adapter ([Bini et al. 2024](https://arxiv.org/abs/2405.20271)) of {count} projections "
        f"for {base}: sides `{config.sides}`, {config.num_blocks} blocks.",
        "",
    ]
    if metadata.trigger:
        lines += ["## Trigger", "", _fenced(metadata.trigger), ""]
    example = _example(base_model or "path or Hub id of the base", is_for_text=config.task_type is not None)
    lines += ["## Use", "", _fenced(example, "python"), ""]
    if has_lora_export:
        lora = 'pipe.load_lora_weights("path or Hub id of this adapter")'
        lines += ["Without ether-diffusion, its exact export to LoRA:", "", _fenced(lora, "python"), ""]
    if metadata.base_fingerprint is not None:
        lines += [f"Fingerprint of the base: `{metadata.base_fingerprint.id}`.", ""]
    if metadata.training:
        facts = "\n".join(f"{name}: {value}" for name, value in metadata.training.items())
        lines += ["## Training", "", _fenced(facts), ""]
    return "\n".join(lines)


def _example(base_model: str, *, is_for_text: bool) -> str:
    library, loader, name = "diffusers", "DiffusionPipeline", "pipe"
    if is_for_text:
        library, loader, name = "transformers", "AutoModelForCausalLM", "model"
    return (
        f"from {library} import {loader}\n"
        "from ether_diffusion import load_ether\n\n"
        f"{name} = {loader}.from_pretrained({json.dumps(base_model)})\n"
        f'load_ether({name}, "path or Hub id of this adapter")'
    )


def _fenced(text: str, language: str = "") -> str:
    # a fence longer than any run of backticks inside cannot be closed from inside
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"

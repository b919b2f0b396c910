"""What stands under the flags: presets, and the option names of diffusers' scripts."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from ether_diffusion.options import Kind, OptionsError, shown
from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import ControlRunConfig

PresetName = Literal["fast", "balanced", "faithful"]

PRESETS: dict[PresetName, str] = {
    "fast": "A first look in a minute or two: few steps, few images.",
    "balanced": "What most subjects want: the defaults, written down.",
    "faithful": "The setting of the ETHER paper (arXiv:2405.20271, 5.1.1 and C.1): 1400 steps with 200 "
    "class images, each method at the paper's learning rate. Needs class_data_dir and class_prompt.",
}
"""What each preset is for."""


def _drawing(num_steps: int, checkpoint: int, images: int, denoising: int) -> dict[str, Json]:
    sizes = {"max_train_steps": num_steps, "train_batch_size": 1, "checkpointing_steps": checkpoint}
    drawn = {"num_validation_images": images, "validation_num_inference_steps": denoising}
    return {**sizes, "validation_steps": 100, **drawn}


PRESET_VALUES: MappingProxyType[PresetName, dict[str, Json]] = MappingProxyType(
    {
        "fast": _drawing(200, 50, 2, 12),
        "balanced": _drawing(800, 100, 4, 20),
        "faithful": {
            "num_blocks": 4,
            "max_train_steps": 1400,
            "train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "lr_scheduler": "constant",
            "adam_weight_decay": 0.0,
            "dropout": 0.0,
            "target_modules": "attention",
            "prior_preservation": "class_images",
            "num_class_images": 200,
            "prior_loss_weight": 1.0,
            "checkpointing_steps": 200,
            "validation_steps": 200,
        },
    }
)
"""What each preset sets, in the flat form of a configuration."""


class OldName(NamedTuple):
    """A name of diffusers' scripts: the option it sets, to `value` if it is a switch, else to its own.

    Where it sets none, `remedy` says why nothing is lost.
    """

    kind: Kind
    sets: str | None = None
    value: Json = None
    remedy: str = ""


_SWITCH, _WHOLE, _NUMBER, _TEXT = Kind(bool), Kind(int), Kind(float), Kind(str)
_FOR_IF = "it exists for DeepFloyd IF, which is not trained here"
_FINAL = "final images are drawn for validation_prompt only, and the base is not loaded again"
OLD_NAMES: dict[str, OldName] = {
    "with_prior_preservation": OldName(_SWITCH, "prior_preservation", "class_images"),
    # the strength that diffusers' full DreamBooth script has built in
    "offset_noise": OldName(_SWITCH, "noise_offset", 0.1),
    "use_8bit_adam": OldName(_SWITCH, "optimizer", "adamw8bit"),
    "lora_dropout": OldName(_NUMBER, "dropout"),
    "proportion_empty_prompts": OldName(_NUMBER, "caption_dropout"),
    # of their scripts that take a data set: a folder of images with metadata.jsonl
    "train_data_dir": OldName(_TEXT, "dataset_name"),
    "lora_layers": OldName(_TEXT, "target_modules"),
    "local_rank": OldName(_WHOLE, remedy="the launcher says it by the environment"),
    "set_grads_to_none": OldName(_SWITCH, remedy="gradients are always set to none"),
    "upcast_before_saving": OldName(_SWITCH, remedy="the adapter is float32 throughout"),
    "output_kohya_format": OldName(_SWITCH, remedy="the exported file always has kohya's keys"),
    "skip_final_inference": OldName(_SWITCH, remedy=_FINAL),
    "tokenizer_max_length": OldName(_WHOLE, remedy=_FOR_IF),
    "text_encoder_use_attention_mask": OldName(_SWITCH, remedy=_FOR_IF),
    "validation_images": OldName(Kind(str, is_many=True), remedy=_FOR_IF),
    "class_labels_conditioning": OldName(_TEXT, remedy=_FOR_IF),
}


def translate_old_names(values: Mapping[str, Json]) -> tuple[dict[str, Json], list[str]]:
    """Return a flat configuration without old names, and a line about each that was there.

    A switch that is neither on nor off, or an old name that contradicts its option, is an OptionsError.
    """
    translated = {name: value for name, value in values.items() if name not in OLD_NAMES}
    lines, problems = [], []
    for name, old in OLD_NAMES.items():
        value = values.get(name)
        if name not in values or (value is False and old.sets is not None):
            continue
        if old.kind.base is bool and not isinstance(value, bool):
            problems.append(f"{name}={shown(value)} does not fit; use {old.kind.words}")
        elif old.sets is None:
            lines.append(f"{name} is accepted and has no effect: {old.remedy}")
        else:
            meant = value if old.value is None else old.value
            if (other := translated.setdefault(old.sets, meant)) != meant:
                meaning = f"{name} means {old.sets}={shown(meant)}"
                problems.append(f"{meaning}, and {shown(other)} is given too; give one")
            lines.append(f"{name} is deprecated; use {old.sets}: {shown(meant)}")
    if problems:
        raise OptionsError(problems)
    return translated, lines


def stack(*layers: Mapping[str, Json]) -> dict[str, Json]:
    """Return one flat configuration of several, each of which outranks those before it.

    What a layer gives puts out of force what stands in its way in the layers before.
    """
    values: dict[str, Json] = {}
    for layer in layers:
        for name, each in ControlRunConfig.options().items():
            for other in (each.instead_of, *each.implies) if layer.get(name) not in (None, False) else ():
                values.pop(other or "", None)
        values |= layer
    return values

"""Option names of diffusers' scripts that are no options here: what each becomes, or why it is not needed."""

from collections.abc import Mapping
from dataclasses import dataclass

from ether_diffusion.options import Kind, OptionsError, shown
from ether_diffusion.strict_json import Json

_SWITCH, _WHOLE, _NUMBER, _TEXT = Kind(bool), Kind(int), Kind(float), Kind(str)
_FOR_IF = "it exists for DeepFloyd IF, which is not trained here"


@dataclass(frozen=True)
class LegacyOption:
    """An old name: the option it sets, and to what, which is its own value where `value` is None.

    Where it sets none, `remedy` says why nothing is lost.
    """

    kind: Kind
    sets: str | None = None
    value: Json = None
    remedy: str = ""


LEGACY_OPTIONS: dict[str, LegacyOption] = {
    "with_prior_preservation": LegacyOption(_SWITCH, "prior_preservation", "class_images"),
    # the strength that diffusers' full DreamBooth script has built in
    "offset_noise": LegacyOption(_SWITCH, "noise_offset", 0.1),
    "use_8bit_adam": LegacyOption(_SWITCH, "optimizer", "adamw8bit"),
    "lora_dropout": LegacyOption(_NUMBER, "dropout"),
    "proportion_empty_prompts": LegacyOption(_NUMBER, "caption_dropout"),
    # of their scripts that take a data set: a folder of images with metadata.jsonl
    "train_data_dir": LegacyOption(_TEXT, "dataset_name"),
    "lora_layers": LegacyOption(_TEXT, "target_modules"),
    "local_rank": LegacyOption(_WHOLE, remedy="the launcher says it by the environment"),
    "set_grads_to_none": LegacyOption(_SWITCH, remedy="gradients are always set to none"),
    "upcast_before_saving": LegacyOption(_SWITCH, remedy="the adapter is float32 throughout"),
    "output_kohya_format": LegacyOption(_SWITCH, remedy="the exported file always has kohya's keys"),
    "skip_final_inference": LegacyOption(
        _SWITCH, remedy="final images are drawn for validation_prompt only, and the base is not loaded again"
    ),
    "tokenizer_max_length": LegacyOption(_WHOLE, remedy=_FOR_IF),
    "text_encoder_use_attention_mask": LegacyOption(_SWITCH, remedy=_FOR_IF),
    "validation_images": LegacyOption(Kind(str, is_many=True), remedy=_FOR_IF),
    "class_labels_conditioning": LegacyOption(_TEXT, remedy=_FOR_IF),
}

NOT_OFFERED: dict[str, str] = {
    "cache_dir": "set the environment variable HF_HUB_CACHE",
    "controlnet_model_name_or_path": "no ControlNet is trained or gone on from, but an adapter and a small "
    "encoder; a run in output_dir goes on by itself",
    "crops_coords_top_left_h": "leave it out: SDXL is told how each photo was cropped",
    "crops_coords_top_left_w": "leave it out: SDXL is told how each photo was cropped",
    "token_abstraction": "use token and {token}; no new tokens are trained",
    "final_validation_prompt": "use validation_prompt",
    "lora_unet_blocks": "use target_modules with a regex",
    "use_dora": "use adapter delora, or lora",
}
"""Names that users of sibling scripts may try, and what to do instead."""


def translate_legacy(values: Mapping[str, Json]) -> tuple[dict[str, Json], list[str]]:
    """Return a flat configuration without old names, and a line about each that was there.

    Raises:
        OptionsError: an old name's value does not fit, or contradicts the option it stands for.
    """
    translated = {name: value for name, value in values.items() if name not in LEGACY_OPTIONS}
    lines, problems = [], []
    for name, option in LEGACY_OPTIONS.items():
        if name not in values:
            continue
        value = option.kind.convert(values[name])
        if not option.kind.fits(value):
            problems.append(f"{name}={shown(value)} does not fit; use {option.kind.words}")
        elif option.sets is None:
            lines.append(f"{name} is accepted and has no effect: {option.remedy}")
        elif value is not False:
            meant = values[name] if option.value is None else option.value
            if translated.setdefault(option.sets, meant) != meant:
                other = shown(translated[option.sets])
                problems.append(
                    f"{name} means {option.sets}={shown(meant)}, and {other} is given too; give one"
                )
            lines.append(f"{name} is deprecated; use {option.sets}: {shown(meant)}")
    if problems:
        raise OptionsError(problems)
    return translated, lines

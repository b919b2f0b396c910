"""Keys of LoRA files: kohya's with diffusers' block names, which every reader takes, or diffusers' own."""

import re
from collections.abc import Iterable

from ether_diffusion.adapters.format import Component

_ATTENTION = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+"
_UNET_MODULE = re.compile(
    rf"{_ATTENTION}\.(proj_in|proj_out|"
    r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))"
)
_TEXT_MODULE = re.compile(
    r"(text_model\.)?((encoder\.layers\.\d+)\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]))"
)

Place = tuple[Component, str]
"""A module by its component and its name there."""


def kohya_keys(places: Iterable[Place], *, has_two_text_encoders: bool) -> dict[Place, str] | None:
    """Return each module's key, "lora_unet_mid_block_attentions_0_…_to_q"; None if there is none for one.

    Block names are those of diffusers: SGM's would be lost on SD 1.x. Text encoders are named with
    `text_model`, which transformers 5 has dropped and every reader of LoRA files expects.
    """
    # SDXL numbers its text encoders
    first = "lora_te1" if has_two_text_encoders else "lora_te"
    prefixes = {"unet": "lora_unet", "text_encoder": first, "text_encoder_2": "lora_te2"}
    keys = {}
    for component, name in places:
        path = _kohya_path(component, name)
        if path is None or component not in prefixes:
            return None
        keys[component, name] = f"{prefixes[component]}_{path.replace('.', '_')}"
    return keys


def diffusers_keys(places: Iterable[Place], *, denoiser: str) -> dict[Place, str]:
    """Return each module's key as diffusers and PEFT write it, "transformer.blocks.0.attn1.to_q"."""
    return {
        (component, name): f"{denoiser}.{name}"
        if component == "unet"
        else f"{component}.{_text_path(name) or name}"
        for component, name in places
    }


def sign_of_text_encoder(modules: Iterable[str]) -> str | None:
    """Return the module that a CLIP text encoder's LoRA must hold to be read, if it is not among these.

    diffusers tells the format of such a file by its output projections, and takes none without.
    """
    found = [match for name in modules if (match := _TEXT_MODULE.fullmatch(name))]
    if not found or any(match[5] == "out" for match in found):
        return None
    return f"{found[0][1] or ''}{found[0][3]}.self_attn.out_proj"


def _kohya_path(component: Component, module: str) -> str | None:
    if component == "unet":
        return module if _UNET_MODULE.fullmatch(module) else None
    return _text_path(module)


def _text_path(module: str) -> str | None:
    found = _TEXT_MODULE.fullmatch(module)
    return None if found is None else f"text_model.{found[2]}"

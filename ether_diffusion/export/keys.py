"""Keys of LoRA files: kohya's with diffusers' block names, as diffusers, A1111, ComfyUI and InvokeAI read."""

import re
from collections.abc import Iterable

from ether_diffusion.adapter_file.wording import listed
from ether_diffusion.export.components import Component

_ATTENTION = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+"
_UNET_MODULE = re.compile(
    rf"{_ATTENTION}\.(proj_in|proj_out|"
    r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))"
)
_TEXT_MODULE = re.compile(r"(text_model\.)?(encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]))")


def lora_keys(modules: Iterable[str], component: Component, *, has_two_text_encoders: bool) -> dict[str, str]:
    """Return each module's key, "lora_unet_mid_block_attentions_0_…_to_q", by the module's name.

    Block names are those of diffusers: SGM's would be lost on SD 1.x. Text encoders are named with
    `text_model`, which transformers 5 has dropped and every reader of LoRA files expects.

    Raises:
        ValueError: the format has no key for a module.
    """
    prefix = _prefix(component, has_two_text_encoders=has_two_text_encoders)
    paths = {name: _path(name, component) for name in modules}
    unnamed = [name for name, path in paths.items() if path is None]
    if unnamed:
        raise ValueError(
            f"LoRA files have no key for {listed(unnamed)} of the {component}; "
            "share this adapter in its own format, or merged"
        )
    return {name: f"{prefix}_{path.replace('.', '_')}" for name, path in paths.items() if path is not None}


def _prefix(component: Component, *, has_two_text_encoders: bool) -> str:
    if component == "unet":
        return "lora_unet"
    if component == "text_encoder_2":
        return "lora_te2"
    return "lora_te1" if has_two_text_encoders else "lora_te"  # SDXL numbers them


def _path(module: str, component: Component) -> str | None:
    if component == "unet":
        return module if _UNET_MODULE.fullmatch(module) else None
    found = _TEXT_MODULE.fullmatch(module)
    return None if found is None else f"text_model.{found.group(2)}"

"""Write an adapter as one LoRA file, whose keys and header every reader of such files takes."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ether_diffusion.adapters.format import (
    EXPORT_NAME,
    Adapter,
    AdapterPart,
    Component,
    fingerprint,
    metadata_header,
)
from ether_diffusion.adapters.models import base_layer, name_of_base, plain_modules
from ether_diffusion.adapters.tensor_file import safetensors_bytes
from ether_diffusion.durable_files import write_files
from ether_diffusion.export.factors import (
    Base,
    LoraFactors,
    adapted_weights,
    changed_parts,
    denoiser_name,
    lora_factors,
    lora_tensors,
    read_ether,
    stored_factors,
)
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.wording import listed

EXPORT_DTYPES = {"float16": torch.float16, "float32": torch.float32}
NOTE = "ether.note"
"""The entry by which a file is known as an export."""
_BY_THEMSELVES = {"transformer_2", "transformer_ref"}
"""Those whose LoRA diffusers takes from a file that names its only component "transformer"."""

_UNET_MODULE = re.compile(
    r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+\.(proj_in|proj_out|"
    r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))"
)
_TEXT_MODULE = re.compile(
    r"(text_model\.)?((encoder\.layers\.\d+)\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]))"
)

Place = tuple[Component, str]
"""A module by its component and its name there."""


def export_lora(
    adapter: Adapter | str | Path,
    base: Base,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    export_name: str = EXPORT_NAME,
    rebake: bool = False,
) -> Path:
    """Write an adapter as a LoRA file into `folder` and return its path; strength 1 is as trained.

    `adapter` is a folder, a hub id, or values read before; `base` is a pipeline, or a denoiser by itself. The
    file holds the base's weights and is exact on that base only; with `rebake` it is made on another base of
    the same architecture, by the same reflections of other weights. Keys are kohya's where these name every
    module, as of Stable Diffusion, and else diffusers' own, as of every transformer: `pipe.load_lora_weights`
    or `model.load_lora_adapter` reads both.

    Raises:
        ValueError: the adapter does not fit the base, was trained on other weights and `rebake` is not set,
            changes components that LoRA files cannot name, or a file that is no export stands in the way.
    """
    if dtype not in EXPORT_DTYPES.values():
        raise ValueError(f"dtype={dtype} is not exported; use torch.float16 or torch.float32")
    path = lora_path(folder, export_name)
    adapter = read_ether(adapter)
    loadable = {"unet", *getattr(base, "_lora_loadable_modules", ())} - _BY_THEMSELVES
    unread = [component for component in adapter.parts if component not in loadable]
    if unread:
        raise ValueError(
            f"diffusers reads no LoRA of {listed(unread)} from a file of {type(base).__name__}; share this "
            f"adapter in its own format, or merged, or export one by itself: read_adapter(…, "
            f"subfolder={unread[0]!r}) onto that model"
        )
    models = {component: part.model for component, part in changed_parts(base, adapter).items()}
    weights = {c: adapted_weights(part, models[c], rebake=rebake) for c, part in adapter.parts.items()}
    factors: dict[Place, LoraFactors] = {}
    for component, part in adapter.parts.items():
        for name, sides in part.projections().items():
            exact = lora_factors(weights[component][name], *sides)
            factors[component, name] = stored_factors(exact, dtype)
        sign = None if component == "unet" else _sign_of_text_encoder(part.modules())
        if sign is not None:
            shape = base_layer(plain_modules(models[component])[sign]).get_parameter("weight").shape
            nothing = torch.zeros(1, shape[1], dtype=dtype), torch.zeros(shape[0], 1, dtype=dtype)
            factors[component, sign] = LoraFactors(*nothing)
    denoiser, two = denoiser_name(base), getattr(base, "text_encoder_2", None) is not None
    kohya = kohya_keys(factors, has_two_text_encoders=two)
    keys = kohya or _diffusers_keys(factors, denoiser=denoiser)
    tensors, rank = lora_tensors({keys[p]: pair for p, pair in factors.items()}, kohya=kohya is not None)
    component, part = next(iter(adapter.parts.items()))
    found, trained_on = fingerprint(weights[component]), part.metadata.base_fingerprint
    if found is not None and (trained_on is None or trained_on.compare(found) != "same"):
        made_on = replace(part.metadata, base_model=name_of_base(base), base_fingerprint=found)
        part = replace(part, metadata=made_on)
    header = lora_header(part, rank=rank, title=path.stem, denoiser=getattr(base, denoiser, base))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files(path.parent, {path.name: safetensors_bytes(tensors, header)})
    return path


def lora_path(folder: str | Path, export_name: str = EXPORT_NAME) -> Path:
    """Return the path of the LoRA file to be written; an earlier export may be there, and nothing else."""
    name = export_name if export_name.endswith(".safetensors") else f"{export_name}.safetensors"
    if not name.removesuffix(".safetensors") or Path(name).name != name or "\\" in name:
        raise ValueError(f"export_name={export_name!r} is not a file name; use letters, digits, - and _")
    path = Path(folder) / name
    try:
        with safe_open(path, framework="pt") as file:
            is_export = NOTE in (file.metadata() or {})
    except (SafetensorError, OSError):
        is_export = False
    if path.exists() and not is_export:
        raise ValueError(f"{path} is there already and is no export; move it, or choose another export_name")
    return path


def lora_header(adapter: AdapterPart, *, rank: int, title: str, denoiser: nn.Module) -> dict[str, str]:
    """Return the entries for an adapter whose metadata names the base that the file is made on."""
    config, trigger = adapter.config, adapter.metadata.trigger
    assert isinstance(config, EtherConfig)
    entries = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "ether.variant": config.variant,
        "ether.num_blocks": str(config.num_blocks),
        "ether.sides": str(config.sides),
        NOTE: "exact on this base only: the factors hold its weights; export again for another base",
    }
    if trigger:
        entries["modelspec.trigger_phrase"] = trigger
    return metadata_header(adapter.metadata) | entries | _family(denoiser)


def _family(denoiser: nn.Module) -> dict[str, str]:
    """Return the entries that name a Stable Diffusion family; none for a denoiser of no known one."""
    config = getattr(denoiser, "config", None)
    widths = tuple(getattr(config, "block_out_channels", ()))
    context = getattr(config, "cross_attention_dim", None)
    if widths == (320, 640, 1280) and context == 2048:
        version, architecture = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    elif widths != (320, 640, 1280, 1280) or context not in (768, 1024):
        return {}
    elif context == 768:
        version, architecture = "sd_v1", "stable-diffusion-v1"
    elif getattr(config, "sample_size", None) == 96:
        version, architecture = "sd_v2_v", "stable-diffusion-v2-768-v"
    else:
        version, architecture = "sd_v2", "stable-diffusion-v2-512"
    # A1111 asks ss_v2, not the version, whether a file is of Stable Diffusion 2
    second = {"ss_v2": "True"} if version.startswith("sd_v2") else {}
    return {"ss_base_model_version": version, "modelspec.architecture": f"{architecture}/lora"} | second


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
        of_unet = name if _UNET_MODULE.fullmatch(name) else None
        path = of_unet if component == "unet" else _text_path(name)
        if path is None or component not in prefixes:
            return None
        keys[component, name] = f"{prefixes[component]}_{path.replace('.', '_')}"
    return keys


def _diffusers_keys(places: Iterable[Place], *, denoiser: str) -> dict[Place, str]:
    """Return each module's key as diffusers and PEFT write it, "transformer.blocks.0.attn1.to_q"."""
    return {
        (component, name): f"{denoiser}.{name}"
        if component == "unet"
        else f"{component}.{_text_path(name) or name}"
        for component, name in places
    }


def _sign_of_text_encoder(modules: Iterable[str]) -> str | None:
    """Return the module that a CLIP text encoder's LoRA must hold to be read, if it is not among these.

    diffusers tells the format of such a file by its output projections, and takes none without.
    """
    found = [match for name in modules if (match := _TEXT_MODULE.fullmatch(name))]
    if not found or any(match[5] == "out" for match in found):
        return None
    return f"{found[0][1] or ''}{found[0][3]}.self_attn.out_proj"


def _text_path(module: str) -> str | None:
    found = _TEXT_MODULE.fullmatch(module)
    return None if found is None else f"text_model.{found[2]}"

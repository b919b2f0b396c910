"""Write an adapter as one LoRA file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ether_diffusion.adapters.export.components import (
    adapted_weights,
    check_readable,
    component_of,
    denoiser_name,
    read_ether,
)
from ether_diffusion.adapters.export.factors import LoraFactors, lora_factors, lora_tensors, stored_factors
from ether_diffusion.adapters.export.header import NOTE, lora_header
from ether_diffusion.adapters.export.keys import Place, diffusers_keys, kohya_keys, sign_of_text_encoder
from ether_diffusion.adapters.fingerprint import fingerprint
from ether_diffusion.adapters.format import EXPORT_NAME, Adapter, AdapterPart, Component
from ether_diffusion.adapters.models import base_layer, name_of_base, plain_modules
from ether_diffusion.adapters.tensor_file import safetensors_bytes
from ether_diffusion.durable_files import write_files

EXPORT_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def export_lora(
    adapter: Adapter | str | Path,
    base: DiffusionPipeline | nn.Module,
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
    adapters = read_ether(adapter).parts
    check_readable(base, adapters)
    weights = {c: adapted_weights(part, component_of(base, c), rebake=rebake) for c, part in adapters.items()}
    factors: dict[Place, LoraFactors] = {}
    for component, part in adapters.items():
        for name, sides in part.projections().items():
            exact = lora_factors(weights[component][name], *sides)
            factors[component, name] = stored_factors(exact, dtype)
        if component != "unet":
            factors |= _sign(component, part, component_of(base, component), dtype)
    denoiser, two = denoiser_name(base), getattr(base, "text_encoder_2", None) is not None
    kohya = kohya_keys(factors, has_two_text_encoders=two)
    keys = kohya or diffusers_keys(factors, denoiser=denoiser)
    tensors, rank = lora_tensors({keys[p]: pair for p, pair in factors.items()}, kohya=kohya is not None)
    first, part = next(iter(adapters.items()))
    header = lora_header(
        _on_base(part, weights[first], base),
        rank=rank,
        title=path.stem,
        denoiser=getattr(base, denoiser, base),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files(path.parent, {path.name: safetensors_bytes(tensors, header)})
    return path


def _sign(
    component: Component, adapter: AdapterPart, model: nn.Module, dtype: torch.dtype
) -> dict[Place, LoraFactors]:
    """Return the module that a file of this text encoder is known by, unchanged, where it is not in it."""
    name = sign_of_text_encoder(adapter.projections())
    if name is None:
        return {}
    linear = base_layer(plain_modules(model)[name])
    assert isinstance(linear, nn.Linear)
    nothing = LoraFactors(
        torch.zeros(1, linear.in_features, dtype=dtype), torch.zeros(linear.out_features, 1, dtype=dtype)
    )
    return {(component, name): nothing}


def _on_base(
    adapter: AdapterPart, weights: Mapping[str, Tensor], base: DiffusionPipeline | nn.Module
) -> AdapterPart:
    """Return the adapter with the name and fingerprint of the base that the export is made on."""
    found, trained_on = fingerprint(weights), adapter.metadata.base_fingerprint
    if found is None or (trained_on is not None and trained_on.compare(found) == "same"):
        return adapter
    metadata = replace(adapter.metadata, base_model=name_of_base(base), base_fingerprint=found)
    return replace(adapter, metadata=metadata)


def lora_path(folder: str | Path, export_name: str = EXPORT_NAME) -> Path:
    """Return the path of the LoRA file to be written; an earlier export may be there, and nothing else.

    Raises:
        ValueError: the name is no file name, or a file that is no export has it.
    """
    name = export_name if export_name.endswith(".safetensors") else f"{export_name}.safetensors"
    if not name.removesuffix(".safetensors") or Path(name).name != name or "\\" in name:
        raise ValueError(f"export_name={export_name!r} is not a file name; use letters, digits, - and _")
    path = Path(folder) / name
    if path.exists() and not _is_export(path):
        raise ValueError(f"{path} is there already and is no export; move it, or choose another export_name")
    return path


def _is_export(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return NOTE in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False

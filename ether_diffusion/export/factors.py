"""What an adapter changes of a base: the own weights, checked, and their updates as exact LoRA factors."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from torch import Tensor, nn

from ether_diffusion import reflections
from ether_diffusion.adapters.format import Adapter, AdapterPart, Component
from ether_diffusion.adapters.models import Part, base_layer, check_fit, find_parts, plain_modules
from ether_diffusion.adapters.read import read_adapter
from ether_diffusion.reflections import Vectors
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.tuner.linear import make_rows

logger = logging.getLogger(__name__)

Base: TypeAlias = DiffusionPipeline | nn.Module
"""A pipeline, or its denoiser by itself."""


class LoraFactors(NamedTuple):
    """ΔW = up @ down of one module: down (rank, in) and up (out, rank)."""

    down: Tensor
    up: Tensor


def read_ether(adapter: Adapter | str | Path) -> Adapter:
    """Return an adapter of ETHER: the one given, or that of a folder or a model of the Hub."""
    if not isinstance(adapter, Adapter):
        return read_adapter(adapter, only_ether=True, with_encoder=False)
    if not adapter.parts or not isinstance(adapter.config, EtherConfig):
        raise ValueError(f"{adapter.name} is of the method {adapter.method}; what is exported is of ETHER")
    return adapter


def changed_parts(base: Base, adapter: Adapter) -> dict[Component, Part]:
    """Return the models of a base that an adapter changes."""
    parts = {part.component: part for part in find_parts(base)}
    lacking = [component for component in adapter.parts if component not in parts]
    if lacking:
        raise ValueError(
            f"the adapter changes the {lacking[0]}, and {type(base).__name__} has none; give a pipeline"
        )
    return {component: parts[component] for component in adapter.parts}


def denoiser_name(base: Base) -> str:
    """Return what a pipeline calls its denoiser; of a model, the prefix by which it loads a LoRA."""
    if isinstance(base, nn.Module):
        return "unet" if isinstance(base, UNet2DConditionLoadersMixin) else "transformer"
    return next((part.name for part in find_parts(base) if part.component == "unet"), "unet")


def adapted_weights(adapter: AdapterPart, model: nn.Module, *, rebake: bool) -> dict[str, Tensor]:
    """Return the base's own weight of every module that an adapter changes, by module name."""
    fit = check_fit(model, adapter, None)
    if fit.match == "unknown":
        logger.warning("the adapter names no base weights; it is applied to this base as it is")
    if fit.match == "other weights" and not rebake:
        raise ValueError(
            f"{fit.remark}; use that base, or set rebake (--rebake) to apply the same reflections to this one"
        )
    modules = plain_modules(model)
    return {name: base_layer(modules[name]).get_parameter("weight").detach() for name in adapter.modules()}


def lora_factors(weight: Tensor, input_side: Vectors | None, output_side: Vectors | None) -> LoraFactors:
    """Return the exact update H_out W H_in - W of a weight W (out, in) as LoRA factors in float64.

    The rows of `down` are orthonormal: adapters far from the base would otherwise be sums of large terms
    that cancel, which 16 bits cannot hold (1.4e-3 of ΔW instead of 0.7e-3). The rank is num_blocks for a
    side of ETHER and 2 num_blocks for a side of ETHER+, summed over the sides, and at most `in`.
    """
    vectors = [_in_float64(side) for side in (input_side, output_side)]
    down, up = reflections.factors(weight.double(), *make_rows([vectors], torch.float64)[0])
    basis, coordinates = torch.linalg.qr(down.t())  # down = coordinatesᵀ basisᵀ
    return LoraFactors(basis.t(), up @ coordinates.t())


def stored_factors(factors: LoraFactors, dtype: torch.dtype) -> LoraFactors:
    """Round factors to `dtype`, each row of down as large as its column of up, so that neither underflows.

    The balance moves powers of two only, which are exact: float16 keeps ΔW within 1e-3 of its largest
    entry however close the adapter is to the identity, down to entries of about 1e-8.
    """
    down, up = factors
    halves = (up.abs().amax(0).log2() - down.abs().amax(1).log2()) / 2
    exponents = torch.where(halves.isfinite(), halves.round(), 0.0)
    stored = LoraFactors((down * exponents.exp2()[:, None]).to(dtype), (up * (-exponents).exp2()).to(dtype))
    if not any(factor.is_meta for factor in stored):
        for factor in stored:
            if not factor.isfinite().all():
                raise ValueError(f"an update is too large for {dtype} or not finite; export in float32")
    return stored


def lora_tensors(factors: Mapping[str, LoraFactors], *, kohya: bool = True) -> tuple[dict[str, Tensor], int]:
    """Return a LoRA file's tensors and their rank from factors by key, in kohya's names or in PEFT's.

    All have one rank, by rows of zeros, and alpha = rank: some readers take the first module's for all.
    """
    rank = max(len(down) for down, _ in factors.values())
    down_name, up_name = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    tensors = {}
    for key, (down, up) in factors.items():
        missing = rank - len(down)
        tensors[f"{key}.{down_name}.weight"] = nn.functional.pad(down, (0, 0, 0, missing)).contiguous()
        tensors[f"{key}.{up_name}.weight"] = nn.functional.pad(up, (0, missing)).contiguous()
        if kohya:  # without it, alpha is the rank
            tensors[f"{key}.alpha"] = torch.tensor(float(rank), dtype=down.dtype)
    return tensors, rank


def _in_float64(side: Vectors | None) -> Vectors | None:
    return None if side is None else Vectors(side.u.double(), None if side.v is None else side.v.double())

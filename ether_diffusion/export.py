"""Exact export of ETHER adapters: LoRA files and merged models, for tools that have never heard of ETHER."""

import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ether_diffusion import reflections
from ether_diffusion.adapters import Adapter, AdapterPart, fingerprint, read_adapter
from ether_diffusion.adapters import models as in_models
from ether_diffusion.adapters.format import EXPORT_NAME, Component, metadata_header
from ether_diffusion.adapters.tensor_file import safetensors_bytes
from ether_diffusion.bases import single_file
from ether_diffusion.durable_files import write_files
from ether_diffusion.reflections import Vectors
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.tuner.quantized import is_quantized, plain_linears
from ether_diffusion.wording import listed

logger = logging.getLogger(__name__)

Base: TypeAlias = DiffusionPipeline | nn.Module
"""A pipeline, or its denoiser by itself."""
Place = tuple[Component, str]
"""A module by its component and its name there."""
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
_FAMILIES = {
    "xl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    "v1": ("sd_v1", "stable-diffusion-v1"),
    "v2": ("sd_v2", "stable-diffusion-v2-512"),
}
"""What readers call the families of `single_file.CONFIGS`."""


class LoraFactors(NamedTuple):
    """ΔW = up @ down of one module: down (rank, in) and up (out, rank)."""

    down: Tensor
    up: Tensor


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
    path, adapter = lora_path(folder, export_name), read_ether(adapter)
    loadable = {"unet", *getattr(base, "_lora_loadable_modules", ())} - _BY_THEMSELVES
    unread = adapter.parts.keys() - loadable
    if unread:
        raise ValueError(
            f"diffusers reads no LoRA of {listed(sorted(unread))} from files of {type(base).__name__}; share "
            "it in its own format, or merged, or export read_adapter(…, subfolder=…) onto that model"
        )
    models = changed_models(base, adapter)
    weights = {c: adapted_weights(part, models[c], rebake=rebake) for c, part in adapter.parts.items()}
    factors: dict[Place, LoraFactors] = {}
    for component, part in adapter.parts.items():
        for name, transform in part.projections().items():
            exact = lora_factors(weights[component][name], *transform)
            factors[component, name] = stored_factors(exact, dtype)
        sign = None if component == "unet" else _sign_of_text_encoder(part.modules())
        if sign is not None:
            layer = in_models.base_layer(in_models.plain_modules(models[component])[sign])
            out, into = layer.get_parameter("weight").shape
            nothing = torch.zeros(1, into, dtype=dtype), torch.zeros(out, 1, dtype=dtype)
            factors[component, sign] = LoraFactors(*nothing)
    # what a pipeline calls it; of a model, the prefix by which it loads a LoRA
    denoiser = next((p.name for p in in_models.find_parts(base) if p.component == "unet"), "unet")
    if isinstance(base, nn.Module):
        denoiser = "unet" if isinstance(base, UNet2DConditionLoadersMixin) else "transformer"
    keys = kohya_keys(factors, has_two_text_encoders=getattr(base, "text_encoder_2", None) is not None)
    named = keys or {
        (c, n): f"{denoiser}.{n}" if c == "unet" else f"{c}.{_text_path(n) or n}" for c, n in factors
    }
    tensors, rank = lora_tensors({named[p]: pair for p, pair in factors.items()}, kohya=keys is not None)
    component, part = next(iter(adapter.parts.items()))
    found, trained_on = fingerprint(weights[component]), part.metadata.base_fingerprint
    if found is not None and (trained_on is None or trained_on.compare(found) != "same"):
        made_on = replace(part.metadata, base_model=in_models.name_of_base(base), base_fingerprint=found)
        part = replace(part, metadata=made_on)
    header = lora_header(part, rank=rank, title=path.stem, denoiser=getattr(base, denoiser, base))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files(path.parent, {path.name: safetensors_bytes(tensors, header)})
    return path


def export_merged(
    adapter: Adapter | str | Path,
    base: DiffusionPipeline | ModelMixin,
    folder: str | Path,
    *,
    scale: float = 1.0,
    rebake: bool = False,
) -> Path:
    """Write `base` with W + scale (W' - W) in place of W to a new folder in diffusers' layout.

    Every weight keeps its dtype, and `base` itself is left as it was; quantized weights are written as the
    numbers that they stand for.

    Raises:
        FileExistsError: the folder is there and not empty.
        ValueError: the scale is not finite, or the adapter does not fit the base, or was trained on other
            weights and `rebake` is not set.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} is not a finite number; 1 is as trained and 0 is the base")
    folder = Path(folder)
    check_new_folder(folder)
    adapter, own = read_ether(adapter), dict[Component, dict[str, Tensor]]()
    models, before = changed_models(base, adapter), dict[nn.Parameter, Tensor]()
    for component, model in models.items():
        if in_models.tuner_layers(model):
            raise ValueError(f"the base's {component} carries adapters; unload them, or merge them first")
        own[component] = adapted_weights(adapter.parts[component], model, rebake=rebake)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(_unquantized(model))
        try:
            for component, model in models.items():
                for name, transform in adapter.parts[component].projections().items():
                    parameter, weight = model.get_parameter(f"{name}.weight"), own[component][name]
                    before[parameter] = parameter.data
                    update = (*lora_factors(weight, *transform), scale)
                    parameter.data = reflections.merged_weight(weight, [update])
            base.save_pretrained(temporary)
            if folder.exists():
                folder.rmdir()
            temporary.rename(folder)
        finally:
            for parameter, own_weight in before.items():
                parameter.data = own_weight
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


@contextmanager
def _unquantized(model: Any) -> Iterator[None]:
    """Have a model inside that is saved with the weights that its quantized ones stand for."""
    quantizer, config = getattr(model, "hf_quantizer", None), getattr(model, "config", None)
    with plain_linears(model):
        if quantizer is None or config is None:
            yield
            return
        rest = {name: value for name, value in config.items() if name != "quantization_config"}
        model.hf_quantizer, model._internal_dict = None, type(config)(rest)
        try:
            yield
        finally:
            model.hf_quantizer, model._internal_dict = quantizer, config


def read_ether(adapter: Adapter | str | Path) -> Adapter:
    """Return an adapter of ETHER: the one given, or that of a folder or a model of the Hub."""
    if not isinstance(adapter, Adapter):
        return read_adapter(adapter, only_ether=True, with_encoder=False)
    if not adapter.parts or not isinstance(adapter.config, EtherConfig):
        raise ValueError(f"{adapter.name} is of the method {adapter.method}; what is exported is of ETHER")
    return adapter


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


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that a model must not be written to."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already and not empty; name a new folder")


def changed_models(base: Base, adapter: Adapter) -> dict[Component, nn.Module]:
    """Return the models of a base that an adapter changes."""
    models = {part.component: part.model for part in in_models.find_parts(base)}
    lacking = adapter.parts.keys() - models.keys()
    if lacking:
        what = f"the adapter changes {listed(sorted(lacking))}, which {type(base).__name__} has not"
        raise ValueError(f"{what}; give a whole pipeline")
    return {component: models[component] for component in adapter.parts}


def adapted_weights(adapter: AdapterPart, model: nn.Module, *, rebake: bool) -> dict[str, Tensor]:
    """Return the base's own weight of every module that an adapter changes, by module name."""
    fit = in_models.check_fit(model, adapter, None)
    if fit.match == "unknown":
        logger.warning("the adapter names no base weights; it is applied to this base as it is")
    if fit.match == "other weights" and not rebake:
        raise ValueError(f"{fit.remark}; use that base, or set rebake (--rebake) to reflect these")
    modules = in_models.plain_modules(model)
    if any(
        is_quantized(layer) for name in adapter.modules() if isinstance(layer := modules[name], nn.Linear)
    ):
        logger.warning(
            "the base is quantized: the result is exact for what its weights stand for, not before"
        )
    return {name: in_models.pristine_weight(modules[name]).detach() for name in adapter.modules()}


def lora_factors(weight: Tensor, input_side: Vectors | None, output_side: Vectors | None) -> LoraFactors:
    """Return the exact update H_out W H_in - W of a weight W (out, in) as LoRA factors in float64.

    The rows of `down` are orthonormal: adapters far from the base would otherwise be sums of large terms
    that cancel, which 16 bits cannot hold (1.4e-3 of ΔW instead of 0.7e-3). The rank is num_blocks for a
    side of ETHER and 2 num_blocks for a side of ETHER+, summed over the sides, and at most `in`.
    """

    transform = reflections.Transform(input_side, output_side).to(torch.float64)
    (rows,) = reflections.with_rows([transform], torch.float64)
    down, up = reflections.factors(weight.double(), *rows)
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
    if not all(factor.is_meta or factor.isfinite().all() for factor in stored):
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


def lora_header(adapter: AdapterPart, *, rank: int, title: str, denoiser: nn.Module) -> dict[str, str]:
    """Return the entries for an adapter whose metadata names the base that the file is made on."""
    config, trigger = cast(EtherConfig, adapter.config), adapter.metadata.trigger
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
    of_base: Any = getattr(denoiser, "config", {})
    known = {name: each["parts"]["unet"] for name, each in single_file.CONFIGS.items()}
    family = next((name for name, unet in known.items() if _widths(unet) == _widths(of_base)), "")
    version, architecture = _FAMILIES.get(family, ("", ""))
    if version == "sd_v2":
        entries["ss_v2"] = "True"  # which A1111 asks, and not the version
        if of_base.sample_size == 96:
            version, architecture = "sd_v2_v", "stable-diffusion-v2-768-v"
    if version:
        entries |= {"ss_base_model_version": version, "modelspec.architecture": f"{architecture}/lora"}
    return metadata_header(adapter.metadata) | entries


def _widths(unet: Mapping[str, Any]) -> tuple[list[int], object]:
    return list(unet.get("block_out_channels", ())), unet.get("cross_attention_dim")


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

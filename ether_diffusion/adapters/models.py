"""Models and pipelines as adapters see them: part by part, without wrappers, and whether an adapter fits."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, cast

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.adapters.format import AdapterPart, BaseFingerprint, BaseMatch, fingerprint
from ether_diffusion.adapters.methods import is_target, name_of, widths_of
from ether_diffusion.tiny_world import embedded_name
from ether_diffusion.tuner import EtherConfig, EtherLinear, EtherModel
from ether_diffusion.tuner.config import ATTENTION
from ether_diffusion.tuner.other_layers import adapters_of, reads_weight
from ether_diffusion.tuner.quantized import NORM, dequantized, is_plain, is_quantized, rounding_of
from ether_diffusion.wording import listed, printable

DENOISERS = ("unet", "transformer", "prior")
"""The component of a pipeline whose adapter lies in the folder itself: the first of these that it has."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
COMPONENTS = (
    *TEXT_ENCODERS,
    *("transformer", "transformer_2", "transformer_ref", "prior", "decoder", "connectors"),
    *("text_conditioner", "controlnet", "motion_adapter", "image_encoder", "vae"),
)
"""The subfolders that are known for a component's adapter, where no pipeline says what it has."""
_ORIGIN = "_name_or_path"
_FAMILIES = "diffusers.models.transformers."
"""Of whose modules each class is a family of its own, whatever its projections are called."""
_WRAPPERS = frozenset({"base_layer", "_orig_mod"})
"""What an adapter of another method on top, and torch.compile of a single block, put into names."""

Match = BaseMatch | Literal["unknown"]


class Pipeline(Protocol):
    """A diffusers pipeline, as far as adapters are concerned."""

    @property
    def components(self) -> dict[str, object]:
        """The parts of the pipeline by name."""


@dataclass(frozen=True)
class Part:
    """A model of a pipeline, and the component of an adapter that it takes: "unet" for every denoiser."""

    name: str
    component: str
    model: nn.Module


def find_parts(pipeline_or_model: Pipeline | nn.Module) -> list[Part]:
    """Return the models that may carry adapters, the denoiser first, then text encoders, then all others."""
    kind = type(pipeline_or_model).__name__
    if isinstance(pipeline_or_model, nn.Module):
        return [Part(type(bare_model(pipeline_or_model)).__name__, "unet", pipeline_or_model)]
    if not hasattr(pipeline_or_model, "components"):
        raise ValueError(f"{kind} is neither a torch module nor a diffusers pipeline; give one of them")
    models = {n: model for n, model in pipeline_or_model.components.items() if isinstance(model, nn.Module)}
    denoisers = [name for name in DENOISERS if name in models][:1]
    first = denoisers + [name for name in TEXT_ENCODERS if name in models]
    if not first:
        known = ", ".join(DENOISERS + TEXT_ENCODERS)
        raise ValueError(f"{kind} has none of {known}; give the model itself")
    parts: dict[nn.Module, Part] = {}
    for name in dict.fromkeys([*first, *models]):  # a model may stand under two names, and is one part
        component = "unet" if name in denoisers else name
        parts.setdefault(bare_model(models[name]), Part(name, component, models[name]))
    return list(parts.values())


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model whose module names an adapter's tensors use: without PeftModel and torch.compile."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def plain_name(name: str) -> str:
    """Return the name that a module has in the model by itself, as files speak of it."""
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the bare model by plain name; of several of one name, the outermost."""
    found: dict[str, nn.Module] = {}
    for name, module in bare_model(model).named_modules():
        found.setdefault(plain_name(name), module)
    return found


def configs_of(model: nn.Module) -> dict[str, PeftConfig]:
    """Return PEFT's configurations of the adapters that a model carries, by name."""
    return cast(dict[str, PeftConfig], getattr(bare_model(model), "peft_config", {}))


def tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """Return the layers of a model that hold adapters of any method."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, BaseTunerLayer]:
    """Return the layers of a model that carry an adapter of any method, by their sorted plain names."""
    found = {
        plain_name(name): module
        for name, module in bare_model(model).named_modules()
        if isinstance(module, BaseTunerLayer) and adapter_name in adapters_of(module)
    }
    return dict(sorted(found.items()))


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return an adapter's tensors by their plain names in the model, as its file names them."""
    # embedding layers are not saved: PEFT would ask the Hub
    options = {"adapter_name": adapter_name, "save_embedding_layers": False}
    state: dict[str, Tensor] = get_peft_model_state_dict(bare_model(model), **options)
    return {plain_name(name): tensor for name, tensor in sorted(state.items())}


def base_layer(module: nn.Module) -> nn.Module:
    """Return the frozen layer under adapters of any method, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def base_fingerprint(model: nn.Module, names: list[str]) -> BaseFingerprint | None:
    """Return the fingerprint of the named modules' own weights, merged or not; None on the meta device."""
    modules = plain_modules(model)
    found = fingerprint({name: pristine_weight(modules[name]) for name in names})
    if found is None:
        return None
    layers = [base_layer(modules[name]) for name in sorted(names)]
    norms = tuple(getattr(layer, NORM, norm) for layer, norm in zip(layers, found.norms, strict=True))
    return replace(found, norms=norms, rounding=max([found.rounding, *map(rounding_of, layers)]))


def pristine_weight(module: nn.Module) -> Tensor:
    """Return the base's own weight (out, in) under adapters of any method, merged or not; dequantized."""
    while isinstance(module, BaseTunerLayer):
        if isinstance(module, EtherLinear) and module.pristine_weight is not None:
            return module.pristine_weight
        module = cast(nn.Module, module.base_layer)
    if isinstance(module, nn.Linear) and not is_plain(module):
        return dequantized(module)
    return cast(Tensor, module.weight)


def name_of_base(owner: object) -> str | None:
    """Return what a pipeline or a model was loaded from, as `shareable_name`; None where it does not say."""
    config = getattr(bare_model(owner) if isinstance(owner, nn.Module) else owner, "config", None)
    if isinstance(config, Mapping):
        return shareable_name(config.get(_ORIGIN))
    return shareable_name(getattr(config, _ORIGIN, None))


def shareable_name(origin: object) -> str | None:
    """Return a hub id as it is, the embedded base's alias, and of any other folder its name alone.

    Adapters are shared, and the path to somebody's home is nobody's business.
    """
    if not isinstance(origin, (str, Path)) or not str(origin):
        return None
    folder = Path(origin)
    if folder.is_absolute() or folder.exists():
        folder = folder.resolve()
        return embedded_name(folder) or folder.name or None
    return str(origin)


@dataclass(frozen=True)
class Fit:
    """How a model's base compares with an adapter's; `remark` is a clause where it is of other weights."""

    match: Match
    remark: str = ""


def check_fit(
    model: nn.Module,
    part: AdapterPart,
    adapter_name: str | None,
    fingerprint_of: Callable[[nn.Module, list[str]], BaseFingerprint | None] = base_fingerprint,
) -> Fit:
    """Check that a model can take a part of an adapter under a name, and say how its base compares.

    Without a name nothing is asked of the adapters that the model carries, but that none is merged.
    `fingerprint_of` may remember what `base_fingerprint` finds, which reads all weights that it names.

    Raises:
        ValueError: it cannot.
    """
    root, names = bare_model(model), list(part.modules())
    made_for = printable(part.metadata.base_model or "an unnamed base")
    given = printable(name_of_base(model) or f"this {type(root).__name__}")
    merged = {name for layer in tuner_layers(root) for name in layer.merged_adapters}
    if merged:
        raise ValueError(f"{listed(sorted(merged))} is merged into {given}; unmerge (unfuse) it first")
    if adapter_name is not None:
        _check_room(model, part.config, adapter_name, given)
    modules = plain_modules(root)
    absent = [name for name in names if name not in modules]
    if absent:
        raise ValueError(
            f"the adapter was made for {made_for}: {len(absent)} of its {len(names)} projections are not in "
            f"{given} ({listed(absent)}); load the base it was made for"
        )
    config = None if adapter_name is None else part.config
    problems = [problem for name in names if (problem := _problem(name, modules[name], config)) is not None]
    if problems:
        raise ValueError("; ".join(problems[:3]))
    theirs = part.metadata.base_fingerprint
    ours = None if theirs is None else fingerprint_of(root, names)
    match: Match = "unknown"
    if theirs is not None and ours is not None:
        made_for, given = f"{made_for} (fingerprint {theirs.id})", f"{given} ({ours.id})"
        match = theirs.compare(ours)
    wrong = []
    for name, found in part.modules().items():
        linear, widths = cast(nn.Linear, base_layer(modules[name])), widths_of(part.config, name, found)
        assert widths is not None  # as was checked on reading
        sides = ("input", linear.in_features, widths[0]), ("output", linear.out_features, widths[1])
        unlike = [side for side in sides if side[2] not in (0, side[1])]
        wrong += [f"{name}: {side} width {own} here and {its} in the adapter" for side, own, its in unlike]
    theirs_of, ours_of = part.config.auto_mapping or {}, type(root).__name__
    is_of_diffusers = str(theirs_of.get("parent_library")).startswith(_FAMILIES)
    if match != "same" and is_of_diffusers and theirs_of.get("base_model_class") != ours_of:
        wrong.append(f"{printable(theirs_of.get('base_model_class'))} is not {ours_of}")
    if wrong or match == "other architecture":
        shown = f" ({listed(wrong, 3)})" if wrong else ""
        said = f"the adapter was made for {made_for}, another architecture than {given}{shown}"
        raise ValueError(f"{said}; load the base it was made for")
    if match != "same" or not isinstance(part.config, EtherConfig):
        _check_whole(root, part, given)
    remark = f"the adapter was made for {made_for}; {given} has the same architecture and other weights"
    return Fit(match, remark if match == "other weights" else "")


def _check_room(model: nn.Module, config: PeftConfig, adapter_name: str, given: str) -> None:
    """Check that an adapter can have this name, and that those that a model carries leave room for it."""
    root, is_ether = bare_model(model), isinstance(config, EtherConfig)
    if adapter_name in configs_of(root):
        raise ValueError(f"the model already has an adapter named {adapter_name!r}; choose another")
    parts = {word for name, _ in root.named_modules() for word in name.split(".")}
    # PEFT finds an adapter's parameters by its name between dots
    if not re.fullmatch(r"[^.\x00-\x1f\x7f]{1,100}", adapter_name) or adapter_name in parts:
        needed = "1 to 100 characters without dots, that name no part of the model"
        raise ValueError(f"adapter_name={adapter_name!r} cannot name an adapter here; use {needed}")
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel) and not (is_ether and isinstance(model.base_model, EtherModel)):
        kind = type(model.base_model).__name__
        raise ValueError(f"{given} is a PeftModel ({kind}); load into its get_base_model()")
    others = sorted({name_of(other) for other in configs_of(model).values()} - {name_of(config)})
    if others and config.peft_type == "HRA":
        raise ValueError(
            f"{given} carries an adapter of the method {listed(others)}, past which HRA reads the weights; "
            "unload it first"
        )


def _problem(name: str, module: nn.Module, config: PeftConfig | None) -> str | None:
    if isinstance(config, EtherConfig) and reads_weight(module):  # beside its own kind every method goes
        return f"{name} carries a {type(module).__name__}, which reads its weight past ETHER; unload it"
    linear = base_layer(module)
    if not isinstance(linear, nn.Linear) or not (is_plain(linear) or is_quantized(linear)):
        kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
        return f"{name} is a {kind}; what is adapted is torch.nn.Linear, also of bitsandbytes or torchao"
    if linear.weight.is_meta:
        return f"{name} has no weights here (meta device); load the adapter before offloading the model"
    return None


def plain_targets(root: nn.Module, config: PeftConfig) -> set[str]:
    """Return the Linear modules that the configuration names; none where it uses a regex.

    A stranger's regex is never evaluated; then the number of norms in the fingerprint says what is whole.
    """
    targets, excluded = config.target_modules, config.exclude_modules or set()
    layers = getattr(config, "layers_to_transform", None)  # which IA³ has not
    if isinstance(targets, str) or isinstance(excluded, str) or layers is not None:
        return set()
    linears = [n for n, module in plain_modules(root).items() if isinstance(base_layer(module), nn.Linear)]
    wanted, left_out = set(ATTENTION if targets is None else targets), set(excluded)
    return {name for name in linears if is_target(name, wanted) and not is_target(name, left_out)}


def _check_whole(root: nn.Module, part: AdapterPart, given: str) -> None:
    """Check that an adapter has all modules of the kinds of place it has any of, where its base does not say.

    Modules in other places, as motion modules and an IP-Adapter's, are not the base's that it was made for.
    """
    names, targets = part.modules().keys(), part.config.target_modules
    if isinstance(part.config, EtherConfig):
        places = {_place(name) for name in names}
        missing = {name for name in plain_targets(root, part.config) - names if _place(name) in places}
    else:  # PEFT would adapt whatever has such a name, convolutions too
        missing = {name for name in plain_modules(root) if is_target(name, targets)} - names
    if missing:
        raise ValueError(
            f"the adapter lacks projections that its configuration targets in {given} "
            f"({listed(sorted(missing))}); it is not whole, or was made for another base than this"
        )


def _place(name: str) -> str:
    """Return where in its block a module stands: attentions.#.transformer_blocks.#.attn#.to_q."""
    _, *inside = re.sub(r"\d+", "#", name).split(".")
    return ".".join(inside).removeprefix("#.")

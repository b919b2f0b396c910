"""Whether an adapter fits a model, and how the model's base compares: asked without touching the model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from peft import PeftConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.adapters.fingerprint import BaseMatch
from ether_diffusion.adapters.format import AdapterPart
from ether_diffusion.adapters.methods import is_target, method_of, name_of, title_of
from ether_diffusion.adapters.models import (
    bare_model,
    base_fingerprint,
    base_layer,
    configs_of,
    name_of_base,
    plain_modules,
)
from ether_diffusion.adapters.tensor_file import Shape
from ether_diffusion.tuner import EtherConfig, EtherLayer, EtherModel
from ether_diffusion.tuner.config import ATTENTION
from ether_diffusion.wording import listed, printable

Match = BaseMatch | Literal["unknown"]


@dataclass(frozen=True)
class Fit:
    """How a model's base compares with an adapter's; `remark` is a clause where it is of other weights."""

    match: Match
    remark: str = ""


def check_fit(model: nn.Module, part: AdapterPart, adapter_name: str) -> Fit:
    """Check that a model can take a part of an adapter under a name, and say how its base compares.

    Raises:
        ValueError: it cannot: the name is taken, adapters are merged or do not go together, modules or widths
            are others, or the fingerprint is of another architecture.
    """
    root = bare_model(model)
    made_for = printable(part.metadata.base_model or "an unnamed base")
    given = printable(name_of_base(model) or f"this {type(root).__name__}")
    check_name(root, adapter_name)
    _check_state(model, part.config, given)
    modules, needed = plain_modules(root), part.modules()
    absent = [name for name in needed if name not in modules]
    if absent:
        raise ValueError(
            f"the adapter was made for {made_for}: {len(absent)} of its {len(needed)} projections are not in "
            f"{given} ({listed(absent)}); load the base it was made for"
        )
    problems = [p for name in needed if (p := _problem(name, modules[name], part.config)) is not None]
    if problems:
        raise ValueError(
            "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if problems[3:] else "")
        )
    theirs = part.metadata.base_fingerprint
    ours = None if theirs is None else base_fingerprint(root, list(needed))
    if theirs is not None and ours is not None:
        made_for, given = f"{made_for} (fingerprint {theirs.id})", f"{given} ({ours.id})"
    wrong = [
        w for n, found in needed.items() if (w := _wrong_width(n, modules[n], found, part.config)) is not None
    ]
    match = "unknown" if theirs is None or ours is None else theirs.compare(ours)
    if wrong or match == "other architecture":
        shown = f" ({listed(wrong, 3)})" if wrong else ""
        raise ValueError(
            f"the adapter was made for {made_for}, another architecture than {given}{shown}; "
            "load the base it was made for"
        )
    if match != "same" or not isinstance(part.config, EtherConfig):
        _check_whole(root, part, given)
    if match == "other weights":
        return Fit(
            match, f"the adapter was made for {made_for}; {given} has the same architecture and other weights"
        )
    return Fit(match)


def check_name(root: nn.Module, adapter_name: str) -> None:
    """Check that a model can take an adapter of this name.

    Raises:
        ValueError: the name is taken or cannot be one.
    """
    if not re.fullmatch(r"[^.\x00-\x1f\x7f]{1,100}", adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} cannot name an adapter; use 1 to 100 characters, no dots"
        )
    if adapter_name in configs_of(root):
        raise ValueError(
            f"the model already has an adapter named {adapter_name!r}; choose another adapter_name "
            "or delete it first"
        )
    # PEFT finds an adapter's parameters by this name between dots
    if any(adapter_name in name.split(".") for name, _ in root.named_modules()):
        raise ValueError(
            f"adapter_name={adapter_name!r} is also the name of a part of the model; choose another"
        )


def plain_targets(root: nn.Module, config: PeftConfig) -> set[str]:
    """Return the Linear modules that the configuration names; none where it uses a regex.

    A stranger's regex is never evaluated; then the number of norms in the fingerprint says what is whole.
    """
    targets, excluded = config.target_modules, config.exclude_modules or set()
    if isinstance(targets, str) or isinstance(excluded, str) or config.layers_to_transform is not None:
        return set()
    wanted = set(ATTENTION if targets is None else targets)
    return {
        name
        for name, module in plain_modules(root).items()
        if isinstance(base_layer(module), nn.Linear)
        and is_target(name, wanted)
        and not is_target(name, set(excluded))
    }


def _check_state(model: nn.Module, config: PeftConfig, given: str) -> None:
    model, is_ether = getattr(model, "_orig_mod", model), isinstance(config, EtherConfig)
    if isinstance(model, PeftModel) and not (is_ether and isinstance(model.base_model, EtherModel)):
        method = type(model.base_model).__name__
        raise ValueError(f"{given} is a PeftModel ({method}); load into its get_base_model()")
    merged = {name for m in model.modules() if isinstance(m, BaseTunerLayer) for name in m.merged_adapters}
    if merged:
        raise ValueError(
            f"{listed(sorted(merged))} is merged into {given}; unmerge (unfuse) before loading another"
        )
    others = sorted({name_of(other) for other in configs_of(model).values()} - {name_of(config)})
    if others and not is_ether:
        raise ValueError(
            f"{given} carries an adapter of the method {listed(others)}, which one of {title_of(config)} "
            "does not work with; unload it first"
        )


def _problem(name: str, module: nn.Module, config: PeftConfig) -> str | None:
    linear = base_layer(module)
    # a LoRA adds to what is under it, so that ETHER goes there; beside its own kind every method goes
    is_other = isinstance(module, BaseTunerLayer) and not isinstance(module, EtherLayer | LoraLinear)
    if is_other and isinstance(config, EtherConfig):
        method = type(module).__name__
        return f"{name} already carries an adapter of another method ({method}); unload it first"
    if not isinstance(linear, nn.Linear) or not _is_plain(linear.weight.data):
        kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
        return f"{name} is a {kind}; {title_of(config)} adapts torch.nn.Linear with floating-point weights"
    if linear.weight.is_meta:
        return f"{name} has no weights here (meta device); load the adapter before offloading the model"
    return None


def _is_plain(weight: Tensor) -> bool:
    return type(weight) is Tensor and weight.is_floating_point()  # quantized weights have types of their own


def _wrong_width(name: str, module: nn.Module, found: Mapping[str, Shape], config: PeftConfig) -> str | None:
    linear = base_layer(module)
    assert isinstance(linear, nn.Linear)
    theirs = method_of(config).widths(found)  # the shapes of which were checked on reading
    for side, width, expected in zip(
        ("input", "output"), (linear.in_features, linear.out_features), theirs, strict=True
    ):
        if expected not in (0, width):
            return f"{name}: {side} width {width} here and {expected} in the adapter"
    return None


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

"""Whether an adapter fits a model, asked without touching the model."""

import re

from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.adapters.adapter import Adapter
from ether_diffusion.adapters.models import bare_model, base_layer, plain_modules
from ether_diffusion.tuner import EtherConfig, EtherLayer, EtherModel
from ether_diffusion.tuner.config import ATTENTION
from ether_diffusion.wording import listed


def check_targets(
    model: nn.Module, adapter: Adapter, adapter_name: str, *, made_for: str, given: str
) -> None:
    """Check that a model can take an adapter under a name, and has the modules that it is for.

    Raises:
        ValueError: the name is taken or cannot be one, adapters are merged, or modules are missing, not run
            or of an unsupported kind.
    """
    root = bare_model(model)
    check_name(root, adapter_name)
    _check_state(model, given)
    modules = plain_modules(root)
    names = adapter.projections().keys()
    absent = [name for name in names if name not in modules]
    if absent:
        raise ValueError(
            f"the adapter was made for {made_for}: {len(absent)} of its {len(names)} projections are not in "
            f"{given} ({listed(absent)}); load the base it was made for"
        )
    problems = [problem for name in names if (problem := _problem(name, modules[name])) is not None]
    if problems:
        raise ValueError(
            "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if problems[3:] else "")
        )


def check_whole(model: nn.Module, adapter: Adapter, *, given: str) -> None:
    """Check that an adapter has all modules of the kinds of place it has any of, where its base does not say.

    Modules in other places, as motion modules and an IP-Adapter's, are not the base's that it was made for.

    Raises:
        ValueError: some are missing.
    """
    names = adapter.projections().keys()
    places = {_place(name) for name in names}
    missing = sorted(
        name for name in plain_targets(bare_model(model), adapter.config) - names if _place(name) in places
    )
    if missing:
        raise ValueError(
            f"the adapter lacks projections that its configuration targets in {given} "
            f"({listed(missing)}); it is not whole, or was made for another base than this"
        )


def _place(name: str) -> str:
    """Return where in its block a module stands: attentions.#.transformer_blocks.#.attn#.to_q."""
    _, *inside = re.sub(r"\d+", "#", name).split(".")
    return ".".join(inside).removeprefix("#.")


def check_widths(model: nn.Module, adapter: Adapter, *, made_for: str, given: str) -> None:
    """Check that the vectors are as long as the model's modules are wide.

    Raises:
        ValueError: some are not; the message names both bases.
    """
    modules = plain_modules(model)
    wrong = []
    for name, (input_side, output_side) in adapter.projections().items():
        linear = base_layer(modules[name])
        assert isinstance(linear, nn.Linear)
        for label, side, width in (
            ("input", input_side, linear.in_features),
            ("output", output_side, linear.out_features),
        ):
            if side is not None and side.u.numel() != width:
                wrong.append(f"{name}: {label} width {width} here and {side.u.numel()} in the adapter")
    if wrong:
        raise ValueError(
            f"the adapter was made for {made_for}, another architecture than {given} ({listed(wrong, 3)}); "
            "load the base it was made for"
        )


def _check_state(model: nn.Module, given: str) -> None:
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel) and not isinstance(model.base_model, EtherModel):
        method = type(model.base_model).__name__
        raise ValueError(
            f"{given} is a PeftModel of another method ({method}); load into its get_base_model()"
        )
    check_unmerged(model, given)


def check_unmerged(model: nn.Module, given: str) -> None:
    """Check that no adapter is merged into a model's weights.

    Raises:
        ValueError: one is.
    """
    merged = {name for m in model.modules() if isinstance(m, BaseTunerLayer) for name in m.merged_adapters}
    if merged:
        raise ValueError(
            f"{listed(sorted(merged))} is merged into {given}; unmerge (unfuse) before loading another"
        )


def _problem(name: str, module: nn.Module) -> str | None:
    linear = base_layer(module)
    # a LoRA adds to what is under it, so that ETHER goes there
    if isinstance(module, BaseTunerLayer) and not isinstance(module, EtherLayer | LoraLinear):
        return (
            f"{name} already carries an adapter of another method ({type(module).__name__}); unload it first"
        )
    if not isinstance(linear, nn.Linear) or not _is_plain(linear.weight.data):
        kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
        return f"{name} is a {kind}; ETHER adapts torch.nn.Linear with floating-point weights"
    if linear.weight.is_meta:
        return f"{name} has no weights here (meta device); load the adapter before offloading the model"
    return None


def _is_plain(weight: Tensor) -> bool:
    return type(weight) is Tensor and weight.is_floating_point()  # quantized weights have types of their own


def check_name(root: nn.Module, adapter_name: str) -> None:
    """Check that a model can take an adapter of this name.

    Raises:
        ValueError: the name is taken or cannot be one.
    """
    if not adapter_name or not re.fullmatch(r"[^.\x00-\x1f\x7f]{1,100}", adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} cannot name an adapter; use 1 to 100 characters, no dots"
        )
    if adapter_name in getattr(root, "peft_config", {}):
        raise ValueError(
            f"the model already has an adapter named {adapter_name!r}; choose another adapter_name "
            "or delete it first"
        )
    # PEFT finds an adapter's parameters by this name between dots
    if any(adapter_name in name.split(".") for name, _ in root.named_modules()):
        raise ValueError(
            f"adapter_name={adapter_name!r} is also the name of a part of the model; choose another"
        )


def plain_targets(root: nn.Module, config: EtherConfig) -> set[str]:
    """Return the Linear modules that the configuration names; none where it uses a regex.

    A stranger's regex is never evaluated; then the number of norms in the fingerprint says what is whole.
    """
    targets, excluded = config.target_modules, config.exclude_modules or set()
    if isinstance(targets, str) or isinstance(excluded, str) or config.layers_to_transform is not None:
        return set()
    named = {
        name for name, module in plain_modules(root).items() if isinstance(base_layer(module), nn.Linear)
    }

    def matches(name: str, wanted: set[str]) -> bool:
        return any(f".{name}".endswith(f".{suffix}") for suffix in wanted)

    return {
        n
        for n in named
        if matches(n, set(ATTENTION if targets is None else targets)) and not matches(n, set(excluded))
    }

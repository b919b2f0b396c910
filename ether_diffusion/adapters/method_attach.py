"""Attaching adapters of the methods beside ETHER, whole or not at all, and taking them away again."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.adapters.fit import check_name, check_unmerged
from ether_diffusion.adapters.loading import Fit, compare_bases
from ether_diffusion.adapters.method_reader import MethodAdapter, is_target
from ether_diffusion.adapters.methods import Shape
from ether_diffusion.adapters.models import bare_model, base_fingerprint, base_layer, name_of_base
from ether_diffusion.tuner.other_layers import adapters_of, other_layers
from ether_diffusion.wording import listed, printable


def check_method_fit(model: nn.Module, adapter: MethodAdapter, adapter_name: str) -> Fit:
    """Check that a model can take an adapter under a name, and say how its base compares; changes nothing.

    Raises:
        ValueError: it cannot: a name is taken, adapters of another method are there, or modules or shapes are
            others.
    """
    root = bare_model(model)
    made_for = printable(adapter.metadata.base_model or "an unnamed base")
    given = printable(name_of_base(model) or f"this {type(root).__name__}")
    if isinstance(getattr(model, "_orig_mod", model), PeftModel):
        raise ValueError(f"{given} is a PeftModel; load into its get_base_model()")
    check_name(root, adapter_name)
    check_unmerged(root, given)
    _check_one_method(root, adapter, given)
    modules = dict(root.named_modules())
    targets, names = set(adapter.config.targets), adapter.modules().keys()
    absent = [name for name in names if name not in modules]
    if absent:
        raise ValueError(
            f"the adapter was made for {made_for}: {len(absent)} of its {len(names)} modules are not in "
            f"{given} ({listed(absent)}); load the base it was made for"
        )
    meant = {
        name
        for name, module in modules.items()
        if name and is_target(name, targets) and not name.endswith(".base_layer")
    }
    if meant != names:
        raise ValueError(
            f"the adapter lacks modules that its configuration targets in {given} "
            f"({listed(sorted(meant - names))}); it is not whole, or was made for another base than this"
        )
    problems = [
        problem
        for name, shapes in adapter.modules().items()
        if (problem := _problem(name, modules[name], shapes, adapter)) is not None
    ]
    if problems:
        raise ValueError(f"the adapter was made for {made_for}, not for {given}: {listed(problems, 3)}")
    theirs, ours = adapter.metadata.base_fingerprint, base_fingerprint(root, list(names))
    if theirs is None or ours is None:
        return Fit("unknown")
    made_for, given = f"{made_for} (fingerprint {theirs.id})", f"{given} ({ours.id})"
    return compare_bases(theirs, ours, made_for=made_for, given=given)


def _check_one_method(root: nn.Module, adapter: MethodAdapter, given: str) -> None:
    ours = adapter.config.to_peft().peft_type
    configs: Mapping[str, PeftConfig] = getattr(root, "peft_config", {})
    others = sorted(
        {str(getattr(c.peft_type, "value", c.peft_type)) for c in configs.values() if c.peft_type != ours}
    )
    if others:
        raise ValueError(
            f"{given} carries an adapter of the method {listed(others)}, which one of {adapter.method.title} "
            "does not work with; unload it first"
        )


def _problem(name: str, module: nn.Module, shapes: Mapping[str, Shape], adapter: MethodAdapter) -> str | None:
    linear, method = base_layer(module), adapter.method
    if not isinstance(linear, nn.Linear) or type(linear.weight.data) is not Tensor:
        return f"{name} is a {type(linear).__qualname__} and no plain torch.nn.Linear"
    if linear.weight.is_meta:
        return f"{name} has no weights here (meta device)"
    width_in, width_out = linear.in_features, linear.out_features
    if method.blocks is not None and width_in % int(str(adapter.config.settings[method.blocks])):
        return f"{name} has an input width of {width_in}, which {method.blocks} does not divide"
    needed = method.shapes(adapter.config.settings, width_in, width_out)
    wrong = [
        f"{end} of {name} is {shapes[end]}, here {needed[end]}"
        for end in needed
        if shapes[end] != needed[end]
    ]
    return wrong[0] if wrong else None


def attach_method(model: nn.Module, adapter: MethodAdapter, adapter_name: str, *, activate: bool) -> None:
    """Add an adapter to a model that `check_method_fit` found fitting, in the dtype of its base; frozen.

    Wrap it in `unchanged_on_failure`: this function stops where it fails.
    """
    root = bare_model(model)
    active = {layer: list(layer.active_adapters) for layer in other_layers(root)}
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(adapter.config.to_peft(), root, adapter_name)
            result = set_peft_model_state_dict(root, adapter.tensors, adapter_name)
        assert not result.unexpected_keys, result.unexpected_keys
        layers = {
            name: module
            for name, module in root.named_modules()
            if isinstance(module, BaseTunerLayer) and adapter_name in adapters_of(module)
        }
        assert layers.keys() == adapter.modules().keys()
    except BaseException:
        remove_method(root, [adapter_name])
        raise
    for layer in layers.values():
        layer.train(layer.get_base_layer().training)  # a new module is in training mode: dropout would be on
    for layer in other_layers(root):
        put_in_force(layer, [adapter_name] if activate else active.get(layer, []))
    if hasattr(root, "_hf_peft_config_loaded"):
        root.__dict__["_hf_peft_config_loaded"] = True


def put_in_force(layer: BaseTunerLayer, names: Sequence[str]) -> None:
    """Let adapters by these names work in a layer of another method, and no others; none is the base."""
    layer.set_adapter(list(names), inference_mode=True)
    if not isinstance(layer, LoraLayer):
        layer._disable_adapters = not names  # BOFT without adapters differs from the base in the last bit


def remove_method(model: nn.Module, names: Sequence[str]) -> None:
    """Take adapters of other methods off a model; layers that hold none after are the base's own again."""
    root = bare_model(model)
    for layer in other_layers(root):
        for name in names:
            if name in adapters_of(layer):
                # PEFT would put another one in force, which nobody asked for
                put_in_force(layer, [active for active in layer.active_adapters if active != name])
                layer.delete_adapter(name)
    for module in list(root.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, BaseTunerLayer) and not adapters_of(child):
                setattr(module, child_name, child.get_base_layer())
    configs: dict[str, PeftConfig] = root.__dict__.get("peft_config", {})
    for name in names:
        configs.pop(name, None)
    if not configs and "peft_config" in root.__dict__:  # else PEFT takes the next adapter for a second one
        del root.__dict__["peft_config"]
        if hasattr(root, "_hf_peft_config_loaded"):
            root.__dict__["_hf_peft_config_loaded"] = False


def method_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return an adapter's tensors by their names in the model, as its file names them."""
    state: dict[str, Tensor] = get_peft_model_state_dict(
        bare_model(model),
        adapter_name=adapter_name,
        save_embedding_layers=False,  # else PEFT asks the Hub
    )
    return dict(sorted(state.items()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what PEFT says of kernels, initial values and second adapters to itself: none of it is amiss."""
    with warnings.catch_warnings():
        for message in (
            "Failed to load the CUDA",
            "Setting boft_n_butterfly",
            "The symmetric",
            "Already found",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield

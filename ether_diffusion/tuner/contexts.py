"""What is switched on for a while on every ETHER layer of a model, and put back after."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.reflections import wide, with_rows
from ether_diffusion.tuner.hooked import is_hooked, lies_on_disk, weight_of
from ether_diffusion.tuner.linear import EtherLinear, Mixture
from ether_diffusion.tuner.other_layers import adapters_of, check_strengths, chosen_others, other_layers
from ether_diffusion.tuner.quantized import is_plain


@contextmanager
def prepared_adapters(model: nn.Module) -> Iterator[None]:
    """Normalise the active adapters' vectors of all layers at once, instead of layer by layer.

    Put it around one forward and its backward: the vectors must not change inside, and the backward of what
    ran inside belongs inside too. The result is the same; narrow layers become faster (docs/speed.md).
    """
    layers = _ether_layers(model)
    # where hooks change the weights' dtype or device, or bring them, for a call, rows are made in that call
    layers = [] if lies_on_disk(model) else [each for each in layers if _is_at_hand(each.base_linear)]
    keyed: dict[torch.dtype, list[tuple[EtherLinear, str]]] = {}
    for layer in layers:
        weight = layer.base_linear.weight
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        keyed.setdefault(dtype, []).extend((layer, name) for name in layer.active_scales())
    before = [layer.prepared_rows for layer in layers]
    try:
        for layer in layers:
            layer.prepared_rows = {}
        for dtype, pairs in keyed.items():
            made = with_rows([layer.vectors(name) for layer, name in pairs], dtype)
            for (layer, name), sides in zip(pairs, made, strict=True):
                layer.prepared_rows[name] = sides
        yield
    finally:
        for layer, rows in zip(layers, before, strict=True):
            layer.prepared_rows = rows


def _is_at_hand(linear: nn.Linear) -> bool:
    return is_plain(linear) and not is_hooked(linear)


@contextmanager
def chosen_adapters(model: nn.Module, strengths: Mapping[str, float]) -> Iterator[None]:
    """Run with these adapters at these scales and no others, of any method; {} is the base.

    Raises:
        ValueError: a name is unknown, a scale is not finite or not one of the method's, or adapters are
            merged.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    _check_names(layers, strengths)
    _check_unmerged(layers, "chosen_adapters")
    if not all(map(math.isfinite, strengths.values())):
        raise ValueError(f"chosen_adapters needs finite scales; found {dict(strengths)}")
    check_strengths(model, strengths)
    with chosen_others(other_layers(model), strengths), _chosen_ours(layers, strengths):
        yield


@contextmanager
def _chosen_ours(layers: Sequence[BaseTunerLayer], strengths: Mapping[str, float]) -> Iterator[None]:
    ours = [layer for layer in layers if isinstance(layer, EtherLinear)]
    # past set_adapter and enable_adapters, which also decide which parameters take gradients
    disabled = [layer._disable_adapters for layer in ours]
    before = [(layer._active_adapter, layer.scales) for layer in ours]
    try:
        for layer in ours:
            layer._disable_adapters = False
            layer._active_adapter = [name for name in strengths if name in layer.r]  # type: ignore[assignment]
            layer.scales = layer.scales | {
                name: [float(scale)] for name, scale in strengths.items() if name in layer.r
            }
        yield
    finally:
        for layer, flag in zip(ours, disabled, strict=True):
            layer._disable_adapters = flag
        for layer, (active, scales) in zip(ours, before, strict=True):
            layer._active_adapter, layer.scales = active, scales


@contextmanager
def mixed_adapters(
    model: nn.Module,
    names: Sequence[str | None],
    *,
    scales: Sequence[float] | None = None,
    repeats: bool = True,
) -> Iterator[None]:
    """Give each sample of the batches run inside its own adapter; None, or a scale of 0, is the base.

    Sample i is computed with W + scales[i] (W' of names[i] - W), whatever adapters are otherwise active. A
    batch may hold the samples several times over, one set after the other, as classifier-free guidance does,
    unless `repeats` is False.
    Inference only: no gradient reaches the adapters, and they must not change inside.

    Raises:
        ValueError: no adapter is attached, a name is unknown, scales do not pair with names or are not
            finite, adapters are merged, or the base's blocks lie on disk.
    """
    layers = _ether_layers(model)
    scales = [1.0] * len(names) if scales is None else list(scales)
    _check_mixture(layers, names, scales)
    if lies_on_disk(model):
        raise ValueError(
            "mixed_adapters needs the base's weights, and whole blocks of them lie on disk (group "
            "offloading); offload to memory, or leaf by leaf"
        )
    before = [layer.mixture for layer in layers]
    try:
        for layer in layers:
            layer.mixture = _mixture(layer, names, scales)._replace(repeats=repeats)
        yield
    finally:
        for layer, mixture in zip(layers, before, strict=True):
            layer.mixture = mixture


def _ether_layers(model: nn.Module) -> list[EtherLinear]:
    layers = [module for module in model.modules() if isinstance(module, EtherLinear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} carries no ETHER adapter; add or load one first")
    return layers


def _check_mixture(layers: list[EtherLinear], names: Sequence[str | None], scales: Sequence[float]) -> None:
    if not names:
        raise ValueError("mixed_adapters needs one adapter name (or None) per sample; found none")
    _check_names(layers, [name for name in names if name is not None])
    if len(scales) != len(names) or not all(map(math.isfinite, scales)):
        raise ValueError(
            f"mixed_adapters needs {len(names)} finite scales, one per name; found {list(scales)}"
        )
    _check_unmerged(layers, "mixed_adapters")


def _check_names(layers: Iterable[BaseTunerLayer], names: Iterable[str]) -> None:
    known = {name for layer in layers for name in adapters_of(layer)}
    unknown = sorted(set(names) - known)
    if unknown:
        loaded = ", ".join(sorted(known)) or "none"
        raise ValueError(f"no adapter named {', '.join(unknown)}; loaded are {loaded}")


def _check_unmerged(layers: Iterable[BaseTunerLayer], purpose: str) -> None:
    if any(layer.merged for layer in layers):
        raise ValueError(f"adapters are merged into the base; unmerge (unfuse) before {purpose}")


@torch.no_grad()
def _mixture(layer: EtherLinear, names: Sequence[str | None], scales: Sequence[float]) -> Mixture:
    weight = weight_of(layer.base_linear)
    base = wide(weight)
    pairs = {name: layer.factors(name, base) for name in set(names) if name in layer.r}
    rank = max((len(down) for down, _ in pairs.values()), default=1)
    nothing = base.new_zeros(rank, layer.in_features), base.new_zeros(layer.out_features, rank)

    def padded(name: str | None, scale: float) -> tuple[Tensor, Tensor]:
        down, up = pairs.get(name, nothing) if name is not None else nothing
        missing = rank - len(down)
        return F.pad(down, (0, 0, 0, missing)), F.pad(up * scale, (0, missing))

    stacked = [padded(name, scale) for name, scale in zip(names, scales, strict=True)]
    return Mixture(
        torch.stack([down for down, _ in stacked]).to(weight.dtype),
        torch.stack([up for _, up in stacked]).to(weight.dtype),
    )

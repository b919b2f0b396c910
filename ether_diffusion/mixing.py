"""Several adapters as one: a LoRA of the same W' as all of them at their strengths together."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ether_diffusion.adapters import Adapter, AdapterMetadata, AdapterPart, attach, fingerprint
from ether_diffusion.adapters.methods import method_of, name_of
from ether_diffusion.adapters.models import name_of_base
from ether_diffusion.export import Base, adapted_weights, changed_models
from ether_diffusion.tuner import EtherConfig, chosen_adapters
from ether_diffusion.wording import printable

_WHOLE = ("OFT", "BOFT", "IA3")  # whose update has the rank of its Linear
_SPARE = 8  # columns that a random projection has beyond the rank


class Ingredient(NamedTuple):
    """An adapter of a mix by its name, and its strength there."""

    name: str
    adapter: Adapter
    strength: float


def mix_adapters(ingredients: Sequence[Ingredient], base: Base, *, rebake: bool = False) -> Adapter:
    """Return one adapter that draws on a base as all of these do together, each at its strength.

    It is a LoRA: the update W' - W of every Linear is computed by the layers that draw the mix, and is
    written as factors of as many ranks as theirs together, which is exact up to rounding. Adapters of
    OFT, BOFT and IA³ make it as large as the weights, as their updates are of full rank. `base` is a
    pipeline, or a denoiser by itself; with `rebake` it may have other weights than those that an adapter was
    trained on.

    Raises:
        ValueError: there are fewer than two, one follows control images, has no such strength or does not fit
            the base.
    """
    if len(ingredients) < 2:
        raise ValueError(f"a mix is of two adapters or more; found {len(ingredients)}")
    for name, adapter, strength in ingredients:
        if adapter.encoder is not None:
            raise ValueError(f"{name} follows control images, which no LoRA does; leave it out")
        if not method_of(adapter.config).has_strengths and strength not in (0, 1):
            what = f"{name} is an adapter of {adapter.method}, which has no strengths between or beyond"
            raise ValueError(f"{what}; found {strength:g}, use 1 as trained or 0 the base")
    methods = {name: method_of(adapter.config).title for name, adapter, _ in ingredients}
    if len({*methods.values()}) > 1 and "HRA" in methods.values():
        shown = ", ".join(f"{name} ({title})" for name, title in methods.items())
        raise ValueError(f"HRA reads the weights past adapters of other methods; found {shown}")
    found = dict[str, dict[str, Tensor]]()
    for _, adapter, _ in ingredients:
        for component, model in changed_models(base, adapter).items():
            weights = adapted_weights(adapter.parts[component], model, rebake=rebake)
            found.setdefault(component, {}).update(weights)
    named = sorted(found, key=lambda component: component != "unet")
    return Adapter({component: _mixed(ingredients, component, found[component], base) for component in named})


def _mixed(
    ingredients: Sequence[Ingredient], component: str, weights: dict[str, Tensor], base: Base
) -> AdapterPart:
    """Return the part of a mix that one component takes, whose weights are given by module."""
    own = [
        (each.adapter.parts[component], each.strength)
        for each in ingredients
        if component in each.adapter.parts
    ]
    factors = {name: _factors(own, name, weight) for name, weight in sorted(weights.items())}
    rank = max(len(down) for down, _ in factors.values())
    tensors = dict[str, Tensor]()
    for name, (down, up) in factors.items():
        tensors[f"{name}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, rank - len(down)))
        tensors[f"{name}.lora_B.weight"] = nn.functional.pad(up, (0, rank - len(down)))
    base_model = name_of_base(base) or own[0][0].metadata.base_model
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(factors), base_model_name_or_path=base_model,
        inference_mode=True,
    )  # fmt: skip
    triggers = dict.fromkeys(filter(None, (each.adapter.metadata.trigger for each in ingredients)))
    made_of = {
        f"mix_of_{number}": f"{printable(name)} at {strength:g}: {adapter.method}, "
        + ", ".join(f"{part} {sha256[:16]}" for part, sha256 in adapter.hashes.items())
        for number, (name, adapter, strength) in enumerate(ingredients, 1)
    }
    metadata = AdapterMetadata(
        base_model=base_model,
        base_fingerprint=fingerprint(weights),
        trigger=", ".join(triggers) or None,
        training=made_of,
    )
    return AdapterPart(config, tensors, metadata)


@torch.no_grad()
def _factors(own: Sequence[tuple[AdapterPart, float]], name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ΔW of one Linear as factors A (rank, in) and B (out, rank) of equal norms."""
    width = weight.shape[1]
    holder = nn.ModuleDict({"layer": nn.Linear(width, len(weight), bias=False)})
    holder["layer"].weight = nn.Parameter(weight.detach().to("cpu", torch.float32), requires_grad=False)
    before, rank, strengths = holder["layer"].weight.double(), 0, dict[str, float]()
    for number, (part, strength) in enumerate(own):
        ends = part.modules().get(name)
        if ends is not None:
            tensors = {f"layer.{end}": part.tensors[f"{name}.{end}"] for end in ends}
            config = copy.copy(part.config)
            config.target_modules, config.auto_mapping = ["layer"], None
            attach(holder, Adapter({"unet": AdapterPart(config, tensors)}), adapter_name=f"a{number}")
            strengths[f"a{number}"] = strength
            rank += _rank(part, ends, width)
    with chosen_adapters(holder, strengths):
        update = holder["layer"](torch.eye(width)).t().double() - before
    rank = min(rank, *weight.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(update, q=min(rank + _SPARE, *weight.shape))
    roots = values[:rank].sqrt()
    return (right[:, :rank] * roots).t().float().contiguous(), (left[:, :rank] * roots).float().contiguous()


def _rank(part: AdapterPart, ends: dict[str, tuple[int, ...]], width: int) -> int:
    """Return the rank of an adapter's update of a Linear at most."""
    if isinstance(part.config, EtherConfig):  # one for each block of u, and of v
        return sum(shape[0] for shape in ends.values())
    return width if name_of(part.config) in _WHOLE else int(part.config.r)

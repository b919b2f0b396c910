"""Adapters by the thousand on one model: vectors stay in memory, factors of those in use in a few slots."""

import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ether_diffusion import reflections
from ether_diffusion.adapters.format import Adapter, AdapterPart, BaseFingerprint
from ether_diffusion.adapters.methods import title_of
from ether_diffusion.adapters.models import (
    TEXT_ENCODERS,
    Match,
    base_fingerprint,
    check_fit,
    find_parts,
    plain_modules,
)
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.tuner.hooked import weight_of
from ether_diffusion.wording import listed

Choice = Mapping[str, float]
"""Adapters of one row by name, with the strength of each; {} is the base."""
MAX_ADAPTERS = 4
"""Of one picture."""
Factors = dict[str, tuple[Tensor, Tensor]]
"""A (r, in) and B (out, r) of each adapted module: W' = W + B A."""


class Group(NamedTuple):
    """Rows of a batch whose updates of one Linear have one rank: rows (g,), A (g, r, in), B (g, out, r).

    Rows are never filled up to the rank of others: a sum over zeros has another rounding, and what is drawn
    must not depend on who else is in the batch.
    """

    rows: Tensor
    down: Tensor
    up: Tensor


class AdapterBank:
    """Adapters of ETHER, ETHER+ and LoRA for one frozen model, whose rows each take their own.

    Attributes:
        counts: of "hits" and "fills" of slots, and of "evictions".
        fill_seconds: spent on filling slots.
    """

    def __init__(self, model: nn.Module, *, num_slots: int) -> None:
        """Watch the Linears of a model; nothing is added to it but hooks.

        Args:
            num_slots: of how many adapters factors are kept; the least recently used one goes.
        """
        self.model, self.num_slots = model, num_slots
        self.counts, self.fill_seconds = Counter[str](), 0.0
        self._linears = {n: m for n, m in plain_modules(model).items() if isinstance(m, nn.Linear)}
        self._parts: dict[str, AdapterPart] = {}
        self._slots: OrderedDict[str, Factors] = OrderedDict()
        self._groups: dict[str, list[Group]] = {}
        self._hooked: set[str] = set()
        self._fingerprints: dict[tuple[str, ...], BaseFingerprint | None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def add(self, name: str, part: AdapterPart) -> Match:
        """Keep an adapter by a name, and say how its base compares; its factors are computed when it is used.

        Raises:
            ValueError: it does not fit the model, or is of a method whose update is not of low rank.
        """
        config = part.config
        if not isinstance(config, EtherConfig | LoraConfig) or getattr(config, "use_dora", False):
            raise ValueError(f"{name} is of {title_of(config)}; served are ETHER, ETHER+ and LoRA")
        match = check_fit(self.model, part, None, self._fingerprint_of).match
        foreign = sorted(part.modules().keys() - self._linears.keys())
        if foreign:
            raise ValueError(f"{name} changes {foreign[0]}, which is no Linear; served are adapters of those")
        self._parts[name] = part
        for module in part.modules().keys() - self._hooked:
            self._hooked.add(module)
            self._linears[module].register_forward_hook(_Update(self._groups, module))
        return match

    def _fingerprint_of(self, model: nn.Module, names: list[str]) -> BaseFingerprint | None:
        if (key := tuple(names)) not in self._fingerprints:
            self._fingerprints[key] = base_fingerprint(model, names)
        return self._fingerprints[key]

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        del self._parts[name]
        self._slots.pop(name, None)

    @torch.no_grad()
    def use(self, rows: Sequence[Choice]) -> None:
        """Let the rows of the next batches take these adapters, until told otherwise.

        Raises:
            KeyError: one is not there.
            ValueError: they are more than there are slots.
        """
        present = [{n: s for n, s in row.items() if s and n in self._parts} for row in rows]
        wanted = dict.fromkeys(name for row in present for name in row)
        if len(wanted) > self.num_slots:
            raise ValueError(
                f"found {len(wanted)} adapters in one batch, and there are {self.num_slots} slots"
            )
        self._groups.clear()  # or the base's weights would be looked at through the updates
        factors = {name: self._slot(name, wanted) for name in wanted}
        for module in dict.fromkeys(module for each in factors.values() for module in each):
            self._groups[module] = list(_grouped(module, present, factors))

    def _slot(self, name: str, wanted: Iterable[str]) -> Factors:
        if name in self._slots:
            self.counts["hits"] += 1
            self._slots.move_to_end(name)
            return self._slots[name]
        while len(self._slots) >= self.num_slots:
            self._slots.pop(next(each for each in self._slots if each not in wanted))
            self.counts["evictions"] += 1
        began = time.perf_counter()
        self._slots[name] = self._factors(self._parts[name])
        self.fill_seconds += time.perf_counter() - began
        self.counts["fills"] += 1
        return self._slots[name]

    def _factors(self, part: AdapterPart) -> Factors:
        found = {}
        if isinstance(part.config, EtherConfig):
            for name, transform in part.projections().items():
                weight = weight_of(self._linears[name])
                wide = reflections.wide(weight)
                (rows,) = reflections.with_rows([transform.to(wide.device)], wide.dtype)
                down, up = reflections.factors(wide, *rows)
                found[name] = down.to(weight.dtype), up.to(weight.dtype)
            return found
        for name in part.modules():
            weight = weight_of(self._linears[name])
            down, up = (part.tensors[f"{name}.lora_{side}.weight"].to(weight) for side in "AB")
            found[name] = down, up * _lora_scale(part.config, name, len(down))
        return found


class MixedAdapters:
    """Banks of a pipeline's denoiser and text encoders: every row takes its own adapters."""

    def __init__(self, pipeline: Any, num_slots: int) -> None:
        parts = [each for each in find_parts(pipeline) if each.component in ("unet", *TEXT_ENCODERS)]
        self.banks = {part.component: AdapterBank(part.model, num_slots=num_slots) for part in parts}
        self._num_slots, self._used = num_slots, list[Choice]()

    def add(self, name: str, adapter: Adapter) -> Match:
        """Keep an adapter by a name, and say how its base compares.

        Raises:
            ValueError: it does not fit the models, or is of a method that is not served.
        """
        lacking = listed(part for part in adapter.parts if part not in self.banks)
        if lacking:
            raise ValueError(f"{adapter.name} holds an adapter of {lacking}, which is not served")
        self._used = []
        found = [self.banks[part].add(name, own) for part, own in adapter.parts.items()]
        return max(found, key=("same", "unknown", "other weights").index)

    def remove(self, name: str) -> None:
        """Forget an adapter; its name may come to stand for another."""
        self._used = []
        for bank in self.banks.values():
            if name in bank:
                bank.remove(name)

    def check(self, rows: Sequence[Choice]) -> None:
        """Refuse rows of one picture that take too many adapters.

        Raises:
            ValueError: as said.
        """
        named, most = {name for row in rows for name in row}, min(MAX_ADAPTERS, self._num_slots)
        if len(named) > most:
            raise ValueError(f"found {len(named)} adapters for one picture; at most {most} are taken")

    def takes(self, pictures: Sequence[Sequence[Choice]]) -> bool:
        """Say whether pictures can be drawn together: whether there are slots for their rows' adapters."""
        return len({name for rows in pictures for row in rows for name in row}) <= self._num_slots

    def kind(self, choice: Choice) -> object:
        """Return by what rows are told apart that cannot go through the denoiser at once: all can."""

    def use_for_texts(self, choice: Choice) -> None:
        """Let the text encoders take these adapters."""
        for part, bank in self.banks.items():
            if part != "unet":
                bank.use([choice])

    def use(self, rows: Sequence[Choice]) -> None:
        """Let the rows of the next batches take these adapters, until told otherwise."""
        if list(rows) != self._used:
            self._used = []
            self.banks["unet"].use(rows)
            self._used = list(rows)


class _Update:
    """A forward hook of one Linear that adds the rows' updates to what it gives."""

    def __init__(self, groups: Mapping[str, list[Group]], module: str) -> None:
        self._groups, self._module = groups, module

    def __call__(self, linear: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        x = inputs[0]
        for rows, down, up in self._groups.get(self._module, ()):
            tokens, before = x[rows].flatten(1, -2), y[rows]
            along = torch.bmm(tokens.to(down.dtype), down.transpose(1, 2))
            added = torch.baddbmm(before.flatten(1, -2), along, up.transpose(1, 2)).view(before.shape)
            y = y.index_copy(0, rows, added)
        return y


def _grouped(module: str, rows: Sequence[Choice], factors: Mapping[str, Factors]) -> Iterable[Group]:
    by_rank: dict[int, list[tuple[int, Tensor, Tensor]]] = {}
    for index, row in enumerate(rows):
        pairs = [(*factors[name][module], s) for name, s in row.items() if module in factors[name]]
        if pairs:
            down = torch.cat([down for down, _, _ in pairs])
            up = torch.cat([up * strength for _, up, strength in pairs], dim=1)
            by_rank.setdefault(len(down), []).append((index, down, up))
    for found in by_rank.values():
        indices, downs, ups = zip(*found, strict=True)
        where = torch.tensor(indices, device=downs[0].device)
        yield Group(where, torch.stack(downs), torch.stack(ups))


def _lora_scale(config: Any, module: str, rank: int) -> float:
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), module), config.lora_alpha)
    return float(alpha / (rank**0.5 if config.use_rslora else rank))

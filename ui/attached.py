"""Adapters of the library in the one pipeline: loaded when they are asked for, and bounded in number."""

import itertools
import re
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from ether_diffusion.adapters import Adapter, read_adapter
from ether_diffusion.adapters.methods import name_of
from ether_diffusion.adapters.models import find_parts
from ether_diffusion.tuner.other_layers import adapters_of
from ether_diffusion.wording import printable

MAX_LOADED = 16
MAX_NAME = 80
_DOUBTS = {
    "other weights": "{} was made for another base of this architecture; results may differ.",
    "unknown": "{} does not say which base it was made for; its shapes fit.",
}
_Stamp = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class _Loaded:
    """An adapter in the pipeline under a name there, the files it came from, and how its base compares."""

    name: str
    stamp: _Stamp
    match: str
    method: str | None
    """As PEFT names it; None of a control encoder by itself."""


class AttachedAdapters:
    """Holds the adapters that were used last, none of them in force; calls choose among them."""

    def __init__(self, pipeline: Any, *, max_loaded: int = MAX_LOADED) -> None:
        self._pipeline, self._max_loaded = pipeline, max_loaded
        self._loaded: dict[str, _Loaded] = {}  # the least recently used first

    @property
    def ids(self) -> tuple[str, ...]:
        """What is loaded, the least recently used first."""
        return tuple(self._loaded)

    def attach(self, adapter_id: str, folder: Path, name: str, *, keep: Collection[str]) -> str:
        """Load an adapter that is not, under a name for people, and return its name in the pipeline.

        Raises:
            FileNotFoundError, ValueError: it is not whole, or not of this base; the others stay.
        """
        files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
        stamp = tuple((str(path.relative_to(folder)), s.st_mtime_ns, s.st_size) for path, s in files)
        if adapter_id in self._loaded and self._loaded[adapter_id].stamp != stamp:
            self._unload(adapter_id)  # it was renamed, or is another by now
        if adapter_id not in self._loaded:
            adapter = read_adapter(folder)
            method = name_of(adapter.config) if adapter.parts else None
            self._make_room(method, keep)
            name = self._free_name(name)
            self._loaded[adapter_id] = _Loaded(name, stamp, self._load(name, adapter), method)
        self._loaded[adapter_id] = self._loaded.pop(adapter_id)
        return self._loaded[adapter_id].name

    def doubts(self, ids: Collection[str], *, allow_other_base: bool) -> list[str]:
        """Return sentences on adapters that may not be for this base.

        Raises:
            ValueError: one is for other weights, which was not allowed.
        """
        found = [(printable(one.name), one.match) for one in (self._loaded[each] for each in ids)]
        others = [name for name, match in found if match == "other weights"]
        if others and not allow_other_base:
            raise ValueError(
                f"{others[0]} was made for a base of the same architecture with other weights than this one; "
                "results may differ: it is used only where that is allowed expressly"
            )
        return [_DOUBTS[match].format(name) for name, match in found if match in _DOUBTS]

    def num_touched(self, names: Iterable[str]) -> int:
        """Return how many modules of the models carry at least one adapter of these names in the pipeline."""
        wanted = set(names)
        layers = [m for part in find_parts(self._pipeline) for m in part.model.modules()]
        return sum(isinstance(m, BaseTunerLayer) and bool(wanted & {*adapters_of(m)}) for m in layers)

    def _load(self, name: str, adapter: Adapter) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the one on other weights, which `doubts` says in its own words
            follows = adapter.encoder is not None
            load = self._pipeline.load_control_weights if follows else self._pipeline.load_adapter_weights
            report = load(adapter, adapter_name=name, activate=False)
        return "unknown" if report is None else str(report.base_match)  # an encoder by itself says nothing

    def _free_name(self, name: str) -> str:
        """Return a name that is no other adapter's and no part's of a model."""
        models = [part.model for part in find_parts(self._pipeline)]
        taken = {word for model in models for path, _ in model.named_modules() for word in path.split(".")}
        taken |= {one.name for one in self._loaded.values()}
        plain = re.sub(r"[.\x00-\x1f\x7f]+", "_", name)[:MAX_NAME].strip() or "adapter"
        candidates = itertools.chain([plain], (f"{plain} ({n})" for n in itertools.count(2)))
        return next(candidate for candidate in candidates if candidate not in taken)

    def _make_room(self, method: str | None, keep: Collection[str]) -> None:
        """Unload adapters of other methods, and those used longest ago where there are too many."""
        spare = [each for each in self._loaded if each not in keep]
        if method is not None:
            for each in [each for each in spare if self._loaded[each].method not in (None, method)]:
                spare.remove(each)
                self._unload(each)
        for each in spare[: max(0, len(self._loaded) + 1 - self._max_loaded)]:
            self._unload(each)

    def _unload(self, adapter_id: str) -> None:
        self._pipeline.unload(self._loaded.pop(adapter_id).name)

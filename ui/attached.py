"""Adapters of the library in the one pipeline: loaded when they are asked for, and bounded in number."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ether_diffusion.adapter_file.parts import find_parts
from ether_diffusion.adapter_file.wording import printable
from ether_diffusion.control import holds_control
from ether_diffusion.tuner import EtherLayer

MAX_LOADED = 16

_Stamp = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class _Loaded:
    """An adapter in the pipeline: the files that it came from, and whether they were made for this base."""

    stamp: _Stamp
    base_match: str


class AttachedAdapters:
    """Holds the adapters that were used last, none of them in force; calls choose among them."""

    def __init__(self, pipeline: Any, *, max_loaded: int = MAX_LOADED) -> None:
        self._pipeline = pipeline
        self._max_loaded = max_loaded
        self._loaded: dict[str, _Loaded] = {}  # the least recently used first

    @property
    def names(self) -> tuple[str, ...]:
        """What is loaded, the least recently used first."""
        return tuple(self._loaded)

    def attach(self, folders: Mapping[str, Path], *, allow_other_base: bool) -> list[str]:
        """Load the adapters that are not, from folders by library id; return sentences on what is doubtful.

        Raises:
            FileNotFoundError, ValueError: one is not whole, or not one of this base; the others stay.
        """
        for name, folder in folders.items():
            stamp = _stamp(folder)
            if name in self._loaded and self._loaded[name].stamp != stamp:  # another under the same id
                self._unload(name)
            if name not in self._loaded:
                self._make_room(keep=folders)
                self._loaded[name] = _Loaded(stamp, self._load(name, folder))
            self._loaded[name] = self._loaded.pop(name)
        matches = {name: self._loaded[name].base_match for name in folders}
        others = [name for name, match in matches.items() if match == "other weights"]
        if others and not allow_other_base:
            raise ValueError(
                f"{printable(others[0])} was made for a base of the same architecture with other "
                "weights than this one; results may differ: it is used only where that is allowed expressly"
            )
        return [_DOUBTS[match].format(printable(name)) for name, match in matches.items() if match in _DOUBTS]

    def num_touched(self, names: Iterable[str]) -> int:
        """Return how many modules of the models carry at least one of these adapters."""
        wanted = set(names)
        layers = [m for part in find_parts(self._pipeline, None) for m in part.model.modules()]
        return sum(isinstance(layer, EtherLayer) and bool(wanted & set(layer.r)) for layer in layers)

    def _load(self, name: str, folder: Path) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the one on other weights, which `attach` says in its own words
            if not holds_control(folder):
                report = self._pipeline.load_ether_weights(folder, adapter_name=name, activate=False)
                return str(report.base_match)
            report = self._pipeline.load_control_weights(folder, adapter_name=name, activate=False)
        if report is None:
            self._pipeline.unload(name)
            raise ValueError(f"{printable(name)} is a control encoder without its adapter; import both")
        return str(report.base_match)

    def _make_room(self, *, keep: Iterable[str]) -> None:
        spare = [name for name in self._loaded if name not in set(keep)]
        for name in spare[: max(0, len(self._loaded) + 1 - self._max_loaded)]:
            self._unload(name)

    def _unload(self, name: str) -> None:
        del self._loaded[name]
        self._pipeline.unload(name)


_DOUBTS = {
    "other weights": "{} was made for another base of this architecture; results may differ.",
    "unknown": "{} does not say which base it was made for; its shapes fit.",
}


def _stamp(folder: Path) -> _Stamp:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = [(path, path.stat()) for path in files]
    return tuple((str(path.relative_to(folder)), s.st_mtime_ns, s.st_size) for path, s in found)

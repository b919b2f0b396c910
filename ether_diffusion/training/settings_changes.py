"""What differs between the settings a run was begun with and those it is to go on with."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import DEFAULT_STEPS, ControlRunConfig
from ether_diffusion.training.photos import compare_fingerprints
from ether_diffusion.wording import listed, printable

Fingerprints = Mapping[str, Mapping[str, str]]

SPLIT = ("train_batch_size", "gradient_accumulation_steps", "num_processes")
"""Settings that may change as long as their product, the photos of an update, stays."""

FORM = frozenset({"adapter", "num_blocks", "rank", "sides", "target_modules", "train_text_encoder"})
"""Settings that decide which tensors are trained: one run cannot have two values of them."""

_NONE = object()


@dataclass(frozen=True)
class Changes:
    """Lines on what differs: what may, and what makes it another run; names of what makes another adapter."""

    allowed: tuple[str, ...]
    refused: tuple[str, ...]
    of_form: tuple[str, ...]


def compare_settings(
    before: Mapping[str, Json], now: Mapping[str, Json], prints_before: Fingerprints, prints_now: Fingerprints
) -> Changes:
    """Return a line for each setting and group of files that differs; settings of one side are allowed."""
    allowed: list[str] = []
    refused: list[str] = []
    names = before.keys() | now.keys()
    differing = [name for name in sorted(names) if before.get(name, _NONE) != now.get(name, _NONE)]
    width = max(map(len, differing), default=0)
    for name in differing:
        line = f"{name:{width}}  {_value(before, name)} -> {_value(now, name)}"
        (allowed if _may_change(name, before, now) else refused).append(line)
    refused += _file_changes(prints_before, prints_now)
    is_changed = before.keys() & now.keys() & FORM & set(differing)
    return Changes(tuple(allowed), tuple(refused), tuple(sorted(is_changed)))


def _may_change(name: str, before: Mapping[str, Json], now: Mapping[str, Json]) -> bool:
    if name in SPLIT:
        return _effective_batch(before) == _effective_batch(now)
    if name not in before or name not in now:  # an option that another release has or had
        return True
    if name == "max_train_steps":
        by_epochs = before.get("num_train_epochs") or now.get("num_train_epochs")
        old, new = before[name] or DEFAULT_STEPS, now[name] or DEFAULT_STEPS
        return not by_epochs and isinstance(old, int) and isinstance(new, int) and new >= old
    declared = ControlRunConfig.options().get(name)
    return declared is not None and declared.free


def _effective_batch(settings: Mapping[str, Json]) -> int:
    return math.prod(value for name in SPLIT if isinstance(value := settings.get(name), int))


def _file_changes(before: Fingerprints, now: Fingerprints) -> Iterator[str]:
    for group in sorted(before.keys() | now.keys()):
        changes = compare_fingerprints(before.get(group, {}), now.get(group, {}))
        words = {"new": changes.added, "gone": changes.removed, "changed": changes.changed}
        found = [f"{word} {listed(names)}" for word, names in words.items() if names]
        if found:
            yield f"{group}: {'; '.join(found)}"


def _value(settings: Mapping[str, Json], name: str) -> str:
    return printable(settings[name]) if name in settings else "not recorded"

"""The adapters that a command draws with, of any method: read and checked before anything slow is loaded."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ether_diffusion.adapters import AdapterMetadata
    from ether_diffusion.adapters.method_reader import AnyAdapter
    from ether_diffusion.pipelines.sampling import Sampling

# The library is imported inside the functions: `ether --help` must not wait for torch.


def read_chosen(arguments: argparse.Namespace) -> "list[AnyAdapter | None]":
    """Read the adapters before anything slow, so that a bad one costs no time.

    None stands for a control encoder by itself.

    Raises:
        FileNotFoundError, ValueError: one is not whole, or they are of methods that do not work together.
    """
    if arguments.base is None and not arguments.adapter:
        raise ValueError("found neither --base nor --adapter; give the base to draw with")
    wants_control = arguments.control_image is not None  # else the Hub is not asked for an encoder
    found = [read_one(adapter, wants_control=wants_control) for adapter in arguments.adapter]
    titles = {
        adapter: title
        for adapter, one in zip(arguments.adapter, found, strict=True)
        if (title := _title(one))
    }
    if len(set(titles.values())) > 1:
        shown = ", ".join(f"{adapter} ({title})" for adapter, title in titles.items())
        raise ValueError(f"adapters of two methods do not work together; found {shown}")
    return found


def read_one(adapter: str, *, wants_control: bool) -> "AnyAdapter | None":
    """Return the first component's adapter of a folder or hub id, None of a control encoder by itself.

    Raises:
        FileNotFoundError, ValueError: it is not whole.
    """
    from ether_diffusion.adapters.method_reader import read_any
    from ether_diffusion.control import holds_control, read_control_folder

    if (wants_control or Path(adapter).is_dir()) and holds_control(adapter):
        return read_control_folder(adapter)[1]
    return next(iter(read_any(adapter).values()))


def metadata_of(adapters: "Iterable[AnyAdapter | None]") -> "list[AdapterMetadata]":
    """Return what adapters say of themselves; an encoder by itself says nothing."""
    return [adapter.metadata for adapter in adapters if adapter is not None]


def check_strengths(sampling: "Sampling", names: list[str], adapters: "list[AnyAdapter | None]") -> None:
    """Refuse strengths that a method does not have, before anything is loaded.

    Raises:
        ValueError: as said.
    """
    from ether_diffusion.adapters.method_reader import MethodAdapter

    wanted = {name: {choice.get(name, 1.0) for choice in sampling.choices} for name in names}
    for name, adapter in zip(names, adapters, strict=True):
        if adapter is None and wanted[name] != {1.0}:
            raise ValueError(f"{name} is a control encoder by itself; use --control_strength, not --strength")
        if (
            isinstance(adapter, MethodAdapter)
            and not adapter.method.has_strengths
            and wanted[name] - {0.0, 1.0}
        ):
            raise ValueError(
                f"{name} is an adapter of {adapter.method.title}, which has no strengths; use 1 as trained "
                "or 0 the base"
            )


def _title(adapter: "AnyAdapter | None") -> str | None:
    from ether_diffusion.adapters.method_reader import MethodAdapter

    if adapter is None:
        return None
    return adapter.method.title if isinstance(adapter, MethodAdapter) else "ETHER"

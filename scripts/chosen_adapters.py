"""The adapters that a command draws with, of any method: read once, before anything slow is loaded."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ether_diffusion.adapters import Adapter, AdapterMetadata
    from ether_diffusion.pipelines.sampling import Sampling

# The library is imported inside the functions: `ether --help` must not wait for torch.


def read_chosen(arguments: argparse.Namespace) -> "list[Adapter]":
    """Read the adapters before anything slow, so that a bad one costs no time.

    Raises:
        FileNotFoundError, ValueError: one is not whole, or they are of methods that do not work together.
    """
    from ether_diffusion.adapters import read_adapter
    from ether_diffusion.adapters.methods import method_of

    if arguments.base is None and not arguments.adapter:
        raise ValueError("found neither --base nor --adapter; give the base to draw with")
    wants_control = True if arguments.control_image is not None else None  # else the Hub is not asked for it
    found = [read_adapter(adapter, with_encoder=wants_control) for adapter in arguments.adapter]
    titles = {
        adapter: method_of(one.config).title
        for adapter, one in zip(arguments.adapter, found, strict=True)
        if one.parts
    }
    if len(set(titles.values())) > 1:
        shown = ", ".join(f"{adapter} ({title})" for adapter, title in titles.items())
        raise ValueError(f"adapters of two methods do not work together; found {shown}")
    return found


def metadata_of(adapters: "Iterable[Adapter]") -> "list[AdapterMetadata]":
    """Return what adapters say of themselves; an encoder by itself says nothing."""
    return [adapter.metadata for adapter in adapters if adapter.parts]


def check_strengths(sampling: "Sampling", names: list[str], adapters: "list[Adapter]") -> None:
    """Refuse strengths that a method does not have, before anything is loaded.

    Raises:
        ValueError: as said.
    """
    from ether_diffusion.adapters.methods import method_of

    for name, adapter in zip(names, adapters, strict=True):
        wanted = {choice.get(name, 1.0) for choice in sampling.choices}
        if not adapter.parts and wanted != {1.0}:
            raise ValueError(f"{name} is a control encoder by itself; use --control_strength, not --strength")
        if adapter.parts and not method_of(adapter.config).has_strengths and wanted - {0.0, 1.0}:
            raise ValueError(
                f"{name} is an adapter of {adapter.method}, which has no strengths; use 1 as trained or 0 "
                "the base"
            )

"""load_ether and save_ether: adapters between files and pipelines or models."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from ether_diffusion.adapters.adapter import Adapter, AdapterMetadata, Fact
from ether_diffusion.adapters.attach import attach_adapter, detach_adapter
from ether_diffusion.adapters.fingerprint import BaseFingerprint, BaseMatch
from ether_diffusion.adapters.fit import check_targets, check_whole, check_widths
from ether_diffusion.adapters.models import (
    adapter_config,
    bare_model,
    base_fingerprint,
    ether_layers,
    name_of_base,
    shareable_name,
)
from ether_diffusion.adapters.parts import COMPONENTS, Part, Pipeline, find_parts
from ether_diffusion.adapters.reader import read_from, refuse_missing
from ether_diffusion.adapters.rollback import unchanged_on_failure
from ether_diffusion.adapters.source import CONFIG_NAME, Source, find_source
from ether_diffusion.adapters.writer import check_writable, write_adapter
from ether_diffusion.wording import listed, printable

logger = logging.getLogger(__name__)


Match = BaseMatch | Literal["unknown"]


@dataclass(frozen=True)
class Fit:
    """How a model's base compares with an adapter's; `remark` is a clause where it is of other weights."""

    match: Match
    remark: str = ""


@dataclass(frozen=True)
class LoadReport:
    """What `load_ether` did.

    Attributes:
        num_projections: modules that carry the adapter now.
        base_match: whether the base is the one it was trained on; "unknown" where the file does not say.
        components: projections by component of the pipeline, or by class for a bare model.
    """

    adapter_name: str
    num_projections: int
    base_match: Match
    components: Mapping[str, int]


def load_ether(
    pipeline_or_model: Pipeline | nn.Module,
    path_or_hub_id: str | Path,
    *,
    adapter_name: str = "default",
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    require_same_base: bool = False,
    activate: bool = True,
    trainable: bool = False,
) -> LoadReport:
    """Load an adapter into a diffusers pipeline or a model, whole or not at all.

    Of a pipeline, the UNet (or transformer) takes the adapter in the folder itself, and every other component
    that in the subfolder of its name. Everything is checked before a model is touched, and a model is
    as before if anything fails. The new adapter alone is then active, as with PEFT and diffusers; use
    `set_adapters` to combine several.

    Args:
        path_or_hub_id: a folder, or a model of the Hugging Face Hub; what exists on disk is taken from there.
        require_same_base: refuse other base weights of the same architecture, instead of warning.
        activate: False leaves the adapters active that were.
        trainable: True gives the adapter gradients, to train it further.

    Raises:
        FileNotFoundError: there is no such folder, model or file.
        ValueError: the file is not a whole ETHER adapter, or not one of this model.
    """
    source = find_source(path_or_hub_id, revision=revision, local_files_only=local_files_only)
    parts = find_parts(pipeline_or_model, subfolder)
    if source.folder is not None:
        check_unused(pipeline_or_model, parts, source.folder / (subfolder or ""))
    found = _read_parts(parts, source, subfolder)
    matches = [
        _check_part(part, adapter, adapter_name, require_same_base=require_same_base)
        for part, adapter in found
    ]
    roots = [bare_model(part.model) for part, _ in found]
    with unchanged_on_failure(roots, adapter_name):
        for part, adapter in found:
            attach_adapter(part.model, adapter, adapter_name, activate=activate, trainable=trainable)
    components = {part.name: len(adapter.projections()) for part, adapter in found}
    return report_of(adapter_name, source, matches, components)


def save_ether(
    pipeline_or_model: Pipeline | nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    trigger: str | None = None,
    base_model: str | None = None,
    training: Mapping[str, Fact] | None = None,
) -> None:
    """Write an adapter that a pipeline or a model carries, in PEFT's layout; the inverse of `load_ether`.

    Args:
        base_model: name or path of the base for people; None takes the one that the model was loaded from.
        training: flat facts for the file's header and the model card, e.g. {"steps": 800}.

    Raises:
        ValueError: there is no such adapter, it cannot be read back, a component carries one of another
            method under that name, or `folder` holds the adapter of a component that this one lacks.
    """
    everything = find_parts(pipeline_or_model, None)
    _check_method(everything, adapter_name)
    # where none carries it, detach_adapter says of the first what it carries instead
    parts = [part for part in everything if ether_layers(part.model, adapter_name)] or everything[:1]
    adapters = []
    for part in parts:
        name = base_model or _base_name(pipeline_or_model, part.model, adapter_name)
        metadata = AdapterMetadata(base_model=name, trigger=trigger, training=dict(training or {}))
        adapters.append(detach_adapter(part.model, adapter_name, metadata=metadata))
        check_writable(adapters[-1])
    folder = Path(folder)
    _check_stale(folder, {part.subfolder for part in parts}, adapter_name)
    for part, adapter in zip(parts, adapters, strict=True):
        write_adapter(folder / (part.subfolder or ""), adapter, card=part.subfolder is None)


def _check_method(parts: list[Part], adapter_name: str) -> None:
    carried = [part for part in parts if ether_layers(part.model, adapter_name)]
    named = [part for part in parts if adapter_name in getattr(bare_model(part.model), "peft_config", {})]
    others = listed(part.name for part in named if part not in carried)
    if carried and others:
        raise ValueError(
            f"{adapter_name!r} is an adapter of another method in {others}, which would be left out; give "
            "each model to save by itself"
        )


def _read_parts(parts: list[Part], source: Source, subfolder: str | None) -> list[tuple[Part, Adapter]]:
    found = [(part, adapter) for part in parts if (adapter := read_from(source, part.subfolder)) is not None]
    if not found:
        refuse_missing(source, subfolder, CONFIG_NAME)
    return found


def check_unused(pipeline_or_model: Pipeline | nn.Module, parts: list[Part], folder: Path) -> None:
    """Say which adapters in a folder nothing is there to take: refused of a pipeline, told of a model.

    Raises:
        ValueError: as said.
    """
    there = {name for name in COMPONENTS if (folder / name / CONFIG_NAME).exists()}
    unused = listed(sorted(there - {part.name for part in parts}))
    if unused and not isinstance(pipeline_or_model, nn.Module):
        raise ValueError(
            f"{printable(folder)} holds an adapter of {unused}, which this pipeline lacks; load "
            "it into the pipeline it was made for"
        )
    if unused:
        warnings.warn(
            f"{printable(folder)} also holds an adapter of {unused}, which is not loaded; give the "
            "pipeline to load both",
            stacklevel=3,
        )


def report_of(
    adapter_name: str, source: Source, matches: list[Match], components: Mapping[str, int]
) -> LoadReport:
    """Return the report on what was loaded, and log it."""
    match = max(matches, key=("same", "unknown", "other weights").index)  # the worst of the components
    unchecked = (
        "; it carries no fingerprint, so its base was checked by shape only" if match == "unknown" else ""
    )
    total = sum(components.values())
    logger.info("loaded %s into %d projections%s", printable(source.name), total, unchecked)
    return LoadReport(adapter_name, total, match, components)


def _check_stale(folder: Path, written: set[str | None], adapter_name: str) -> None:
    there = {name for name in (None, *COMPONENTS) if (folder / (name or "") / CONFIG_NAME).exists()}
    stale = sorted(name or "the denoiser" for name in there - written)
    if stale:
        raise ValueError(
            f"{printable(folder)} holds adapters of {listed(stale)}, which {adapter_name!r} lacks; loading "
            "would mix the two: save into another folder"
        )


def _check_part(part: Part, adapter: Adapter, adapter_name: str, *, require_same_base: bool) -> Match:
    fit = check_fit(part.model, adapter, adapter_name)
    judge_fit(fit, require_same_base=require_same_base, stacklevel=4)
    return fit.match


def judge_fit(fit: Fit, *, require_same_base: bool, stacklevel: int) -> None:
    """Warn of a base of other weights, or refuse what is not the same where that is required.

    Raises:
        ValueError: it is not, or nothing says so.
    """
    if fit.match == "unknown" and require_same_base:
        raise ValueError(
            "the adapter carries no fingerprint of its base, which require_same_base needs; leave it out"
        )
    if fit.match == "other weights":
        if require_same_base:
            raise ValueError(f"{fit.remark}; load that base, or leave out require_same_base")
        warnings.warn(f"{fit.remark}, so results may differ", stacklevel=stacklevel)


def check_fit(model: nn.Module, adapter: Adapter, adapter_name: str) -> Fit:
    """Check that a model can take an adapter under a name, and say how its base compares; changes nothing.

    Raises:
        ValueError: it cannot: modules or widths are others, or the fingerprint is of another architecture.
    """
    made_for = printable(adapter.metadata.base_model or "an unnamed base")
    given = printable(name_of_base(model) or f"this {type(bare_model(model)).__name__}")
    check_targets(model, adapter, adapter_name, made_for=made_for, given=given)
    theirs = adapter.metadata.base_fingerprint
    if theirs is None:
        check_widths(model, adapter, made_for=made_for, given=given)
        check_whole(model, adapter, given=given)
        return Fit("unknown")
    ours = base_fingerprint(model, list(adapter.projections()))
    assert ours is not None
    made_for, given = f"{made_for} (fingerprint {theirs.id})", f"{given} ({ours.id})"
    check_widths(model, adapter, made_for=made_for, given=given)
    fit = compare_bases(theirs, ours, made_for=made_for, given=given)
    if fit.match != "same":
        check_whole(model, adapter, given=given)
    return fit


def compare_bases(theirs: BaseFingerprint, ours: BaseFingerprint, *, made_for: str, given: str) -> Fit:
    """Say how a base compares with the one that an adapter was trained on.

    Raises:
        ValueError: it is of another architecture.
    """
    match = theirs.compare(ours)
    if match == "other architecture":
        raise ValueError(
            f"the adapter was made for {made_for}, another architecture than {given}; "
            "load the base it was made for"
        )
    if match == "other weights":
        return Fit(
            match, f"the adapter was made for {made_for}; {given} has the same architecture and other weights"
        )
    return Fit(match)


def _base_name(pipeline_or_model: Pipeline | nn.Module, model: nn.Module, adapter_name: str) -> str | None:
    configured: str | None = adapter_config(model, adapter_name).base_model_name_or_path
    return shareable_name(configured) or name_of_base(pipeline_or_model) or name_of_base(model)

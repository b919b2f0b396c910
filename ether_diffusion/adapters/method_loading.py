"""load_any: adapters of ETHER and of the other methods that training saves, into pipelines and models."""

from pathlib import Path

from torch import nn

from ether_diffusion.adapters.loading import (
    LoadReport,
    check_unused,
    judge_fit,
    load_ether,
    report_of,
)
from ether_diffusion.adapters.method_attach import attach_method, check_method_fit, remove_method
from ether_diffusion.adapters.method_reader import MethodAdapter, read_any_from
from ether_diffusion.adapters.models import bare_model
from ether_diffusion.adapters.parts import Part, Pipeline, find_parts
from ether_diffusion.adapters.reader import refuse_missing
from ether_diffusion.adapters.rollback import unchanged_on_failure
from ether_diffusion.adapters.source import CONFIG_NAME, Source, find_source
from ether_diffusion.wording import printable


def load_any(
    pipeline_or_model: Pipeline | nn.Module,
    path_or_hub_id: str | Path,
    *,
    adapter_name: str = "default",
    revision: str | None = None,
    local_files_only: bool = False,
    require_same_base: bool = False,
    activate: bool = True,
) -> LoadReport:
    """Load an adapter of any method that training saves, as `load_ether` loads those of ETHER.

    These are ETHER, ETHER+, LoRA, OFT, BOFT, HRA and DeLoRA on Linears. Adapters of two methods do not work
    together in a model: the second is refused.

    Raises:
        FileNotFoundError: there is no such folder, model or file.
        ValueError: the file is not a whole adapter of such a method, or not one of this model.
    """
    source = find_source(path_or_hub_id, revision=revision, local_files_only=local_files_only)
    parts = find_parts(pipeline_or_model, None)
    found = _read_parts(parts, source)
    if not found:
        return load_ether(
            pipeline_or_model,
            path_or_hub_id,
            adapter_name=adapter_name,
            revision=revision,
            local_files_only=local_files_only,
            require_same_base=require_same_base,
            activate=activate,
        )
    if source.folder is not None:
        check_unused(pipeline_or_model, parts, source.folder)
    fits = [check_method_fit(part.model, adapter, adapter_name) for part, adapter in found]
    for fit in fits:
        judge_fit(fit, require_same_base=require_same_base, stacklevel=3)
    roots = [bare_model(part.model) for part, _ in found]
    with unchanged_on_failure(roots, adapter_name):
        try:
            for part, adapter in found:
                attach_method(part.model, adapter, adapter_name, activate=activate)
        except BaseException:
            for root in roots:
                remove_method(root, [adapter_name])
            raise
    components = {part.name: len(adapter.modules()) for part, adapter in found}
    return report_of(adapter_name, source, [fit.match for fit in fits], components)


def _read_parts(parts: list[Part], source: Source) -> list[tuple[Part, MethodAdapter]]:
    """Return the adapters of other methods than ETHER by part; none where all are of ETHER."""
    read = [(part, read_any_from(source, part.subfolder)) for part in parts]
    there = [(part, adapter) for part, adapter in read if adapter is not None]
    if not there:
        refuse_missing(source, None, CONFIG_NAME)
    others = [(part, adapter) for part, adapter in there if isinstance(adapter, MethodAdapter)]
    if (
        others
        and len({type(a) if not isinstance(a, MethodAdapter) else a.method.title for _, a in there}) > 1
    ):
        raise ValueError(
            f"{printable(source.name, 300)} holds adapters of several methods; save one adapter a folder"
        )
    return others

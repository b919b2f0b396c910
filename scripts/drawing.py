"""What the commands that draw have in common: quiet libraries, a pipeline with adapters, and progress."""

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ether_diffusion.adapters import Adapter, AdapterMetadata
    from ether_diffusion.bases import Base
    from ether_diffusion.pipelines.opening import EtherPipeline

logger = logging.getLogger(__name__)

# The library is imported inside the functions: `ether --help` must not wait for torch.


def adapter_names(adapters: list[str]) -> list[str]:
    """Return a short distinct name for each adapter, from the last part of its path or hub id."""
    names: list[str] = []
    for adapter in adapters:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(adapter).absolute().name).strip("_") or "adapter"
        numbered = (plain if n == 1 else f"{plain}_{n}" for n in range(1, len(adapters) + 1))
        names.append(next(name for name in numbered if name not in names))
    return names


def read_size(text: str | None) -> tuple[int | None, int | None]:
    """Return width and height in px of "512" or "512x768"; None for both where nothing was said.

    Raises:
        ValueError: it is something else.
    """
    if text is None:
        return None, None
    found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if found is None:
        raise ValueError(f"--size is a number of px, or two as in 512x768; found {text!r}")
    return int(found[1]), int(found[2] or found[1])


def metadata_of(adapters: "Iterable[Adapter]") -> "list[AdapterMetadata]":
    """Return what adapters say of themselves; an encoder by itself says nothing."""
    return [adapter.metadata for adapter in adapters if adapter.parts]


def base_name(arguments: argparse.Namespace, known: "list[AdapterMetadata]") -> str:
    """Return the base that was named, by the command or by its adapters.

    Raises:
        ValueError: none was, or only a name that does not say where it is.
    """
    if arguments.base is not None:
        return str(arguments.base)
    named = [metadata.base_model for metadata in known if metadata.base_model is not None]
    if not named:
        raise ValueError(f"{arguments.adapter[0]} does not say what its base is; give --base")
    if not Path(named[0]).exists() and named[0] != "tiny_world" and named[0].count("/") != 1:
        raise ValueError(f"{arguments.adapter[0]} was made for {named[0]!r}; say with --base where that is")
    return named[0]


def find_device(name: str | None) -> "torch.device":
    """Return a device by its name, or the accelerator if there is one.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    from ether_diffusion.pipelines.opening import default_device

    try:
        device = torch.device(name) if name else default_device()
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"there is no device {name!r} here; leave --device out, or use cpu") from None
    return device


def open_with_adapters(
    base: "Base",
    adapters: "Mapping[str, Adapter]",
    *,
    device: "torch.device",
    dtype: str | None,
    scheduler: str | None,
    controls: Collection[str] = (),
) -> "EtherPipeline":
    """Load a base and adapters, none of them in force; what is doubtful about one is said once.

    `controls` are the names of those whose control encoders are loaded with them.
    """
    import torch

    from ether_diffusion.pipelines.opening import default_dtype, make_scheduler, open_pipeline

    numbers = getattr(torch, dtype) if dtype else default_dtype(device)
    pipeline = open_pipeline(base, device=device, dtype=numbers, with_control=bool(controls))
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, adapter in adapters.items():
            load = pipeline.load_control_weights if name in controls else pipeline.load_adapter_weights
            load(adapter, adapter_name=name, activate=False)
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        logger.warning("%s", message)
    return pipeline


def warn_of_cuts(base: "Base", prompts: Iterable[str]) -> None:
    """Warn of prompts that the base's text encoder does not read to their end."""
    from ether_diffusion.training import find_cut

    for tokenizer in base.load_tokenizers()[:1]:
        for prompt in dict.fromkeys(prompts):
            cut = find_cut(prompt, tokenizer)
            if cut is not None:
                logger.warning("%s", cut)


def hush_libraries() -> None:
    """Keep the progress bars and advice of diffusers and transformers out of a command's words."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def show_progress(done: int, total: int) -> None:
    """Count pictures on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} pictures", end="\n" if done == total else "", file=sys.stderr, flush=True)

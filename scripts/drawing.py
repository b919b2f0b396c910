"""What the commands that draw have in common: quiet libraries, a pipeline with adapters, and progress."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ether_diffusion.adapters import Adapter
from ether_diffusion.bases import Base
from ether_diffusion.prompts import plain_text
from ether_diffusion.scripts import command_options as told
from ether_diffusion.serving.engine import Engine
from ether_diffusion.tiny_world import EMBEDDED
from ether_diffusion.training import find_cut

logger = logging.getLogger(__name__)


def adapter_names(adapters: Iterable[str]) -> list[str]:
    """Return a short distinct name for each adapter, from the last part of its path or hub id."""
    names: list[str] = []
    for adapter in adapters:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(adapter).absolute().name).strip("_") or "adapter"
        numbered = (plain if n == 1 else f"{plain}_{n}" for n in range(1, len(names) + 2))
        names.append(next(name for name in numbered if name not in names))
    return names


def drawing(how: told.How, base: Base | None) -> dict[str, Any]:
    """Return how pictures are drawn; without a base, its usual guidance is left to be filled in."""
    size = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", how.size or "0")
    if size is None:
        raise ValueError(f"--size is a number of px, or two as in 512x768; found {how.size!r}")
    usual = 1.0 if base is None else base.guidance_scale
    return {
        "steps": 30 if how.steps is None else how.steps,
        "guidance_scale": usual if how.guidance_scale is None else how.guidance_scale,
        "batch_size": 1 if how.batch_size is None else how.batch_size,
        "width": None if how.size is None else int(size[1]),
        "height": None if how.size is None else int(size[2] or size[1]),
    }


def find_base(named: str | None, adapters: Mapping[str, Adapter]) -> str:
    """Return the base that was named, by the command or by its adapters; these stand by what was given."""
    if named is not None:
        return named
    bases = [adapter.metadata.base_model for adapter in adapters.values() if adapter.metadata.base_model]
    first = next(iter(adapters))
    if not bases:
        raise ValueError(f"{first} does not say what its base is; give --base")
    if not Path(bases[0]).exists() and bases[0] not in EMBEDDED and bases[0].count("/") != 1:
        raise ValueError(f"{first} was made for {bases[0]!r}; say with --base where that is")
    return bases[0]


def check_new(output: Path) -> None:
    """Refuse a file or folder to write that is there, or cannot be written."""
    if os.path.lexists(output):
        raise FileExistsError(f"{output} is there already; name a new folder or file")
    there = next(parent for parent in output.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"nothing can be written into {there}; name another place than {output}")


def open_engine(
    base: Base, adapters: Mapping[str, Adapter], *, device: torch.device, dtype: str | None, max_rows: int
) -> Engine:
    """Load a base and adapters by name; what is doubtful about one is said once."""
    numbers = getattr(torch, dtype) if dtype else None
    engine = Engine(base, device=device, dtype=numbers, max_rows=max_rows, num_slots=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, adapter in adapters.items():
            engine.add_adapter(name, adapter)
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        logger.warning("%s", message)
    return engine


def warn_of_cuts(base: Base, prompts: Iterable[str]) -> None:
    """Warn of prompts that the base's text encoder does not read to their end."""
    prompts = [plain_text(prompt) if base.takes_weights else prompt for prompt in prompts]
    for tokenizer in base.load_tokenizers()[:1]:
        for cut in filter(None, (find_cut(prompt, tokenizer) for prompt in dict.fromkeys(prompts))):
            logger.warning("%s", cut)


def hush_libraries() -> None:
    """Keep the progress bars and advice of diffusers and transformers out of a command's words."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def show_progress(done: int, total: int) -> None:
    """Count pictures on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} pictures", end="\n" if done == total else "", file=sys.stderr, flush=True)

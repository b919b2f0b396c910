"""The card of an adapter: what a library shows of it, read from its files and compared with the base."""

import hashlib
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from ether_diffusion.adapters import read_adapter
from ether_diffusion.adapters.fit import Match
from ether_diffusion.adapters.format import CONFIG_NAME, CONTROL_CONFIG_NAME, TENSORS_NAME
from ether_diffusion.ui.adapter_contents import THUMBNAIL_NAME, hash_of, steps_of
from ether_diffusion.ui.base_fit import BaseFit
from ether_diffusion.ui.display_name import read_label
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)

GONE = "this adapter is no longer in the library: it was deleted meanwhile; refresh the list"


@dataclass(frozen=True)
class Card:
    """What a library shows of an adapter.

    `name`, `base_name`, `trigger` and `why_not` are escaped for terminals and hold no invisible characters;
    a page escapes them for HTML as any text. `fits_base` is true where the adapter can be applied as it is;
    `why_not` says why otherwise. With `match` "other weights" it could be applied, to doubtful effect. A
    damaged adapter has no method and no hash. `num_bytes` are those of its files.
    """

    id: str
    name: str
    kind: Literal["subject", "control"]
    method: str
    base_name: str
    fits_base: bool
    why_not: str
    match: Match | None
    num_bytes: int
    trigger: str
    steps: int | None
    hash: str
    created: datetime
    thumbnail: Path | None
    num_parameters: int


def read_card(folder: Path, base: BaseFit) -> Card:
    """Read the card of an adapter, damaged or not.

    Raises:
        FileNotFoundError: it is gone.
    """
    if not folder.is_dir():
        raise FileNotFoundError(GONE)
    label = read_label(folder)
    adapter, match, why_not = None, None, ""
    try:
        adapter = read_adapter(folder)
        fit = base.fit(adapter)
        match, why_not = fit.match, fit.remark
    except (ValueError, OSError) as error:
        why_not = printable(str(error).replace(f"{folder}/", "").replace(str(folder), label.name), 500)
    except Exception:  # whatever is wrong with one adapter, the others are listed
        logger.exception("the adapter in %s cannot be read", folder)
        why_not = "it cannot be read; details are in the log"
    thumbnail = folder / THUMBNAIL_NAME
    return Card(
        id=id_of(folder),
        name=label.name,
        kind="control" if (folder / CONTROL_CONFIG_NAME).exists() else "subject",
        method="" if adapter is None else adapter.method,
        base_name="" if adapter is None else printable(adapter.metadata.base_model or "unknown"),
        fits_base=match in ("same", "unknown"),
        why_not=why_not,
        match=match,
        num_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        trigger="" if adapter is None else printable(adapter.metadata.trigger or "", 300),
        steps=None if adapter is None else steps_of(adapter),
        hash="" if adapter is None else hash_of(adapter),
        created=label.created,
        thumbnail=thumbnail if thumbnail.is_file() else None,
        num_parameters=0 if adapter is None else adapter.num_parameters,
    )


def id_of(folder: Path) -> str:
    """Return the id of a folder: its name, or for one that a hand put there what stands for the name."""
    name = folder.name
    if name.isascii() and name.isidentifier() and len(name) <= 64:
        return name
    return f"x{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"


def is_adapter(path: Path) -> bool:
    """Say whether a folder in a library holds an adapter, whole or not."""
    if path.name.startswith(".") or path.is_symlink() or not path.is_dir():
        return False
    return any((path / name).exists() for name in (CONFIG_NAME, TENSORS_NAME, CONTROL_CONFIG_NAME))


def stamp_of(folder: Path) -> object:
    """Return what changes when a file of a folder does."""
    with suppress(OSError):
        status = [(str(path), path.stat()) for path in sorted(folder.rglob("*"))]
        return [(name, each.st_mtime_ns, each.st_size) for name, each in status]
    return None

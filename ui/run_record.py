"""A run's own small files beside the trainer's: what was asked, what is wanted of it, which process it is."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast

from ether_diffusion.durable_files import write_files
from ether_diffusion.strict_json import Json, is_number, is_whole, parse_json
from ether_diffusion.training.run_lock import LOCK_NAME, Holder, current_holder, read_holder
from ether_diffusion.ui.display_name import MAX_SECONDS
from ether_diffusion.ui.training_request import output_folder

REQUEST_NAME, WISH_NAME, PROCESS_NAME, OUTPUT_NAME = "request.json", "wish.json", "process.json", "output.log"
LIBRARY_NAME = "library.json"
Wanted = Literal["running", "paused", "stopped"]
_WANTED: tuple[Wanted, ...] = ("running", "paused", "stopped")
_SECONDS_UNTIL_FORGOTTEN = 600
GONE = "this run is no longer in the studio: its folder was deleted; refresh the page"


@dataclass(frozen=True)
class RunRecord:
    """What a run was asked to do; it never changes.

    `batch_size` counts the images of an update; `created` is in seconds since 1970.
    """

    name: str
    trigger: str
    num_steps: int
    batch_size: int
    command: list[str]
    created: float


@dataclass(frozen=True)
class Wish:
    """What is wanted of a run, since its process began.

    `asked` counts how often it was asked to end; `began` is in seconds since 1970, and `output_from` is where
    in the output's file (bytes) the process began to write.
    """

    wanted: Wanted
    asked: int = 0
    began: float = 0.0
    output_from: int = 0


def write_record(folder: Path, record: RunRecord) -> None:
    """Write what a run is asked to do."""
    write_files(folder, {REQUEST_NAME: _json(asdict(record))})


def read_record(folder: Path) -> RunRecord:
    """Read what a run was asked to do.

    Raises:
        FileNotFoundError: the folder is gone.
        ValueError: its request is damaged.
    """
    found = _read(folder / REQUEST_NAME)
    if found is None and not folder.is_dir():
        raise FileNotFoundError(GONE)
    is_whole_record = (
        isinstance(found, dict)
        and found.keys() == RunRecord.__dataclass_fields__.keys()
        and all(isinstance(found[name], str) for name in ("name", "trigger"))
        and all(is_whole(found[name]) for name in ("num_steps", "batch_size"))
        and is_number(found["created"])
        and 0 <= cast(float, found["created"]) <= MAX_SECONDS
        and isinstance(found["command"], list)
        and all(isinstance(word, str) for word in found["command"])
    )
    if not is_whole_record:
        raise ValueError(
            f"the run {folder.name} has lost its {REQUEST_NAME}, so that it cannot go on; delete it and "
            "train again"
        )
    facts = cast(dict[str, object], found)
    return RunRecord(**facts)  # type: ignore[arg-type]  # checked above


def write_wish(folder: Path, wish: Wish) -> None:
    """Write what is wanted of a run."""
    write_files(folder, {WISH_NAME: _json(asdict(wish))})


def read_wish(folder: Path) -> Wish:
    """Read what is wanted of a run; that it runs where nothing was written."""
    found = _read(folder / WISH_NAME)
    if not isinstance(found, dict) or found.keys() != Wish.__dataclass_fields__.keys():
        return Wish("running")
    wanted, asked, began, start = (found[name] for name in ("wanted", "asked", "began", "output_from"))
    if wanted not in _WANTED or not is_whole(asked) or not is_number(began) or not is_whole(start):
        return Wish("running")
    return Wish(wanted, cast(int, asked), float(cast(float, began)), cast(int, start))


def write_library_id(folder: Path, adapter_id: str) -> None:
    """Note as what a run's adapter is in the library."""
    write_files(folder, {LIBRARY_NAME: _json({"id": adapter_id})})


def read_library_id(folder: Path) -> str | None:
    """Return as what a run's adapter is, or was, in the library."""
    found = _read(folder / LIBRARY_NAME)
    return str(found["id"]) if isinstance(found, dict) and "id" in found else None


def new_wish(folder: Path) -> Wish:
    """Return the wish of a process that begins now."""
    output = folder / OUTPUT_NAME
    size = output.stat().st_size if output.exists() else 0
    return Wish("running", 0, time.time(), size)


def asked_once_more(wish: Wish, wanted: Wanted) -> Wish:
    """Return the wish of somebody who asks a run to end."""
    return replace(wish, wanted=wanted, asked=wish.asked + 1)


def living_process(folder: Path) -> Holder | None:
    """Return the process that trains in a run's folder, or None.

    Its number alone says nothing, as numbers come back: it counts with the time when it started. A process
    of another machine counts while the run's files change.
    """
    holder = read_holder(folder / PROCESS_NAME)
    is_fresh = time.time() - _last_change(folder) < _SECONDS_UNTIL_FORGOTTEN
    if holder is not None and not holder.is_gone() and (holder.is_here or is_fresh):
        return holder
    return current_holder(output_folder(folder))


def _last_change(folder: Path) -> float:
    run = output_folder(folder)
    paths = (folder / OUTPUT_NAME, run / "log.jsonl", run / LOCK_NAME)
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def _read(path: Path) -> Json:
    try:
        return parse_json(path.read_bytes(), path.name)
    except (OSError, ValueError):
        return None


def _json(value: dict[str, object]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"

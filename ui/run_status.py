"""How a run stands, read from disk alone: it matters not which server started it, or whether that lives."""

import math
import os
import re
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field

from ether_diffusion.adapters.format import CARD_NAME, CONFIG_NAME, TENSORS_NAME
from ether_diffusion.durable_files import write_files
from ether_diffusion.strict_json import StrictModel, read_json
from ether_diffusion.training.checkpoint import MANIFEST
from ether_diffusion.training.result import SAMPLES_FOLDER
from ether_diffusion.training.run_folder import LOG_NAME
from ether_diffusion.training.run_lock import LOCK_NAME, Holder, current_holder, read_holder
from ether_diffusion.training.validation import BASE_FOLDER
from ether_diffusion.ui.labels import MAX_SECONDS
from ether_diffusion.ui.training_request import output_folder
from ether_diffusion.wording import printable

REQUEST_NAME, WISH_NAME, LIBRARY_NAME = "request.json", "wish.json", "library.json"
PROCESS_NAME, OUTPUT_NAME = "process.json", "output.log"
GONE = "this run is no longer in the studio: its folder was deleted; refresh the page"
MAX_POINTS = 300
"""Of a plotted loss."""
State = Literal["starting", "running", "paused", "stopped", "crashed", "finished"]
Wanted = Literal["running", "paused", "stopped"]
_RESULT = (CONFIG_NAME, TENSORS_NAME, CARD_NAME)
"""What a finished run has; the card is written last."""
_SECONDS_UNTIL_FORGOTTEN = 600
_TAIL_BYTES = 16 * 2**10
_PACE_STEPS = 50
_ERROR_LINE = re.compile(r"(?:\w+\.)*(?P<kind>\w*(?:Error|Exception|Interrupt))(?:: (?P<text>.*))?")
_PROGRAM = "train-dreambooth: "
_STOPPED = re.compile(r"stopped by SIG(?:INT|TERM);")
M = TypeVar("M", bound=StrictModel)


class RunRecord(StrictModel):
    """What a run was asked to do; it never changes.

    `batch_size` counts the images of an update; `created` is in seconds since 1970.
    """

    name: str
    trigger: str
    num_steps: int
    batch_size: int
    command: list[str]
    created: Annotated[float, Field(ge=0, le=MAX_SECONDS)]


class Wish(StrictModel):
    """What is wanted of a run, since its process began.

    `asked` counts how often it was asked to end; `began` is in seconds since 1970, and `output_from` is where
    in the output's file (bytes) the process began to write.
    """

    wanted: Wanted
    asked: int = 0
    began: float = 0.0
    output_from: int = 0


class LibraryEntry(StrictModel):
    """As what a run's adapter is, or was, in the library."""

    id: str


class LogLine(BaseModel):
    """One update: its number from 1, its loss (None where it overflowed), images per second."""

    step: int
    loss: float | None
    images_per_second: float


@dataclass(frozen=True)
class RunStatus:
    """How a run stands, and in words.

    `losses` are (step, mean loss) of equal stretches, `samples` are (step, picture), several of a step one
    after the other, and `base_samples` the same pictures by the base. `adapter` is the result's folder once
    there is one, and `library_id` names it in the library once it was put there; `command` is the program
    with its arguments, to copy.
    """

    id: str
    name: str
    state: State
    step: int
    num_steps: int
    seconds_left: float | None
    losses: list[tuple[int, float]]
    samples: list[tuple[int, Path]]
    base_samples: list[Path]
    sentence: str
    can_stop: bool
    can_pause: bool
    can_resume: bool
    adapter: Path | None
    command: list[str]
    trigger: str
    created: datetime
    library_id: str | None


def write_facts(folder: Path, name: str, facts: StrictModel) -> None:
    """Write one of a run's small files."""
    write_files(folder, {name: facts.model_dump_json(indent=1).encode() + b"\n"})


def _read(path: Path, model: type[M]) -> M | None:
    """Read one of a run's small files; None where it is not there or damaged."""
    with suppress(OSError, ValueError):
        return read_json(path.read_bytes(), model, path.name)
    return None


def read_record(folder: Path) -> RunRecord:
    """Read what a run was asked to do.

    Raises:
        FileNotFoundError: the folder is gone.
        ValueError: its request is damaged.
    """
    found = _read(folder / REQUEST_NAME, RunRecord)
    if found is None and not folder.is_dir():
        raise FileNotFoundError(GONE)
    if found is None:
        raise ValueError(
            f"the run {folder.name} has lost its {REQUEST_NAME}, so that it cannot go on; delete it and "
            "train again"
        )
    return found


def read_wish(folder: Path) -> Wish:
    """Read what is wanted of a run; that it runs where nothing was written."""
    return _read(folder / WISH_NAME, Wish) or Wish(wanted="running")


def living_process(folder: Path) -> Holder | None:
    """Return the process that trains in a run's folder, or None.

    Its number alone says nothing, as numbers come back: it counts with the time when it started. A process
    of another machine counts while the run's files change.
    """
    holder, run = read_holder(folder / PROCESS_NAME), output_folder(folder)
    if holder is not None and not holder.is_gone():
        paths = (folder / OUTPUT_NAME, run / LOG_NAME, run / LOCK_NAME)
        changed = max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)
        if holder.is_here or time.time() - changed < _SECONDS_UNTIL_FORGOTTEN:
            return holder
    return current_holder(run)


def has_result(run: Path) -> bool:
    """Say whether a trainer wrote its result to the end."""
    return all((run / name).is_file() for name in _RESULT)


def read_status(folder: Path) -> RunStatus:
    """Read how the run in a folder stands; errors are those of `read_record`."""
    record, wish, run = read_record(folder), read_wish(folder), output_folder(folder)
    process, lines, entry = living_process(folder), read_log(run), _read(folder / LIBRARY_NAME, LibraryEntry)
    tail = read_tail(folder / OUTPUT_NAME, wish.output_from)
    state = _state(process, wish, run, tail)
    is_done, is_running = state == "finished", state == "running"
    return RunStatus(
        id=folder.name,
        name=record.name,
        state=state,
        step=lines[-1].step if lines else 0,
        num_steps=record.num_steps,
        seconds_left=_seconds_left(lines, run, record, wish.began) if is_running and lines else None,
        losses=thinned(lines),
        samples=[(step, path) for step, paths in samples_by_step(run).items() for path in paths],
        base_samples=_pictures(run / SAMPLES_FOLDER / BASE_FOLDER),
        sentence=_sentence(state, record, wish, run, lines[-1].step if lines else 0, tail),
        can_stop=process is not None or state == "paused",
        can_pause=process is not None and wish.asked == 0,
        can_resume=process is None and not is_done,
        adapter=run if is_done else None,
        command=record.command,
        trigger=record.trigger,
        created=datetime.fromtimestamp(record.created, UTC),
        library_id=None if entry is None else entry.id,
    )


def _state(process: Holder | None, wish: Wish, run: Path, tail: Sequence[str]) -> State:
    if process is not None:
        log = run / LOG_NAME
        has_trained = log.is_file() and log.stat().st_size > 0 and log.stat().st_mtime >= wish.began
        return "running" if has_trained else "starting"
    if has_result(run):
        return "finished"
    if wish.wanted != "running":
        return wish.wanted
    return "stopped" if any(_STOPPED.search(line) for line in tail[-3:]) else "crashed"


def _sentence(state: State, record: RunRecord, wish: Wish, run: Path, step: int, tail: Sequence[str]) -> str:
    saved = newest_saved_step(run)
    onward = f"Resume goes on from step {saved}." if saved else "Resume begins with the first step."
    if state in ("starting", "running") and wish.asked:
        verb = "Pausing" if wish.wanted == "paused" else "Stopping"
        return f"{verb}: the step in progress is finished and saved. Press Stop again to end it at once."
    if state == "starting":
        return "Loading the base and looking at the photos."
    if state == "running" and step >= record.num_steps:
        return "Drawing the last pictures and writing the adapter."
    if state == "running":
        return f"Training, step {step} of {record.num_steps}."
    if state == "finished":
        return f"Done: {record.name} was learned in {step} steps. Call it by “{record.trigger}”."
    if state == "paused":
        return f"Paused at step {saved} of {record.num_steps}. {onward}"
    if state == "stopped" and saved:
        return f"Stopped at step {saved} of {record.num_steps}. What was learned until then is kept. {onward}"
    if state == "stopped":
        return f"Stopped before anything was saved; the photos are kept. {onward}"
    reason = last_error(tail)
    if reason is None:
        end = "without a word: it was killed, or the memory or the machine gave out"
        return f"Training ended at step {step} {end}. {onward}"
    studio, home = run.parent.parent.parent, os.path.expanduser("~")  # noqa: PTH111 (raises without one)
    words = {run: "the run's folder", run.parent: "the run", studio: "the studio", home: "~"}
    for path, word in words.items():  # of this machine, and nobody's business
        reason = reason.replace(str(path), word)
    return f"Training ended at step {step}: {reason.rstrip('.')}. {onward}"


def read_log(run: Path) -> list[LogLine]:
    """Return the whole lines of a trainer's log; one that a crash cut off is passed over."""
    lines = []
    with suppress(OSError):
        for text in (run / LOG_NAME).read_bytes().splitlines():
            with suppress(ValueError):
                lines.append(LogLine.model_validate_json(text))
    return lines


def thinned(lines: Sequence[LogLine], num_points: int = MAX_POINTS) -> list[tuple[int, float]]:
    """Return at most so many points of the loss: means over equal stretches, at each stretch's last step."""
    known = [(line.step, line.loss) for line in lines if line.loss is not None]
    width = max(1, math.ceil(len(known) / num_points))
    stretches = [known[start : start + width] for start in range(0, len(known), width)]
    return [(part[-1][0], statistics.fmean(loss for _, loss in part)) for part in stretches]


def _seconds_left(lines: Sequence[LogLine], run: Path, record: RunRecord, began: float) -> float | None:
    """Estimate how long the updates that are left take, with the pictures in between.

    The pace is that between the first and the last pictures that this process drew (since `began`, seconds
    since 1970), which has everything in it; before there are two, that of the last updates alone.
    """
    left = max(0, record.num_steps - lines[-1].step)
    times = {step: paths[0].stat().st_mtime for step, paths in samples_by_step(run).items()}
    drawn = sorted(step for step, written in times.items() if written >= began)
    if len(drawn) >= 2:
        return left * (times[drawn[-1]] - times[drawn[0]]) / (drawn[-1] - drawn[0])
    rates = [line.images_per_second for line in lines[-_PACE_STEPS:] if line.images_per_second > 0]
    return left * record.batch_size / statistics.median(rates) if rates else None


def samples_by_step(run: Path) -> dict[int, list[Path]]:
    """Return the pictures that were drawn after so many updates, in the order of their names."""
    folders = {path: re.fullmatch(r"step-(\d+)", path.name) for path in _entries(run / SAMPLES_FOLDER)}
    found = {int(match[1]): _pictures(path) for path, match in folders.items() if match}
    return {step: found[step] for step in sorted(found) if found[step]}


def newest_saved_step(run: Path) -> int:
    """Return the step of the newest checkpoint that looks whole; 0 where there is none."""
    whole = [path.name for path in _entries(run) if (path / MANIFEST).is_file()]
    return max(
        (int(found[1]) for name in whole if (found := re.fullmatch(r"checkpoint-(\d+)", name))), default=0
    )


def read_tail(output: Path, start: int) -> list[str]:
    """Return the last lines of what a process wrote from byte `start` on; progress bars are lines, too."""
    with suppress(OSError), output.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(min(start, size), size - _TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
        return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    return []


def last_error(lines: Sequence[str]) -> str | None:
    """Return the sentence that a trainer ended with, or the last line of its traceback, escaped."""
    ours = [line.removeprefix(_PROGRAM) for line in lines if line.startswith(_PROGRAM)]
    if ours:
        return printable(" ".join(ours), 1000)
    found = [match for line in lines if (match := _ERROR_LINE.fullmatch(line))]
    return printable(found[-1]["text"] or found[-1]["kind"], 500) if found else None


def _pictures(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.suffix == ".png" and not path.name.startswith(".")]


def _entries(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(folder.iterdir())
    return []

"""How a run stands, read from its files alone, whichever server started it and whether that lives or not."""

import math
import os
import re
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
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
from ether_diffusion.ui.adapter_files import MAX_SECONDS
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


class Record(StrictModel):
    """What a run was asked to do; it never changes. `batch_size` counts the images of an update."""

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

    wanted: Wanted = "running"
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


class Run:
    """How the run in a folder stands: every fact is read from its files once, when it is asked for.

    Raises:
        FileNotFoundError: the folder is gone.
        ValueError: its request is damaged.
    """

    def __init__(self, folder: Path) -> None:
        record = read_facts(folder / REQUEST_NAME, Record)
        if record is None:
            if not folder.is_dir():
                raise FileNotFoundError(GONE)
            raise ValueError(
                f"the run {folder.name} has lost its {REQUEST_NAME}, so that it cannot go on; delete it and "
                "train again"
            )
        self.folder, self.output, self.id = folder, folder / "run", folder.name
        self.name, self.trigger, self.num_steps = record.name, record.trigger, record.num_steps
        self.record, self.command = record, record.command
        self.created = datetime.fromtimestamp(record.created, UTC)
        self.process = living_process(folder)
        self.wish = read_facts(folder / WISH_NAME, Wish) or Wish()

    @property
    def library_id(self) -> str | None:
        """Names the adapter in the library, once it was put there."""
        entry = read_facts(self.folder / LIBRARY_NAME, LibraryEntry)
        return None if entry is None else entry.id

    @cached_property
    def state(self) -> State:
        if self.process is not None:
            log = self.output / LOG_NAME
            has_trained = log.is_file() and log.stat().st_size > 0 and log.stat().st_mtime >= self.wish.began
            return "running" if has_trained else "starting"
        if all((self.output / name).is_file() for name in _RESULT):
            return "finished"
        if self.wish.wanted != "running":
            return self.wish.wanted
        return "stopped" if any(_STOPPED.search(line) for line in self.tail[-3:]) else "crashed"

    @property
    def can_stop(self) -> bool:
        return self.process is not None or self.state == "paused"

    @property
    def can_pause(self) -> bool:
        return self.process is not None and self.wish.asked == 0

    @property
    def can_resume(self) -> bool:
        return self.process is None and self.state != "finished"

    @property
    def adapter(self) -> Path | None:
        """The result's folder, once there is one."""
        return self.output if self.state == "finished" else None

    @cached_property
    def lines(self) -> list[LogLine]:
        """The whole lines of the trainer's log; one that a crash cut off is passed over."""
        lines = []
        with suppress(OSError):
            for text in (self.output / LOG_NAME).read_bytes().splitlines():
                with suppress(ValueError):
                    lines.append(LogLine.model_validate_json(text))
        return lines

    @property
    def step(self) -> int:
        return self.lines[-1].step if self.lines else 0

    @property
    def losses(self) -> list[tuple[int, float]]:
        """At most MAX_POINTS means of the loss over equal stretches, at each stretch's last step."""
        known = [(line.step, line.loss) for line in self.lines if line.loss is not None]
        width = max(1, math.ceil(len(known) / MAX_POINTS))
        stretches = [known[start : start + width] for start in range(0, len(known), width)]
        return [(part[-1][0], statistics.fmean(loss for _, loss in part)) for part in stretches]

    @cached_property
    def samples(self) -> list[tuple[int, Path]]:
        """The pictures with the updates that they were drawn after, several of a step by their names."""
        found = [(path.parent.name[5:], path) for path in _pictures(self.output, "step-*")]
        return sorted((int(step), path) for step, path in found if step.isdecimal())

    @property
    def base_samples(self) -> list[Path]:
        """The same pictures by the base."""
        return _pictures(self.output, BASE_FOLDER)

    @property
    def seconds_left(self) -> float | None:
        """How long the updates that are left take, with the pictures in between.

        The pace is that between the first and the last pictures that this process drew, which has everything
        in it; before there are two, that of the last updates alone.
        """
        if self.state != "running" or not self.lines:
            return None
        left = max(0, self.num_steps - self.step)
        times = {step: path.stat().st_mtime for step, path in reversed(self.samples)}
        drawn = sorted(step for step, written in times.items() if written >= self.wish.began)
        if len(drawn) >= 2:
            return left * (times[drawn[-1]] - times[drawn[0]]) / (drawn[-1] - drawn[0])
        rates = [line.images_per_second for line in self.lines[-_PACE_STEPS:] if line.images_per_second > 0]
        return left * self.record.batch_size / statistics.median(rates) if rates else None

    @cached_property
    def sentence(self) -> str:
        """How it stands, in words, with what can be done."""
        state, step, of = self.state, self.step, self.num_steps
        if state in ("starting", "running") and self.wish.asked:
            verb = "Pausing" if self.wish.wanted == "paused" else "Stopping"
            return f"{verb}: the step in progress is finished and saved. Press Stop again to end it at once."
        if state == "starting":
            return "Loading the base and looking at the photos."
        if state == "running":
            training = f"Training, step {step} of {of}."
            return training if step < of else "Drawing the last pictures and writing the adapter."
        if state == "finished":
            return f"Done: {self.name} was learned in {step} steps. Call it by “{self.trigger}”."
        whole = (path.parent.name[11:] for path in self.output.glob(f"checkpoint-*/{MANIFEST}"))
        saved = max((int(number) for number in whole if number.isdecimal()), default=0)
        onward = f"Resume goes on from step {saved}." if saved else "Resume begins with the first step."
        if state == "paused":
            return f"Paused at step {saved} of {of}. {onward}"
        if state == "stopped" and saved:
            return f"Stopped at step {saved} of {of}. What was learned until then is kept. {onward}"
        if state == "stopped":
            return f"Stopped before anything was saved; the photos are kept. {onward}"
        reason = last_error(self.tail)
        if reason is None:
            end = "without a word: it was killed, or the memory or the machine gave out"
            return f"Training ended at step {step} {end}. {onward}"
        studio, home = self.folder.parent.parent, os.path.expanduser("~")  # noqa: PTH111 (raises without one)
        words = {self.output: "the run's folder", self.folder: "the run", studio: "the studio", home: "~"}
        for path, word in words.items():  # of this machine, and nobody's business
            reason = reason.replace(str(path), word)
        return f"Training ended at step {step}: {reason.rstrip('.')}. {onward}"

    @cached_property
    def tail(self) -> list[str]:
        """The last lines of what its process wrote; progress bars are lines, too."""
        with suppress(OSError), (self.folder / OUTPUT_NAME).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(min(self.wish.output_from, size), size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
            return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
        return []


def living_process(folder: Path) -> Holder | None:
    """Return the process that trains in a run's folder, or None.

    Its number alone says nothing, as numbers come back: it counts with the time when it started. A process
    of another machine counts while the run's files change.
    """
    holder, run = read_holder(folder / PROCESS_NAME), folder / "run"
    if holder is not None and not holder.is_gone():
        paths = (folder / OUTPUT_NAME, run / LOG_NAME, run / LOCK_NAME)
        changed = max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)
        if holder.is_here or time.time() - changed < _SECONDS_UNTIL_FORGOTTEN:
            return holder
    return current_holder(run)


def last_error(lines: Sequence[str]) -> str | None:
    """Return the sentence that a trainer ended with, or the last line of its traceback, escaped."""
    ours = [line.removeprefix(_PROGRAM) for line in lines if line.startswith(_PROGRAM)]
    if ours:
        return printable(" ".join(ours), 1000)
    found = [match for line in lines if (match := _ERROR_LINE.fullmatch(line))]
    return printable(found[-1]["text"] or found[-1]["kind"], 500) if found else None


def write_facts(folder: Path, name: str, facts: StrictModel) -> None:
    """Write one of a run's small files."""
    write_files(folder, {name: facts.model_dump_json(indent=1).encode() + b"\n"})


def read_facts(path: Path, model: type[M]) -> M | None:
    """Read one of a run's small files; None where it is not there or damaged."""
    with suppress(OSError, ValueError):
        return read_json(path.read_bytes(), model, path.name)
    return None


def _pictures(run: Path, folders: str) -> list[Path]:
    return sorted(run.glob(f"{SAMPLES_FOLDER}/{folders}/[!.]*.png"))

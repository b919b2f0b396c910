"""How a training run of the studio stands, known from its files alone, whoever began it."""

import json
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
from typing import Annotated, Literal, cast

from pydantic import BaseModel, Field

from ether_diffusion.adapters.format import CARD_NAME, CONFIG_NAME, TENSORS_NAME
from ether_diffusion.tiny_world import EMBEDDED
from ether_diffusion.training import run_lock
from ether_diffusion.training.checkpoint import saved_steps
from ether_diffusion.training.config.presets import PRESET_VALUES
from ether_diffusion.training.result import EVALUATION_NAME, SAMPLES_FOLDER
from ether_diffusion.training.run_folder import LOG_NAME
from ether_diffusion.training.validation import BASE_FOLDER
from ether_diffusion.ui.facts import Facts
from ether_diffusion.ui.library import MAX_SECONDS
from ether_diffusion.wording import printable

PROCESS_NAME, OUTPUT_NAME = "process.json", "output.log"
GONE = "this run is no longer in the studio: its folder was deleted; refresh the page"
RESULT = (CONFIG_NAME, TENSORS_NAME, CARD_NAME)  # what a finished run has; the card is written last
MAX_POINTS = 300  # of a plotted loss
State = Literal["queued", "starting", "running", "paused", "stopped", "crashed", "finished"]
Wanted = Literal["queued", "running", "paused", "stopped"]
_SECONDS_UNTIL_FORGOTTEN, _TAIL_BYTES, _PACE_STEPS = 600, 16 * 2**10, 50
_ERROR_LINE = re.compile(r"(?:\w+\.)*(?P<kind>\w*(?:Error|Exception|Interrupt))(?:: (?P<text>.*))?")
_PROGRAM = "train-dreambooth: "
_STOPPED = re.compile(r"stopped by SIG(?:INT|TERM);")


class Record(Facts):
    """What a run was asked to do; it never changes. `batch_size` counts the images of an update."""

    name_of_file = "request.json"
    name: str
    trigger: str
    num_steps: int
    batch_size: int
    command: list[str]
    created: Annotated[float, Field(ge=0, le=MAX_SECONDS)]


class Wish(Facts):
    """What is wanted of a run, since its process began."""

    name_of_file = "wish.json"
    wanted: Wanted = "running"
    asked: int = 0  # how often it was asked to end
    began: float = 0.0  # in seconds since 1970
    output_from: int = 0  # where in the output's file (bytes) the process began to write
    together: bool = False  # whether the process trains others, too


class LibraryEntry(Facts):
    """As what a run's adapter is, or was, in the library."""

    name_of_file = "library.json"
    id: str


class LogLine(BaseModel):
    """One update: its number from 1, its loss (None where it overflowed), images per second."""

    step: int
    loss: float | None
    images_per_second: float


class Run:
    """How the run in a folder stands: every fact is read from its files once, when it is asked for."""

    def __init__(self, folder: Path) -> None:
        record = Record.find(folder)
        if record is None:
            if not folder.is_dir():
                raise FileNotFoundError(GONE)
            lost = f"the run {folder.name} has lost its {Record.name_of_file}, so that it cannot go on"
            raise ValueError(f"{lost}; delete it and train again")
        self.folder, self.output, self.id, self.record = folder, folder / "run", folder.name, record
        self.process_file, self.log = folder / PROCESS_NAME, folder / OUTPUT_NAME
        self.name, self.trigger, self.num_steps = record.name, record.trigger, record.num_steps
        self.created, self.command = datetime.fromtimestamp(record.created, UTC), record.command
        self.wish = Wish.find(folder) or Wish()
        self.process = living_process(folder)
        if self.wish.together and self._has_trained and run_lock.current_holder(self.output) is None:
            self.process = None  # it trains the others

    @property
    def base(self) -> str | None:
        """The base that it is trained on, as its command says."""
        return next((word for word in self.command if word.startswith("--pretrained_model")), None)

    @property
    def _has_trained(self) -> bool:
        log = self.output / LOG_NAME
        return log.is_file() and log.stat().st_size > 0 and log.stat().st_mtime >= self.wish.began

    @property
    def library_id(self) -> str | None:
        """Names the adapter in the library, once it was put there."""
        return getattr(LibraryEntry.find(self.folder), "id", None)

    @cached_property
    def state(self) -> State:
        if self.process is not None:
            return "running" if self._has_trained else "starting"
        if all((self.output / name).is_file() for name in RESULT):
            return "finished"
        if self.wish.wanted != "running":
            return self.wish.wanted
        return "stopped" if any(_STOPPED.search(line) for line in self.tail[-3:]) else "crashed"

    @property
    def can_stop(self) -> bool:
        return self.process is not None or self.state in ("paused", "queued")

    @property
    def can_pause(self) -> bool:
        return self.process is not None and self.wish.asked == 0

    @property
    def can_resume(self) -> bool:
        return self.process is None and self.state not in ("finished", "queued")

    @property
    def adapter(self) -> Path | None:
        """The result's folder, once there is one."""
        return self.output if self.state == "finished" else None

    @cached_property
    def saved_steps(self) -> list[int]:
        """After which updates there are checkpoints."""
        return saved_steps(self.output)

    @property
    def saved_step(self) -> int:
        """The updates of the newest checkpoint; 0 where there is none."""
        return max(self.saved_steps, default=0)

    @property
    def can_use(self) -> bool:
        """Whether there is an adapter, be it of a run that ended early."""
        return self.adapter is not None or (self.process is None and self.saved_step > 0)

    @cached_property
    def lines(self) -> list[LogLine]:
        """The whole lines of the trainer's log; one that a crash cut off is passed over."""
        lines, log = [], self.output / LOG_NAME
        for text in log.read_bytes().splitlines() if log.is_file() else ():
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
        found = self.output.glob(f"{SAMPLES_FOLDER}/step-*/[!.]*.png")
        return sorted((int(n), path) for path in found if (n := path.parent.name[5:]).isdecimal())

    @property
    def base_samples(self) -> list[Path]:
        """The same pictures by the base."""
        return sorted(self.output.glob(f"{SAMPLES_FOLDER}/{BASE_FOLDER}/[!.]*.png"))

    @cached_property
    def verdict(self) -> tuple[str, str]:
        """What was measured of a finished run, in a word and a sentence; nothing where nothing was."""
        try:
            found = json.loads((self.output / EVALUATION_NAME).read_bytes())
            curve, best = {each["step"]: each for each in found["curve"]}, found["best_step"]
            base, likeness = (float(curve[step]["fidelity"]["mean"]) for step in (0, best or 0))
            drift = float(curve[best or 0]["drift"]["mean"])
        except (OSError, ValueError, KeyError, TypeError):
            return "", ""
        measured = f"likeness to the photos {likeness:.2f} at step {best} (the base {base:.2f})"
        if best and likeness > base:
            return "Learned", f"{measured}, drift of other pictures {drift:.2f}."
        is_toy = any(f"--pretrained_model_name_or_path={name}" in self.command for name in EMBEDDED)
        real = " This base draws drawings only: for photographs of real things, change the base." * is_toy
        why = f"{measured}." if best else "no step kept the base's other pictures and the prompts."
        return "Not learned", why + real

    @property
    def images_per_second(self) -> float | None:
        """The pace of its last updates."""
        rates = [line.images_per_second for line in self.lines[-_PACE_STEPS:] if line.images_per_second > 0]
        return statistics.median(rates) if rates else None

    @property
    def seconds_left(self) -> float | None:
        """How long the updates that are left take: by the pace between two pictures, or of the last ones."""
        if self.state != "running" or not self.lines:
            return None
        left = max(0, self.num_steps - self.step)
        times = {step: path.stat().st_mtime for step, path in reversed(self.samples)}
        drawn = sorted(step for step, written in times.items() if written >= self.wish.began)
        if len(drawn) >= 2:
            return left * (times[drawn[-1]] - times[drawn[0]]) / (drawn[-1] - drawn[0])
        rate = self.images_per_second
        return left * self.record.batch_size / rate if rate else None

    @cached_property
    def sentence(self) -> str:
        """How it stands, in words, with what can be done."""
        state, step, of, (drawn, wanted) = self.state, self.step, self.num_steps, self.class_images
        if state in ("starting", "running") and self.wish.asked:
            is_pause = self.wish.wanted == "paused"
            verb, press = ("Pausing", "Press Stop") if is_pause else ("Stopping", "Press Stop again")
            return f"{verb}: the step in progress is finished and saved. {press} to end it at once."
        training = f"Training, step {step} of {of}."
        going_on: dict[State, str] = {
            "queued": "Waiting: it begins when the training in progress ends, with all that waits by then.",
            "starting": "Loading the base and looking at the photos.",
            "running": training if step < of else "Drawing the last pictures and writing the adapter.",
            "finished": f"Done: {self.name} was trained for {step} steps. Call it by “{self.trigger}”.",
        }
        if state == "starting" and drawn < wanted:
            return f"Drawing pictures of its class, which keep the base's idea of it: {drawn} of {wanted}."
        if state in going_on:
            return going_on[state]
        saved = self.saved_step
        onward = f"Resume goes on from step {saved}." if saved else "Resume begins with the first step."
        if state == "paused":
            return f"Paused at step {saved} of {of}. {onward}"
        if state == "stopped":
            kept = f"Stopped at step {saved} of {of}. What was learned until then is kept."
            return f"{kept if saved else 'Stopped before anything was saved; the photos are kept.'} {onward}"
        said = last_error(self.tail, self.output)
        if said is None:
            unsaid = "without a word: it was killed, or the memory or the machine gave out"
            return f"Training ended at step {step} {unsaid}. {onward}"
        studio, home = self.folder.parent.parent, os.path.expanduser("~")  # noqa: PTH111 (raises without one)
        words = {self.output: "the run's folder", self.folder: "the run", studio: "the studio", home: "~"}
        for path, word in words.items():  # of this machine, and nobody's business
            said = said.replace(str(path), word)
        return f"Training ended at step {step}: {said.rstrip('.')}. {onward}"

    @cached_property
    def class_images(self) -> tuple[int, int]:
        """How many pictures of its class are drawn, and how many it wants first."""
        wants = any(word.startswith("--class_data_dir=") for word in self.command)
        wanted = cast(int, PRESET_VALUES["faithful"]["num_class_images"]) if wants else 0
        return len(list(self.folder.glob("class_images/*.png"))) if wants else 0, wanted

    @property
    def done(self) -> float:
        """How far it is, of 1: in the pictures of its class while those are drawn, then in its steps."""
        drawn, wanted = self.class_images
        is_first = self.state == "starting" and drawn < wanted
        return drawn / wanted if is_first else self.step / max(1, self.num_steps)

    @cached_property
    def tail(self) -> list[str]:
        """The last lines of what its process wrote; progress bars are lines, too."""
        with suppress(OSError), self.log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(min(self.wish.output_from, size), size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
            return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
        return []


def living_process(folder: Path) -> run_lock.Holder | None:
    """Return the process that trains in a run's folder; one of another machine while the files change."""
    holder, run = run_lock.read_holder(folder / PROCESS_NAME), folder / "run"
    if holder is not None and not holder.is_gone():
        paths = (folder / OUTPUT_NAME, run / LOG_NAME, run / run_lock.LOCK_NAME)
        changed = max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)
        if holder.is_here or time.time() - changed < _SECONDS_UNTIL_FORGOTTEN:
            return holder
    return run_lock.current_holder(run)


def last_error(lines: Sequence[str], output: Path) -> str | None:
    """Return the sentence that a trainer ended with, or the last line of its traceback, escaped.

    Of several runs it says each one's behind its folder.
    """
    ours, own = [line.removeprefix(_PROGRAM) for line in lines if line.startswith(_PROGRAM)], f"{output}: "
    ours = [line.removeprefix(own) for line in ours if line.startswith(own)] or ours
    if ours:
        return printable(" ".join(ours), 1000)
    found = [match for line in lines if (match := _ERROR_LINE.fullmatch(line))]
    return printable(found[-1]["text"] or found[-1]["kind"], 500) if found else None

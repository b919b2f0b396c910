"""What a trainer's files tell while it works: losses, pictures, pace, and the last words of a crash."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.training.checkpoint import MANIFEST
from ether_diffusion.training.run_folder import LOG_NAME
from ether_diffusion.training.samples import BASE_FOLDER
from ether_diffusion.training.samples import FOLDER as SAMPLES_FOLDER
from ether_diffusion.wording import printable

MAX_POINTS = 300
"""Of a plotted loss."""
_TAIL_BYTES = 16 * 2**10
_PACE_STEPS = 50
_STEP_FOLDER = re.compile(r"step-(\d+)")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ERROR_LINE = re.compile(r"(?:\w+\.)*(?P<kind>\w*(?:Error|Exception|Warning|Interrupt))(?:: (?P<text>.*))?")
_PROGRAM = "train-dreambooth: "
_STOPPED = re.compile(r"stopped by SIG(?:INT|TERM);")


@dataclass(frozen=True)
class LogLine:
    """One update: its number from 1, its loss (None where it overflowed), images per second."""

    step: int
    loss: float | None
    images_per_second: float


def read_log(run: Path) -> list[LogLine]:
    """Return the whole lines of a trainer's log; one that a crash cut off is passed over."""
    try:
        data = (run / LOG_NAME).read_bytes()
    except OSError:
        return []
    return [line for text in data.splitlines() if (line := _log_line(text)) is not None]


def _log_line(text: bytes) -> LogLine | None:
    try:
        found = json.loads(text)
        loss, rate = found["loss"], float(found["images_per_second"])
        return LogLine(int(found["step"]), None if loss is None else float(loss), rate)
    except (ValueError, TypeError, KeyError):
        return None


def thinned(lines: Sequence[LogLine], num_points: int = MAX_POINTS) -> list[tuple[int, float]]:
    """Return at most so many points of the loss: means over equal stretches, at each stretch's last step."""
    known = [(line.step, line.loss) for line in lines if line.loss is not None]
    width = max(1, math.ceil(len(known) / num_points))
    stretches = [known[start : start + width] for start in range(0, len(known), width)]
    return [(part[-1][0], statistics.fmean(loss for _, loss in part)) for part in stretches]


def seconds_left(
    lines: Sequence[LogLine], run: Path, num_steps: int, *, batch_size: int, began: float
) -> float | None:
    """Estimate how long the updates that are left take, with the pictures in between; None without a log.

    The pace is that between the first and the last pictures that this process drew (since `began`, seconds
    since 1970), which has everything in it; before there are two, that of the last updates alone.
    """
    if not lines:
        return None
    left = max(0, num_steps - lines[-1].step)
    times = {step: paths[0].stat().st_mtime for step, paths in samples_by_step(run).items()}
    drawn = sorted(step for step, time in times.items() if time >= began)
    if len(drawn) >= 2:
        pace = (times[drawn[-1]] - times[drawn[0]]) / (drawn[-1] - drawn[0])
        return left * pace
    rates = [line.images_per_second for line in lines[-_PACE_STEPS:] if line.images_per_second > 0]
    return left * batch_size / statistics.median(rates) if rates else None


def samples_by_step(run: Path) -> dict[int, list[Path]]:
    """Return the pictures that were drawn after so many updates, in the order of their names."""
    found = {}
    for path in _entries(run / SAMPLES_FOLDER):
        match = _STEP_FOLDER.fullmatch(path.name)
        pictures = _pictures(path) if match else []
        if match and pictures:
            found[int(match[1])] = pictures
    return dict(sorted(found.items()))


def base_samples(run: Path) -> list[Path]:
    """Return the same pictures as the base draws them."""
    return _pictures(run / SAMPLES_FOLDER / BASE_FOLDER)


def newest_saved_step(run: Path) -> int:
    """Return the step of the newest checkpoint that looks whole; 0 where there is none."""
    steps = [
        int(match[1])
        for path in _entries(run)
        if (match := _CHECKPOINT.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return max(steps, default=0)


def read_tail(output: Path, start: int) -> list[str]:
    """Return the last lines of what a process wrote from byte `start` on; progress bars are lines, too."""
    try:
        with output.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(min(start, size), size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]


def was_stopped(lines: Sequence[str]) -> bool:
    """Say whether a trainer said, as its last word, that a signal stopped it."""
    return bool(lines) and any(_STOPPED.search(line) for line in lines[-3:])


def last_error(lines: Sequence[str]) -> str | None:
    """Return the sentence that a trainer ended with, or the last line of its traceback, escaped."""
    ours = [line.removeprefix(_PROGRAM) for line in lines if line.startswith(_PROGRAM)]
    if ours:
        return printable(" ".join(ours), 1000)
    for line in reversed(lines):
        match = _ERROR_LINE.fullmatch(line)
        if match and match["kind"] != "Warning":
            return printable(match["text"] or match["kind"], 500)
    return None


def _pictures(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.suffix == ".png" and not path.name.startswith(".")]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []

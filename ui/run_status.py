"""How a run stands, read from disk alone: it matters not which server started it, or whether that lives."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ether_diffusion.adapters.format import CARD_NAME, CONFIG_NAME, TENSORS_NAME
from ether_diffusion.training.run_lock import Holder
from ether_diffusion.ui.run_log import (
    LogLine,
    base_samples,
    last_error,
    newest_saved_step,
    read_log,
    read_tail,
    samples_by_step,
    seconds_left,
    thinned,
    was_stopped,
)
from ether_diffusion.ui.run_record import (
    OUTPUT_NAME,
    RunRecord,
    Wish,
    living_process,
    read_library_id,
    read_record,
    read_wish,
)
from ether_diffusion.ui.training_request import output_folder

State = Literal["starting", "running", "paused", "stopped", "crashed", "finished", "waiting"]
_RESULT = (CONFIG_NAME, TENSORS_NAME, CARD_NAME)
"""What a finished run has; the card is written last."""


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


def read_status(folder: Path) -> RunStatus:
    """Read how the run in a folder stands.

    Raises:
        FileNotFoundError: the folder is gone.
        ValueError: its request is damaged.
    """
    record, wish, run = read_record(folder), read_wish(folder), output_folder(folder)
    process, lines = living_process(folder), read_log(run)
    tail = read_tail(folder / OUTPUT_NAME, wish.output_from)
    state = _state(process, wish, run, tail, is_training=_has_trained(run, wish))
    left = seconds_left(lines, run, record.num_steps, batch_size=record.batch_size, began=wish.began)
    is_done = state == "finished"
    return RunStatus(
        id=folder.name,
        name=record.name,
        state=state,
        step=lines[-1].step if lines else 0,
        num_steps=record.num_steps,
        seconds_left=left if state == "running" else None,
        losses=thinned(lines),
        samples=[(step, path) for step, paths in samples_by_step(run).items() for path in paths],
        base_samples=base_samples(run),
        sentence=_sentence(state, record, wish, run, lines, tail),
        can_stop=process is not None or state == "paused",
        can_pause=process is not None and wish.asked == 0,
        can_resume=process is None and not is_done,
        adapter=run if is_done else None,
        command=record.command,
        trigger=record.trigger,
        created=datetime.fromtimestamp(record.created, UTC),
        library_id=read_library_id(folder),
    )


def has_result(run: Path) -> bool:
    """Say whether a trainer wrote its result to the end."""
    return all((run / name).is_file() for name in _RESULT)


def _state(process: Holder | None, wish: Wish, run: Path, tail: list[str], *, is_training: bool) -> State:
    if process is not None:
        return "running" if is_training else "starting"
    if has_result(run):
        return "finished"
    if wish.wanted != "running":
        return wish.wanted
    return "stopped" if was_stopped(tail) else "crashed"


def _has_trained(run: Path, wish: Wish) -> bool:
    """Say whether the process that began last has done an update."""
    log = run / "log.jsonl"
    return log.is_file() and log.stat().st_size > 0 and log.stat().st_mtime >= wish.began


def _sentence(
    state: State, record: RunRecord, wish: Wish, run: Path, lines: list[LogLine], tail: list[str]
) -> str:
    step = lines[-1].step if lines else 0
    saved = newest_saved_step(run)
    onward = f"Resume goes on from step {saved}." if saved else "Resume begins with the first step."
    if state in ("starting", "running") and wish.asked:
        verb = "Pausing" if wish.wanted == "paused" else "Stopping"
        return f"{verb}: the step in progress is finished and saved. Press Stop again to end it at once."
    if state == "starting":
        return "Loading the base and looking at the photos."
    if state == "running":
        if step >= record.num_steps:
            return "Drawing the last pictures and writing the adapter."
        return f"Training, step {step} of {record.num_steps}."
    if state == "finished":
        return f"Done: {record.name} was learned in {step} steps. Call it by “{record.trigger}”."
    if state == "paused":
        return f"Paused at step {saved} of {record.num_steps}. {onward}"
    if state == "stopped" and saved:
        return f"Stopped at step {saved} of {record.num_steps}. What was learned until then is kept. {onward}"
    if state == "stopped":
        return f"Stopped before anything was saved; the photos are kept. {onward}"
    reason = _without_paths(last_error(tail), run)
    if reason is None:
        return (
            f"Training ended at step {step} without a word: it was killed, or the memory or the machine gave "
            f"out. {onward}"
        )
    return f"Training ended at step {step}: {reason.rstrip('.')}. {onward}"


def _without_paths(sentence: str | None, run: Path) -> str | None:
    """Shorten paths of this machine, which are nobody's business, to what people know them by."""
    if sentence is None:
        return None
    studio = run.parent.parent.parent
    home = os.path.expanduser("~")  # noqa: PTH111  (Path.home raises where there is none)
    words = {run: "the run's folder", run.parent: "the run", studio: "the studio", home: "~"}
    for path, word in words.items():
        sentence = sentence.replace(str(path), word)
    return sentence

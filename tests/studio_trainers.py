"""Stand-ins for the trainer that a studio starts: small programs that leave the files it leaves."""

import time
from collections.abc import Callable
from pathlib import Path

from photo_files import photo

from ether_diffusion.ui.run import Run
from ether_diffusion.ui.runs import Runs
from ether_diffusion.ui.train_request import TrainRequest
from ether_diffusion.ui.uploads import take_photos

TRAINER = """
import json, signal, sys, time
from pathlib import Path
run, num_steps, fate = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
run.mkdir(exist_ok=True)
asked = []
signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
saved = [int(path.name[11:]) for path in run.glob("checkpoint-*")]
step = max(saved, default=0)
log = run / "log.jsonl"
lines = log.read_text().splitlines()[:step] if log.exists() else []
log.write_text("".join(line + "\\n" for line in lines))
def save():
    folder = run / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
while step < num_steps:
    step += 1
    with log.open("a") as file:
        file.write(json.dumps({"step": step, "loss": 1 / step, "images_per_second": 100.0}) + "\\n")
    if fate == "crash" and step == 3:
        print("train-dreambooth: memory ran out in " + str(run), file=sys.stderr)
        sys.exit(2)
    if fate == "traceback" and step == 3:
        raise RuntimeError("the machine \\x1b[31m is on fire")
    if asked and fate != "deaf":
        save()
        print("stopped by SIGINT; the same command goes on from here")
        sys.exit(130)
    while fate in ("wait", "deaf") and step == 3 and not (asked and fate == "wait"):
        time.sleep(0.01)
for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
    (run / name).write_text("{}")
"""
"""Saves where it is asked to stop, and goes on from there; `fate` says what happens at step 3."""


class StandInRuns(Runs):
    """Runs whose command is the stand-in's."""

    fate = "wait"

    def _prepare(self, folder: Path, request: TrainRequest, now: object) -> None:
        super()._prepare(folder, request, now)  # type: ignore[arg-type]  # as the caller gives it
        set_fate(folder, self.fate)


def set_fate(folder: Path, fate: str) -> None:
    """Say what becomes of a run the next time that it is started."""
    record = Run(folder).record
    command = [record.command[0], "-c", TRAINER, str(folder / "run"), str(record.num_steps), fate]
    record.model_copy(update={"command": command}).write(folder)


def make_runs(tmp_path: Path, fate: str = "wait") -> StandInRuns:
    """Return runs in a studio in tmp_path."""
    runs = StandInRuns(tmp_path / "studio" / "runs", tmp_path / "studio" / "temp", base="tiny_world")
    runs.fate = fate
    return runs


def request(runs: Runs, *, num_steps: int = 5, name: str = "Fox") -> TrainRequest:
    """Return a request of one photo that was checked."""
    sent = runs.temp.parent / "sent"
    sent.mkdir(parents=True, exist_ok=True)
    (sent / "a.png").write_bytes(photo())
    (photo_taken,), _ = take_photos([sent / "a.png"], runs.photos)
    return TrainRequest((photo_taken.path,), "animal", name, "fast", {"max_train_steps": num_steps})


def wait_until(runs: Runs, run_id: str, done: Callable[[Run], bool], *, seconds: float = 60) -> Run:
    """Look until a run stands as wished."""
    end = time.monotonic() + seconds
    while not done(status := runs.status(run_id)):
        assert time.monotonic() < end, f"{status.state}: {status.sentence}"
        time.sleep(0.02)
    return status

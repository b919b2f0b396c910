"""Training runs of a studio: each a process of its own that needs no server, begun, ended and kept."""

import json
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ether_diffusion
from ether_diffusion.durable_files import write_files
from ether_diffusion.options import declared
from ether_diffusion.scripts.train_dreambooth import CallFlags, parse_flags
from ether_diffusion.training import run_lock
from ether_diffusion.training.config.presets import PRESET_VALUES, stack
from ether_diffusion.training.result import EVALUATION_NAME
from ether_diffusion.ui.jobs import in_background
from ether_diffusion.ui.library import Card, Library
from ether_diffusion.ui.run import GONE, RESULT, LibraryEntry, Record, Run, Wanted, Wish, living_process
from ether_diffusion.ui.train_request import TRAINER, TrainRequest
from ether_diffusion.ui.words import disk_explained
from ether_diffusion.wording import listed, printable

NICENESS = 10  # added to a trainer's, so that the page and pictures in between stay quick
MAX_TOGETHER = 8  # runs that wait and are trained by one process, then
JOBS_NAME = "jobs.json"
_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
_ENDING = ("--max_train_steps=", "--stop_when_good", "--allow_changes")
logger = logging.getLogger(__name__)


class Runs:
    """The runs in a folder, which any number of servers may look after; `temp` takes photos before.

    One process trains at a time; runs that wait for its end are trained together, by one process, where they
    share a base. They begin within `turn`, which is told whether to wait for pictures or to refuse.

    FileNotFoundError where there is no run of an id; ValueError where the disk is full, or a run stands
    otherwise than what is asked of it.
    """

    def __init__(
        self, root: Path, temp: Path, *, base: str,
        turn: Callable[[bool], AbstractContextManager[None]] = lambda waits: nullcontext(),
    ) -> None:  # fmt: skip
        self.root, self.temp, self.photos, self.turn = root, temp, temp / "photos", turn
        # a run that goes on later may be started from another working directory
        self.base = str(Path(base).resolve()) if Path(base).exists() else base

    def ids(self) -> list[str]:
        """Return the ids of all runs, the newest first."""
        found = (path.name for path in self.root.glob("*") if _ID.fullmatch(path.name) and path.is_dir())
        return sorted(found, reverse=True)

    def status(self, run_id: str) -> Run:
        """Return how a run stands now."""
        return Run(self._folder(run_id))

    def all(self) -> list[Run]:
        """Return how all runs stand, the newest first; those whose request is damaged are left out."""
        found = []
        for run_id in self.ids():
            with suppress(FileNotFoundError, ValueError):
                found.append(Run(self.root / run_id))
        return found

    def start(self, request: TrainRequest) -> str:
        """Start a run in a process of its own and return its id; while another is trained, it waits."""
        photos, own = request.photos, self.temp.resolve()
        if not all(photo.resolve().is_relative_to(own) for photo in photos):
            raise ValueError("there is a photo that was not uploaded here; add the photos again")
        if gone := sum(not photo.is_file() for photo in photos):
            kept = "as uploads are kept for a while; add them again"
            raise ValueError(f"{gone} of {len(photos)} photos are gone, {kept}")
        with self._begun() as (folder, now):
            self._prepare(folder, request, now)
        return folder.name

    def stop(self, run_id: str, *, wanted: Wanted = "stopped") -> None:
        """Ask a run to save and end. Asked again, it ends at once; asked a third time, it is killed.

        Those that are trained with it go on in a process anew.
        """
        folder = self._folder(run_id)
        with self._alone("stopping the training"):
            process, wish = living_process(folder), Wish.find(folder) or Wish()
            if process is None and wish.wanted not in ("paused", "queued"):  # it ended by itself just now
                return
            if process is not None and not (process.is_here or process.is_gone()):  # just now
                raise ValueError(f"this run is trained on {printable(process.host)}; stop it there")
            asked = wish.asked + (process is not None)
            wish.model_copy(update={"wanted": wanted, "asked": asked}).write(folder)
            for other in self.all() if process is not None and wish.together else ():
                if other.process == process and other.id != run_id and other.wish.wanted == "running":
                    other.wish.model_copy(update={"wanted": "queued"}).write(other.folder)
        if process is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL if asked > 2 else signal.SIGINT)

    def pause(self, run_id: str) -> None:
        """Ask a run to save and end, meaning to go on."""
        self.stop(run_id, wanted="paused")

    def resume(self, run_id: str) -> None:
        """Go on with a run that ended before its last step, as soon as none is trained."""
        folder = self._folder(run_id)
        with self.turn(False), self._alone("going on with the training"):
            run = Run(folder)
            if not run.can_resume:
                ended = "training already" if run.process else "finished; there is nothing to go on with"
                raise ValueError(f"“{run.name}” is {ended}")
            Wish(wanted="queued").write(folder)
            self._advance()

    def advance(self) -> None:
        """Start what waits, unless something is being trained; where the disk is full it waits on."""
        if not any(run.state == "queued" for run in self.all()):
            return
        try:
            with self.turn(True), run_lock.guarded(self.root):
                self._advance()
        except OSError as error:
            logger.warning("what waits is not trained yet: %s", error)

    def _advance(self) -> None:
        if any(living_process(self.root / run_id) is not None for run_id in self.ids()):
            return
        if queued := [run for run in self.all()[::-1] if run.state == "queued"]:
            process = _launch([run for run in queued if run.base == queued[0].base][:MAX_TOGETHER])

            def follow() -> None:  # a child that nobody waits for stays in the table of processes
                process.wait()
                self.advance()

            in_background(follow)

    def train_on(self, run_id: str, step: int) -> str:
        """Begin another run that goes on from a step of this one, for as many steps again; return its id."""
        run = self.status(run_id)
        _check_saved(run, step)
        num_steps, name = step + run.num_steps, f"{run.name}, on from step {step}"
        later = [f"checkpoint-{other}" for other in run.saved_steps if other != step]
        left = shutil.ignore_patterns(*later, *RESULT, EVALUATION_NAME, run_lock.LOCK_NAME, ".*")
        with self._begun() as (folder, now):
            for part in ("photos", "class_images"):
                if (run.folder / part).is_dir():
                    shutil.copytree(run.folder / part, folder / part)
            shutil.copytree(run.output, folder / "run", ignore=left)
            kept = [word for word in run.command if not word.startswith(_ENDING)]
            command = [word.replace(str(run.folder), str(folder)) for word in kept]
            command += [f"--max_train_steps={num_steps}", "--allow_changes"]
            changes = {"name": name, "num_steps": num_steps, "command": command, "created": now.timestamp()}
            run.record.model_copy(update=changes).write(folder)
        return folder.name

    def adopt(self, run_id: str, library: Library, step: int | None = None) -> Card:
        """Put the adapter that a run made, finished or not, into a library, once however often asked.

        With a step it is that of the checkpoint then.
        """
        folder = self._folder(run_id)
        with self._alone("keeping the adapter"):
            run = Run(folder)
            if step is None and not run.can_use:
                raise ValueError(f"“{run.name}” has saved nothing yet; wait for its last step, or stop it")
            if step is None and run.adapter is None:
                step = run.saved_step
            if step is not None:  # it may go on: what is used now is one of its own
                _check_saved(run, step)
                name, saved = f"{run.name}, step {step}", run.output / f"checkpoint-{step}"
                known = next((card for card in library.cards() if card.name == name), None)
                return known or library.add_run_result(saved, name)
            if run.library_id is not None:
                with suppress(FileNotFoundError):  # deleted from the library since
                    return library.card(run.library_id)
            card = library.add_run_result(run.output, run.name)
            LibraryEntry(id=card.id).write(folder)
            return card

    def delete(self, run_id: str) -> None:
        """Delete a run with its photos, pictures and checkpoints."""
        folder = self._folder(run_id)
        aside = folder.with_name(f".{folder.name}.deleted")
        with self._alone("deleting the run"):
            if living_process(folder) is not None:
                raise ValueError("this run is training; stop it first")
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _alone(self, doing: str) -> Iterator[None]:
        """Keep other servers away from the runs for a moment, and say what the disk refuses."""
        with disk_explained(self.root, doing):
            self.root.mkdir(parents=True, exist_ok=True)
            with run_lock.guarded(self.root):
                yield

    @contextmanager
    def _begun(self) -> Iterator[tuple[Path, datetime]]:
        """Give the folder of a run that begins now, and have it trained; where that fails, it is gone."""
        now = datetime.now(UTC)
        folder = self.root / f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        with self.turn(False), self._alone("starting the training"):
            try:
                yield folder, now
                Wish(wanted="queued").write(folder)
                self._advance()
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    def _prepare(self, folder: Path, request: TrainRequest, now: datetime) -> None:
        (folder / "photos").mkdir(parents=True)
        for number, photo in enumerate(request.photos, 1):
            shutil.copyfile(photo, folder / "photos" / f"photo-{number:03d}{photo.suffix}")
        for number, caption in enumerate(request.captions, 1):
            if caption:
                (folder / "photos" / f"photo-{number:03d}.txt").write_text(caption, encoding="utf-8")
        config = request.config(folder, self.base)
        num_steps, batch_size = config.optimization.max_train_steps, config.optimization.train_batch_size
        assert num_steps is not None
        Record(
            name=printable(request.name.strip() or request.subject.strip()), created=now.timestamp(),
            trigger=request.trigger(self.base), command=request.command(folder, self.base),
            num_steps=num_steps, batch_size=batch_size,
        ).write(folder)  # fmt: skip

    def _folder(self, run_id: str) -> Path:
        folder = self.root / run_id
        if not _ID.fullmatch(run_id) or not folder.is_dir():
            raise FileNotFoundError(GONE)
        return folder


def _check_saved(run: Run, step: int) -> None:
    if step not in run.saved_steps:
        kept = listed(run.saved_steps) or "none"
        raise ValueError(f"nothing was saved at step {step}; choose one of those that were: {kept}")


def _launch(runs: Sequence[Run]) -> "subprocess.Popen[bytes]":
    """Run their command in a session of its own, so that nothing that ends the server ends it."""
    output, command = runs[0].log, [sys.executable, *_command(runs)[1:]]  # its Python may be replaced since
    if output.exists() and output.stat().st_nlink > 1:  # others look at it
        output.unlink()
    written = output.stat().st_size if output.exists() else 0
    for run in runs:
        Wish(began=time.time(), output_from=written, together=len(runs) > 1).write(run.folder)
    variables, root = {**os.environ, "PYTHONUNBUFFERED": "1"}, Path(ether_diffusion.__file__).parent.parent
    if (root / "pyproject.toml").is_file():  # a checkout is found where it is
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    with output.open("ab") as file:
        streams: Any = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=variables, start_new_session=True, **streams)
    holder = run_lock.holder_of(process.pid)
    for run in runs:
        run_lock.write_holder(run.process_file, holder)
    for run in runs[1:]:
        with suppress(OSError):  # a file system without links: what it said is in the first one's
            run.log.unlink(missing_ok=True)
            os.link(output, run.log)
    with suppress(OSError, AttributeError):  # Windows has no such priorities
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, process.pid, min(own + NICENESS, 19))
    logger.info("training %s in process %d", ", ".join(run.id for run in runs), process.pid)
    return process


def _command(runs: Sequence[Run]) -> list[str]:
    """Return the command of a run, or one that trains several together, by a list beside the first."""
    if len(runs) == 1:
        return runs[0].command
    jobs = list[dict[str, Any]]()
    for run in runs:
        words = vars(parse_flags(run.command[len(TRAINER) :]))
        own = {name: value for name, value in words.items() if name not in declared(CallFlags)}
        jobs.append(stack(PRESET_VALUES[words["preset"]] if words["preset"] else {}, own))
    write_files(runs[0].folder, {JOBS_NAME: json.dumps(jobs, indent=1, default=str).encode()})
    return [*TRAINER, f"--jobs={runs[0].folder / JOBS_NAME}"]

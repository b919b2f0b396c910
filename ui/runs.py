"""Training runs of a studio: each a process of its own that needs no server, watched through its files."""

import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import ether_diffusion
from ether_diffusion.training.run_lock import guarded, holder_of, write_holder
from ether_diffusion.ui.errors import disk_explained
from ether_diffusion.ui.library import Card, Library
from ether_diffusion.ui.run_status import (
    GONE,
    LIBRARY_NAME,
    OUTPUT_NAME,
    PROCESS_NAME,
    REQUEST_NAME,
    WISH_NAME,
    LibraryEntry,
    RunRecord,
    RunStatus,
    Wanted,
    Wish,
    has_result,
    living_process,
    read_record,
    read_status,
    read_wish,
    write_facts,
)
from ether_diffusion.ui.training_request import TrainRequest, output_folder, photos_folder, train_command
from ether_diffusion.ui.uploads import IntakeReport, take_photos
from ether_diffusion.wording import printable

NICENESS = 10
"""Added to a trainer's, so that the page and pictures in between stay quick."""
_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
logger = logging.getLogger(__name__)


class Runs:
    """The runs in a folder; `temp` takes photos until a run has its own copies, and `base` is learned on.

    Any number of servers may look after one folder: what is known lies on disk. Wherever an id is given:
    FileNotFoundError where there is no such run, or no longer.
    """

    def __init__(self, root: Path, temp: Path, *, base: str) -> None:
        self.root, self.temp = root, temp
        # a run that goes on later may be started from another working directory
        self.base = str(Path(base).resolve()) if Path(base).is_dir() else base

    @property
    def photos(self) -> Path:
        """Where photos wait that were checked, until a run has its own copies."""
        return self.temp / "photos"

    def check_photos(self, paths: Sequence[Path]) -> IntakeReport:
        """Look at uploaded files, as `take_photos` does."""
        return take_photos(paths, self.photos)

    def ids(self) -> list[str]:
        """Return the ids of all runs, the newest first."""
        return [folder.name for folder in self._folders()]

    def status(self, run_id: str) -> RunStatus:
        """Return how a run stands.

        Raises:
            ValueError: its request is damaged.
        """
        return read_status(self._folder(run_id))

    def all(self) -> list[RunStatus]:
        """Return how all runs stand, the newest first; those whose request is damaged are left out."""
        found = []
        for folder in self._folders():
            with suppress(FileNotFoundError, ValueError):
                found.append(read_status(folder))
        return found

    def command(self, request: TrainRequest) -> list[str]:
        """Return the command that `start` would run, with ID in place of the run's folder."""
        return train_command(request, self.root / "ID", self.base)

    def start(self, request: TrainRequest) -> str:
        """Start a run in a process of its own and return its id.

        Raises:
            ValueError: another run is training, a photo is none that was checked here, or the disk is full.
        """
        self._check_photos(request)
        now = datetime.now(UTC)
        folder = self.root / f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        with disk_explained(self.root, "starting the training"):
            self.root.mkdir(parents=True, exist_ok=True)
            with guarded(self.root):
                self._check_alone()
                try:
                    self._prepare(folder, request, now)
                    _launch(folder)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
        return folder.name

    def stop(self, run_id: str) -> None:
        """Ask a run to save and end. Asked again, it ends at once; asked a third time, it is killed.

        Raises:
            ValueError: its process is on another machine.
        """
        self._end(run_id, "stopped")

    def pause(self, run_id: str) -> None:
        """Ask a run to save and end, meaning to go on; errors are as `stop`'s."""
        self._end(run_id, "paused")

    def resume(self, run_id: str) -> None:
        """Go on with a run that ended before its last step, by the same command.

        Raises:
            ValueError: it is training or finished, another one is training, or the disk is full.
        """
        folder = self._folder(run_id)
        name = read_record(folder).name
        with disk_explained(folder, "going on with the training"), guarded(self.root):
            if living_process(folder) is not None:
                raise ValueError(f"{name} is training already")
            if has_result(output_folder(folder)):
                raise ValueError(f"{name} is finished; there is nothing to go on with")
            self._check_alone()
            _launch(folder)

    def adopt(self, run_id: str, library: Library) -> Card:
        """Put the adapter that a finished run made into a library, once however often it is asked for.

        Raises:
            ValueError: it is not finished, or the disk is full.
        """
        folder = self._folder(run_id)
        with disk_explained(folder, "keeping the adapter"), guarded(self.root):
            status = read_status(folder)
            if status.adapter is None:
                raise ValueError(f"{status.name} is not finished; wait for its last step")
            if status.library_id is not None:
                with suppress(FileNotFoundError):  # deleted from the library since
                    return library.card(status.library_id)
            card = library.add_run_result(status.adapter, status.name)
            write_facts(folder, LIBRARY_NAME, LibraryEntry(id=card.id))
            return card

    def delete(self, run_id: str) -> None:
        """Delete a run with its photos, pictures and checkpoints.

        Raises:
            ValueError: it is training.
        """
        folder = self._folder(run_id)
        with disk_explained(folder, "deleting the run"), guarded(self.root):
            if living_process(folder) is not None:
                raise ValueError("this run is training; stop it first")
            aside = folder.with_name(f".{folder.name}.deleted")
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _prepare(self, folder: Path, request: TrainRequest, now: datetime) -> None:
        photos_folder(folder).mkdir(parents=True)
        for number, photo in enumerate(request.photos, 1):
            shutil.copyfile(photo, photos_folder(folder) / f"photo-{number:03d}{photo.suffix}")
        record = RunRecord(
            name=printable(request.shown_name),
            trigger=request.trigger(self.base),
            num_steps=request.num_steps,
            batch_size=request.batch_size(self.base),
            command=train_command(request, folder, self.base),
            created=now.timestamp(),
        )
        write_facts(folder, REQUEST_NAME, record)

    def _end(self, run_id: str, wanted: Wanted) -> None:
        folder = self._folder(run_id)
        with disk_explained(folder, "stopping the training"), guarded(self.root):
            process, wish = living_process(folder), read_wish(folder)
            if process is None and wish.wanted != "paused":  # it ended by itself just now
                return
            if process is not None and not process.is_here:
                raise ValueError(f"this run is trained on {printable(process.host)}; stop it there")
            asked = wish.asked if process is None else wish.asked + 1
            write_facts(folder, WISH_NAME, wish.model_copy(update={"wanted": wanted, "asked": asked}))
        if process is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL if asked > 2 else signal.SIGINT)

    def _check_photos(self, request: TrainRequest) -> None:
        own = self.temp.resolve()
        if not all(photo.resolve().is_relative_to(own) for photo in request.photos):
            raise ValueError("there is a photo that was not uploaded here; add the photos again")
        gone = [photo for photo in request.photos if not photo.is_file()]
        if gone:
            raise ValueError(
                f"{len(gone)} of {len(request.photos)} photos are gone, as uploads are kept for a while; "
                "add them again"
            )

    def _check_alone(self) -> None:
        """Refuse a second training: two share the memory and are both slower."""
        for folder in self._folders():
            if living_process(folder) is not None:
                name = "another subject"
                with suppress(ValueError):
                    name = read_record(folder).name
                raise ValueError(
                    f"{name} is being trained, and one training runs at a time; wait for it, or pause it"
                )

    def _folder(self, run_id: str) -> Path:
        folder = self.root / run_id
        if not _ID.fullmatch(run_id) or not folder.is_dir():
            raise FileNotFoundError(GONE)
        return folder

    def _folders(self) -> list[Path]:
        """Return the folders of all runs, the newest first."""
        return sorted((p for p in self.root.glob("*") if _ID.fullmatch(p.name) and p.is_dir()), reverse=True)


def _launch(folder: Path) -> None:
    """Run a run's command in a session of its own, so that nothing that ends the server ends it."""
    command, output = read_record(folder).command, folder / OUTPUT_NAME
    if not Path(command[0]).exists():  # a Python that was replaced since
        command = [sys.executable, *command[1:]]
    written = output.stat().st_size if output.exists() else 0
    write_facts(folder, WISH_NAME, Wish(wanted="running", began=time.time(), output_from=written))
    with output.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
    write_holder(folder / PROCESS_NAME, holder_of(process.pid))
    with suppress(OSError, AttributeError):  # Windows has no such priorities
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, process.pid, min(own + NICENESS, 19))
    # a child that nobody waits for stays in the table of processes
    threading.Thread(target=process.wait, name=f"wait for {folder.name}", daemon=True).start()
    logger.info("training %s in process %d", folder.name, process.pid)


def _environment() -> dict[str, str]:
    """Return this process's variables; in a checkout, with the place that the package is found at."""
    root = Path(ether_diffusion.__file__).parent.parent
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if (root / "pyproject.toml").is_file():
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return variables

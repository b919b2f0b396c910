"""Training runs of a studio: each a process of its own that needs no server, watched through its files."""

import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import ether_diffusion
from ether_diffusion.adapter_file.wording import printable
from ether_diffusion.training.run_lock import LOCK_NAME, guarded, holder_of, write_holder
from ether_diffusion.ui.run_record import (
    GONE,
    OUTPUT_NAME,
    PROCESS_NAME,
    RunRecord,
    Wanted,
    asked_once_more,
    living_process,
    new_wish,
    read_record,
    read_wish,
    write_record,
    write_wish,
)
from ether_diffusion.ui.run_status import RunStatus, has_result, read_status
from ether_diffusion.ui.shortages import disk_explained
from ether_diffusion.ui.training_request import TrainRequest, output_folder, photos_folder, train_command
from ether_diffusion.ui.uploads import IntakeReport, take_photos

NICENESS = 10
"""Added to a trainer's, so that the page and pictures in between stay quick."""
_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")

logger = logging.getLogger(__name__)


class Runs:
    """The runs in a folder; `temp` takes photos until a run has its own copies, and `base` is learned on.

    Any number of servers may look after one folder: what is known lies on disk.
    """

    def __init__(self, root: Path, temp: Path, *, base: str) -> None:
        self.root, self.temp, self.base = root, temp, base

    def check_photos(self, paths: Sequence[Path]) -> IntakeReport:
        """Look at uploaded files: what can be trained on is copied, the rest has a reason each.

        Raises:
            ValueError: the disk is full or cannot be written to.
        """
        return take_photos(paths, self.temp / "photos")

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
        run_id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        folder = self.root / run_id
        with disk_explained(self.root, "starting the training"):
            self.root.mkdir(parents=True, exist_ok=True)
            with guarded(self.root):
                self._check_alone()
                try:
                    self._prepare(folder, request, now)
                    self._launch(folder)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
        return run_id

    def status(self, run_id: str) -> RunStatus:
        """Return how a run stands.

        Raises:
            FileNotFoundError: there is no such run, or no longer.
            ValueError: its request is damaged.
        """
        return read_status(self._folder(run_id))

    def all(self) -> list[RunStatus]:
        """Return how all runs stand, the newest first; those whose request is damaged are left out."""
        found = []
        for folder in sorted(self._folders(), reverse=True):
            with suppress(FileNotFoundError, ValueError):
                found.append(read_status(folder))
        return found

    def stop(self, run_id: str) -> None:
        """Ask a run to save and end. Asked again, it ends at once; asked a third time, it is killed.

        Raises:
            FileNotFoundError: there is no such run.
            ValueError: its process is on another machine.
        """
        self._end(run_id, "stopped")

    def pause(self, run_id: str) -> None:
        """Ask a run to save and end, meaning to go on; errors are as `stop`'s."""
        self._end(run_id, "paused")

    def resume(self, run_id: str) -> None:
        """Go on with a run that ended before its last step, by the same command.

        Raises:
            FileNotFoundError: there is no such run.
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
            # a lock of this machine is taken over; that of a machine that is gone would hold it for ever
            (output_folder(folder) / LOCK_NAME).unlink(missing_ok=True)
            self._launch(folder)

    def delete(self, run_id: str) -> None:
        """Delete a run with its photos, pictures and checkpoints.

        Raises:
            FileNotFoundError: there is no such run.
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
            command=train_command(request, folder, self.base),
            created=now.timestamp(),
        )
        write_record(folder, record)

    def _launch(self, folder: Path) -> None:
        """Run the command in a session of its own, so that nothing that ends the server ends it."""
        command, wish = read_record(folder).command, new_wish(folder)
        write_wish(folder, wish)
        with (folder / OUTPUT_NAME).open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
        write_holder(folder / PROCESS_NAME, holder_of(process.pid))
        with suppress(OSError, AttributeError):  # Windows has no such priorities
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        # a child that nobody waits for stays in the table of processes
        threading.Thread(target=process.wait, name=f"wait for {folder.name}", daemon=True).start()
        logger.info("training %s in process %d", folder.name, process.pid)

    def _end(self, run_id: str, wanted: Wanted) -> None:
        folder = self._folder(run_id)
        with disk_explained(folder, "stopping the training"), guarded(self.root):
            process, wish = living_process(folder), read_wish(folder)
            if process is not None and not process.is_here:
                raise ValueError(f"this run is trained on {printable(process.host)}; stop it there")
            asked = asked_once_more(wish, wanted)
            write_wish(folder, asked)
        if process is None:
            return
        number = signal.SIGKILL if asked.asked > 2 else signal.SIGINT
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)

    def _check_photos(self, request: TrainRequest) -> None:
        own = self.temp.resolve()
        strange = [photo for photo in request.photos if not photo.resolve().is_relative_to(own)]
        gone = [photo for photo in request.photos if not photo.is_file()]
        if strange:
            raise ValueError("there is a photo that was not uploaded here; add the photos again")
        if gone:
            raise ValueError(
                f"{len(gone)} of {len(request.photos)} photos are gone, as uploads are kept for a while; "
                "add them again"
            )

    def _check_alone(self) -> None:
        """Refuse a second training: two share the memory and are both slower."""
        for folder in self._folders():
            if living_process(folder) is not None:
                name = _name_of(folder)
                raise ValueError(
                    f"{name} is being trained, and one training runs at a time; wait for it, or pause it"
                )

    def _folder(self, run_id: str) -> Path:
        folder = self.root / run_id
        if not _ID.fullmatch(run_id) or not folder.is_dir():
            raise FileNotFoundError(GONE)
        return folder

    def _folders(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        return [path for path in self.root.iterdir() if _ID.fullmatch(path.name) and path.is_dir()]


def _name_of(folder: Path) -> str:
    try:
        return read_record(folder).name
    except ValueError:
        return "another subject"


def _environment() -> dict[str, str]:
    """Return this process's variables; in a checkout, with the place that the package is found at."""
    root = Path(ether_diffusion.__file__).parent.parent
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if (root / "pyproject.toml").is_file():
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return variables

"""Training runs of a studio: each a process of its own that needs no server, watched through its files."""

import os
import re
import secrets
import shutil
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from ether_diffusion.training.run_lock import guarded
from ether_diffusion.ui.cards import Card
from ether_diffusion.ui.errors import disk_explained
from ether_diffusion.ui.launching import launch
from ether_diffusion.ui.library import Library
from ether_diffusion.ui.run_record import (
    GONE,
    RunRecord,
    Wanted,
    asked_once_more,
    living_process,
    read_record,
    read_wish,
    write_library_id,
    write_record,
    write_wish,
)
from ether_diffusion.ui.run_status import RunStatus, has_result, read_status
from ether_diffusion.ui.training_request import TrainRequest, output_folder, photos_folder, train_command
from ether_diffusion.ui.uploads import IntakeReport, take_photos
from ether_diffusion.wording import printable

_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")


class Runs:
    """The runs in a folder; `temp` takes photos until a run has its own copies, and `base` is learned on.

    Any number of servers may look after one folder: what is known lies on disk.
    """

    def __init__(self, root: Path, temp: Path, *, base: str) -> None:
        self.root, self.temp = root, temp
        # a run that goes on later may be started from another working directory
        self.base = str(Path(base).resolve()) if Path(base).is_dir() else base

    def check_photos(self, paths: Sequence[Path]) -> IntakeReport:
        """Look at uploaded files: what can be trained on is copied, the rest has a reason each.

        Raises:
            ValueError: the disk is full or cannot be written to.
        """
        return take_photos(paths, self.photos)

    @property
    def photos(self) -> Path:
        """Where photos wait that were checked, until a run has its own copies."""
        return self.temp / "photos"

    def ids(self) -> list[str]:
        """Return the ids of all runs, the newest first."""
        return sorted((folder.name for folder in self._folders()), reverse=True)

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
                    launch(folder)
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
            launch(folder)

    def adopt(self, run_id: str, library: Library) -> Card:
        """Put the adapter that a finished run made into a library, once however often it is asked for.

        Raises:
            FileNotFoundError: there is no such run.
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
            write_library_id(folder, card.id)
            return card

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
            batch_size=request.batch_size(self.base),
            command=train_command(request, folder, self.base),
            created=now.timestamp(),
        )
        write_record(folder, record)

    def _end(self, run_id: str, wanted: Wanted) -> None:
        folder = self._folder(run_id)
        with disk_explained(folder, "stopping the training"), guarded(self.root):
            process, wish = living_process(folder), read_wish(folder)
            if process is None:  # it ended by itself just now, or rests
                if wish.wanted == "paused":
                    write_wish(folder, replace(wish, wanted=wanted))
                return
            if not process.is_here:
                raise ValueError(f"this run is trained on {printable(process.host)}; stop it there")
            asked = asked_once_more(wish, wanted)
            write_wish(folder, asked)
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

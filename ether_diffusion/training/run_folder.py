"""The folder of a run: locked, known by its settings, with a log that a restart continues without a seam."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Literal, Self

from pydantic import JsonValue

from ether_diffusion.durable_files import delete_unfinished, write_files
from ether_diffusion.strict_json import Json, StrictModel, read_json
from ether_diffusion.training.plain_files import UnusableFileError, read_plain_file
from ether_diffusion.training.run_lock import locked
from ether_diffusion.training.settings_changes import compare_settings
from ether_diffusion.wording import listed, printable

RUN_NAME = "run.json"
LOG_NAME = "log.jsonl"

logger = logging.getLogger(__name__)


class RunFile(StrictModel):
    """What run.json says: the settings that the run was begun with, and what its photos were."""

    format: Literal[1] = 1
    settings: dict[str, JsonValue]
    fingerprints: dict[str, dict[str, str]]


class RunFolder:
    """A run's folder as a context: inside, no other process uses it, and run.json says what the run is.

    `is_new` says, inside, whether this call began the run. Entering raises ValueError where the folder is in
    use, cannot be written to, holds something else, or holds a run with other settings or photos and
    `allow_changes` is off; nothing in it has changed then.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Json],
        fingerprints: Mapping[str, Mapping[str, str]],
        *,
        allow_changes: bool,
    ) -> None:
        self.path, self.allow_changes = path, allow_changes
        self.settings, self.fingerprints = dict(settings), {k: dict(v) for k, v in fingerprints.items()}
        self.is_new = False
        self._held = ExitStack()
        self._log: BinaryIO | None = None

    def __enter__(self) -> Self:
        _make(self.path)
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.path))
            except OSError as error:
                raise ValueError(_not_writable(self.path, error)) from None
            self._recognise()
            delete_unfinished(self.path)
            held.callback(self._close_log)
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def log(self, record: Mapping[str, Json]) -> None:
        """Append one line to log.jsonl, at once."""
        if self._log is None:
            self.keep_lines(lambda line: True)
            self._log = (self.path / LOG_NAME).open("ab")
        self._log.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._log.flush()

    def sync(self) -> None:
        """Bring the log to the disk, before a checkpoint relies on it."""
        if self._log is not None:
            os.fsync(self._log.fileno())

    def rewind(self, step: int) -> None:
        """Drop from log.jsonl the lines of later steps, and a last line that a crash cut off."""
        self.keep_lines(lambda line: not isinstance(own := line.get("step"), int) or own <= step)

    def lines(self) -> list[dict[str, Json]]:
        """Return what log.jsonl holds, without what a crash cut off."""
        return [record for line in self._raw_lines() if (record := _read_line(line)) is not None]

    def keep_lines(self, is_kept: Callable[[dict[str, Json]], bool]) -> None:
        """Drop all other lines from log.jsonl, and what a crash cut off."""
        self._close_log()
        lines = self._raw_lines()
        kept = [line for line in lines if (record := _read_line(line)) is not None and is_kept(record)]
        if kept != lines:
            write_files(self.path, {LOG_NAME: b"".join(kept)})

    def _raw_lines(self) -> list[bytes]:
        path = self.path / LOG_NAME
        return _read(path).splitlines(keepends=True) if path.exists() else []

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _recognise(self) -> None:
        path = self.path / RUN_NAME
        self.is_new = not path.exists()
        if not self.is_new:
            self._compare(_read_run(path))
        elif others := sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")):
            raise ValueError(
                f"{printable(self.path)} holds {listed(others)}, which belong to no run; give another "
                "--output_dir, or empty this one"
            )
        run = {"format": 1, "settings": self.settings, "fingerprints": self.fingerprints}
        data = json.dumps(run, indent=1, allow_nan=False).encode() + b"\n"
        if self.is_new or path.read_bytes() != data:
            write_files(self.path, {RUN_NAME: data})

    def _compare(self, run: RunFile) -> None:
        changes = compare_settings(run.settings, self.settings, run.fingerprints, self.fingerprints)
        if changes.of_form or (changes.refused and not self.allow_changes):
            remedy = "give --allow_changes to go on with it as it is now, or another --output_dir"
            if changes.of_form:
                names = listed(changes.of_form, len(changes.of_form))
                remedy = (
                    f"a run trains one adapter, and {names} would make another; give another --output_dir"
                )
            told = f"{printable(self.path)} holds a run that was begun otherwise (then -> now):"
            raise ValueError("\n  ".join((told, *changes.refused)) + f"\n{remedy}")
        for line in (*changes.refused, *changes.allowed):
            logger.info("the run in %s goes on with a change: %s", printable(self.path), line)


def _read_run(path: Path) -> RunFile:
    try:
        return read_json(_read(path), RunFile, printable(path))
    except ValueError as error:
        raise ValueError(f"{error}; update ether-diffusion, or give another --output_dir") from None


def _read(path: Path) -> bytes:
    try:
        return read_plain_file(path, inside=None, max_bytes=2**30)
    except UnusableFileError as reason:
        raise ValueError(f"{printable(path)} {reason}") from None


def _read_line(line: bytes) -> dict[str, Json] | None:
    """Return a line of the log; None where it is no whole one."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _make(path: Path) -> None:
    try:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{printable(path)} is a file; give a folder as --output_dir")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(_not_writable(path, error)) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{printable(path)} cannot be written to; give another --output_dir")


def _not_writable(path: Path, error: OSError) -> str:
    return f"{printable(path)} cannot be written to ({error.strerror}); give another --output_dir"

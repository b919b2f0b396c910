"""The folder of a run: locked, known by its settings, with a log that a restart continues without a seam."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Literal, Self

from pydantic import JsonValue

from ether_diffusion.durable_files import delete_unfinished, write_files
from ether_diffusion.strict_json import Json, StrictModel, read_json
from ether_diffusion.training.config import DEFAULT_STEPS, ControlRunConfig
from ether_diffusion.training.photos import compare_fingerprints
from ether_diffusion.training.plain_files import UnusableFileError, read_plain_file
from ether_diffusion.training.run_lock import locked
from ether_diffusion.wording import listed, printable

RUN_NAME = "run.json"
LOG_NAME = "log.jsonl"
SPLIT = ("train_batch_size", "gradient_accumulation_steps", "num_processes")
"""Settings that may change as long as their product, the photos of an update, stays."""
FORM = frozenset({"adapter", "num_blocks", "rank", "sides", "target_modules", "train_text_encoder"})
"""Settings that decide which tensors are trained: one run cannot have two values of them."""

logger = logging.getLogger(__name__)


class RunFile(StrictModel):
    """What run.json says: the settings that the run was begun with, and what its photos were."""

    format: Literal[1] = 1
    settings: dict[str, JsonValue]
    fingerprints: dict[str, dict[str, str]]


class RunFolder:
    """A run's folder as a context: inside, no other process uses it, and run.json says what the run is.

    Entering raises ValueError where the folder is in use, cannot be written to, holds something else, or
    holds a run with other settings or photos and `allow_changes` is off; nothing in it has changed then.
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
        self._held = ExitStack()
        self._log: BinaryIO | None = None

    def __enter__(self) -> Self:
        shown = printable(self.path)
        with ExitStack() as held:
            try:
                if self.path.exists() and not self.path.is_dir():
                    raise ValueError(f"{shown} is a file; give a folder as --output_dir")
                self.path.mkdir(parents=True, exist_ok=True)
                if not os.access(self.path, os.W_OK | os.X_OK):
                    raise ValueError(f"{shown} cannot be written to; give another --output_dir")
                held.enter_context(locked(self.path))
            except OSError as error:
                raise ValueError(
                    f"{shown} cannot be written to ({error.strerror}); give another --output_dir"
                ) from None
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
        return [record for _, record in self._records() if record is not None]

    def keep_lines(self, is_kept: Callable[[dict[str, Json]], object]) -> None:
        """Drop all other lines from log.jsonl, and what a crash cut off."""
        self._close_log()
        records = self._records()
        kept = [line for line, record in records if record is not None and is_kept(record)]
        if len(kept) < len(records):
            write_files(self.path, {LOG_NAME: b"".join(kept)})

    def _records(self) -> list[tuple[bytes, dict[str, Json] | None]]:
        """Return the lines of the log and what each says: None where it is no whole one."""
        path, found = self.path / LOG_NAME, list[tuple[bytes, dict[str, Json] | None]]()
        for line in _read(path).splitlines(keepends=True) if path.exists() else ():
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            found.append((line, record if isinstance(record, dict) else None))
        return found

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _recognise(self) -> None:
        path = self.path / RUN_NAME
        is_new = not path.exists()
        if not is_new:
            try:
                before = read_json(_read(path), RunFile, printable(path))
            except ValueError as error:
                raise ValueError(f"{error}; update ether-diffusion, or give another --output_dir") from None
            self._compare(before)
        elif others := sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")):
            raise ValueError(
                f"{printable(self.path)} holds {listed(others)}, which belong to no run; give another "
                "--output_dir, or empty this one"
            )
        run = {"format": 1, "settings": self.settings, "fingerprints": self.fingerprints}
        data = json.dumps(run, indent=1, allow_nan=False).encode() + b"\n"
        if is_new or path.read_bytes() != data:
            write_files(self.path, {RUN_NAME: data})

    def _compare(self, run: RunFile) -> None:
        """Refuse what makes it another run, unless changes are allowed; say what else differs."""
        before, now, nothing = run.settings, self.settings, object()
        names = sorted(before.keys() | now.keys())
        differing = [name for name in names if before.get(name, nothing) != now.get(name, nothing)]
        width = max(map(len, differing), default=0)
        allowed, refused = list[str](), list[str]()
        for name in differing:
            old, new = (printable(each[name]) if name in each else "not recorded" for each in (before, now))
            lines = allowed if _may_change(name, before, now) else refused
            lines.append(f"{name:{width}}  {old} -> {new}")
        for group in sorted(run.fingerprints.keys() | self.fingerprints.keys()):
            changes = compare_fingerprints(run.fingerprints.get(group, {}), self.fingerprints.get(group, {}))
            if found := [f"{word} {listed(files)}" for word, files in changes.items()]:
                refused.append(f"{group}: {'; '.join(found)}")
        of_form = sorted(before.keys() & now.keys() & FORM & set(differing))
        if of_form or (refused and not self.allow_changes):
            remedy = "give --allow_changes to go on with it as it is now, or another --output_dir"
            if of_form:
                remedy = (
                    f"a run trains one adapter, and {listed(of_form, len(of_form))} would make another; give "
                    "another --output_dir"
                )
            told = f"{printable(self.path)} holds a run that was begun otherwise (then -> now):"
            raise ValueError("\n  ".join((told, *refused)) + f"\n{remedy}")
        for line in (*refused, *allowed):
            logger.info("the run in %s goes on with a change: %s", printable(self.path), line)


def _may_change(name: str, before: Mapping[str, Json], now: Mapping[str, Json]) -> bool:
    if name in SPLIT:
        photos = [
            [each for n in SPLIT if isinstance(each := settings.get(n), int)] for settings in (before, now)
        ]
        return math.prod(photos[0]) == math.prod(photos[1])
    if name not in before or name not in now:  # an option that another release has or had
        return True
    if name == "max_train_steps":
        by_epochs = before.get("num_train_epochs") or now.get("num_train_epochs")
        old, new = before[name] or DEFAULT_STEPS, now[name] or DEFAULT_STEPS
        return not by_epochs and isinstance(old, int) and isinstance(new, int) and new >= old
    declared = ControlRunConfig.options().get(name)
    return declared is not None and declared.free


def _read(path: Path) -> bytes:
    try:
        return read_plain_file(path, inside=None, max_bytes=2**30)
    except UnusableFileError as reason:
        raise ValueError(f"{printable(path)} {reason}") from None

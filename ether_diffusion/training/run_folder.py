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

RUN_NAME, LOG_NAME = "run.json", "log.jsonl"
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
        self.path, self.allow_changes, self._shown = path, allow_changes, printable(path)
        photos = {name: dict(each) for name, each in fingerprints.items()}
        self.now = RunFile(settings={**settings}, fingerprints=photos)
        self._held = ExitStack()
        self._log: BinaryIO | None = None

    def __enter__(self) -> Self:
        with ExitStack() as held:
            try:
                if self.path.exists() and not self.path.is_dir():
                    raise ValueError(f"{self._shown} is a file; give a folder as --output_dir")
                self.path.mkdir(parents=True, exist_ok=True)
                if not os.access(self.path, os.W_OK | os.X_OK):
                    raise OSError(None, "no permission")
                held.enter_context(locked(self.path))
            except OSError as error:
                why = f"cannot be written to ({error.strerror}); give another --output_dir"
                raise ValueError(f"{self._shown} {why}") from None
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
        """Compare run.json with this run, or begin one where there is nothing yet."""
        path = self.path / RUN_NAME
        if path.exists():
            try:
                before = read_json(_read(path), RunFile, printable(path))
            except ValueError as error:
                raise ValueError(f"{error}; update ether-diffusion, or give another --output_dir") from None
            self._compare(before)
        elif others := sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")):
            raise ValueError(
                f"{self._shown} holds {listed(others)}, which belong to no run; give another --output_dir, "
                "or empty this one"
            )
        data = json.dumps(self.now.model_dump(), indent=1, allow_nan=False).encode() + b"\n"
        if not path.exists() or path.read_bytes() != data:
            write_files(self.path, {RUN_NAME: data})

    def _compare(self, run: RunFile) -> None:
        """Refuse what makes it another run, unless changes are allowed; say what else differs."""
        before, now, nothing = run.settings, self.now.settings, object()
        names = sorted(before.keys() | now.keys())
        differing = [name for name in names if before.get(name, nothing) != now.get(name, nothing)]
        if "num_blocks" in differing and now.get("num_blocks") is None:  # a method without, once told as 4
            differing.remove("num_blocks")
        width = max(map(len, differing), default=0)
        allowed, refused = list[str](), list[str]()
        for name in differing:
            old, new = (printable(each[name]) if name in each else "not recorded" for each in (before, now))
            lines = allowed if _may_change(name, before, now) else refused
            lines.append(f"{name:{width}}  {old} -> {new}")
        then, photos = run.fingerprints, self.now.fingerprints
        for group in sorted(then.keys() | photos.keys()):
            changes = compare_fingerprints(then.get(group, {}), photos.get(group, {}))
            if found := [f"{word} {listed(files)}" for word, files in changes.items()]:
                refused.append(f"{group}: {'; '.join(found)}")
        remedy = "give --allow_changes to go on with it as it is now, or another --output_dir"
        if of_form := sorted(before.keys() & now.keys() & FORM & set(differing)):
            form = f"{listed(of_form, len(of_form))} would make another"
            remedy = f"a run trains one adapter, and {form}; give another --output_dir"
        if of_form or (refused and not self.allow_changes):
            told = f"{self._shown} holds a run that was begun otherwise (then -> now):"
            raise ValueError("\n  ".join((told, *refused)) + f"\n{remedy}")
        for line in (*refused, *allowed):
            logger.info("the run in %s goes on with a change: %s", self._shown, line)


def _may_change(name: str, before: Mapping[str, Json], now: Mapping[str, Json]) -> bool:
    if name in SPLIT:
        counts = ([each for n in SPLIT if isinstance(each := s.get(n), int)] for s in (before, now))
        return len(set(map(math.prod, counts))) == 1
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

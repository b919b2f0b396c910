"""Checkpoints of a run: whole or absent, tensors and JSON only, the newest whole one is found again.

A checkpoint is also an adapter: its folder loads like the finished one.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from pydantic import JsonValue
from torch import Tensor

from ether_diffusion.adapters.tensor_file import safetensors_bytes
from ether_diffusion.durable_files import delete, write_folder
from ether_diffusion.strict_json import Json, read_json
from ether_diffusion.training.plain_files import read_plain_file
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)

MANIFEST, STATE = "manifest.json", "state.json"
MAX_MANIFEST = 16 * 2**20
_NAME = re.compile(r"checkpoint-(?:0|[1-9]\d*)", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: the SHA-256 of its files, `names`, are those of its manifest; no other is read."""

    folder: Path
    step: int
    names: frozenset[str]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read its manifest and compare its files with that; a ValueError names one missing or damaged."""
        try:
            manifest = read_plain_file(folder / MANIFEST, inside=None, max_bytes=MAX_MANIFEST)
            hashes = read_json(manifest, dict[str, str], MANIFEST)
            hashes[STATE]
        except (ValueError, KeyError):
            raise ValueError(f"{MANIFEST} is missing or damaged") from None
        for name, expected in hashes.items():
            if _sha256(folder / name) != expected:
                raise ValueError(f"{printable(name)} is missing or damaged")
        return cls(folder, _step_of(folder), frozenset(hashes))

    def state(self) -> dict[str, Json]:
        """Return what `save_checkpoint` was given as state."""
        return read_json((self.folder / STATE).read_bytes(), dict[str, JsonValue], str(self.folder / STATE))

    def inside(self, subfolder: str) -> dict[str, bytes]:
        """Return the files of a subfolder by their names in it; none where there is no such folder."""
        inner = {name.removeprefix(f"{subfolder}/"): name for name in sorted(self.names)}
        return {short: (self.folder / name).read_bytes() for short, name in inner.items() if short != name}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one of its files; none where that is no file of its."""
        if name not in self.names:
            return {}
        loaded: dict[str, Tensor] = safetensors.torch.load((self.folder / name).read_bytes())
        return loaded


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    adapter_files: Mapping[str, bytes],
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Json],
    num_kept: int,
) -> Path:
    """Write the checkpoint of a step, then delete all but the newest num_kept; return its folder.

    tensors are those of further files by the files' names, state is JSON. Killed at any moment, and on a full
    disk, it leaves the older checkpoints as they were.
    """
    files = dict(adapter_files)
    for name, named in tensors.items():
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in sorted(named.items())}
        files[name] = safetensors_bytes(plain, {"format": "pt"})
    files[STATE] = json.dumps(state, indent=1, sort_keys=True).encode()
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[MANIFEST] = json.dumps(hashes, indent=1, sort_keys=True).encode()
    path = folder / f"checkpoint-{step}"  # as diffusers names it
    if path.is_dir() and not path.is_symlink():  # not whole, or the run would have gone on from it
        delete(path)
    elif path.exists() or path.is_symlink():
        other = path.with_name(f"{path.name}.before-{time.time_ns()}")
        logger.warning("%s is no checkpoint; it is called %s now", printable(path), printable(other.name))
        path.rename(other)
    try:
        write_folder(path, files)
    except OSError as error:
        size = sum(map(len, files.values())) / 2**20
        raise OSError(error.errno, f"{error.strerror}: {path.name} needs {size:.1f} MiB") from error
    prune_checkpoints(folder, step, num_kept)
    return path


def prune_checkpoints(folder: Path, step: int, num_kept: int) -> None:
    """Keep num_kept checkpoints, that of this step and those before it, and delete all older ones."""
    for older in [path for path in _newest_first(folder) if _step_of(path) < step][num_kept - 1 :]:
        delete(older)


def forget_checkpoints_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps than the one that a run goes on from, whole or not."""
    for newer in [path for path in _newest_first(folder) if _step_of(path) > step]:
        logger.warning("%s is later than where this run goes on from; it is deleted", newer)
        delete(newer)


def named_checkpoint(folder: Path, wanted: str | None) -> Checkpoint | None:
    """Return the checkpoint that a run is to go on from, if one was asked for by name.

    A ValueError or a FileNotFoundError says that it is not whole, or none of this folder.
    """
    if wanted is None or wanted == "latest":
        return None
    path = Path(wanted) if Path(wanted).is_dir() else folder / wanted
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{path} is no checkpoint of {folder}; give its run's folder as --output_dir")
    if not _NAME.fullmatch(path.name) or not path.is_dir():
        raise FileNotFoundError(f"{path} is no checkpoint; name a folder like checkpoint-500 of this run")
    try:
        return Checkpoint.open(path)
    except ValueError as problem:
        raise ValueError(f"{path} is not whole ({problem}); use an older checkpoint") from None


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run; what is not whole is passed over, and said."""
    for path in _newest_first(folder):
        try:
            return Checkpoint.open(path)
        except ValueError as problem:
            logger.warning("%s is not whole (%s); an older checkpoint is used", printable(path), problem)
    return None


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints of a run, sorted; a file of such a name is none."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(map(_step_of, found))


def _newest_first(folder: Path) -> list[Path]:
    return [folder / f"checkpoint-{step}" for step in reversed(saved_steps(folder))]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _sha256(path: Path) -> str | None:
    with suppress(OSError, ValueError):  # a name that no file can have
        if path.is_file():  # a FIFO is never opened
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return None

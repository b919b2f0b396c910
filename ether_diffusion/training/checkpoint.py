"""Checkpoints of a run: whole or absent, tensors and JSON only, the newest whole one is found again.

A checkpoint is also an adapter: its folder loads like the finished one.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ether_diffusion.adapter_file.strict_json import Json, parse_json
from ether_diffusion.adapter_file.tensor_file import safetensors_bytes
from ether_diffusion.durable_files import write_folder

logger = logging.getLogger(__name__)

MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: the files' SHA-256 are those of its manifest."""

    folder: Path
    step: int

    def state(self) -> dict[str, Json]:
        """Return what `save_checkpoint` was given as state."""
        state = parse_json((self.folder / STATE).read_bytes(), str(self.folder / STATE))
        assert isinstance(state, dict)
        return state

    def has(self, name: str) -> bool:
        """Say whether a file of this name belongs to it."""
        return (self.folder / name).is_file()

    def inside(self, subfolder: str) -> dict[str, bytes]:
        """Return the files of a subfolder by their names in it; none where there is no such folder."""
        root = self.folder / subfolder
        paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one of its files."""
        loaded: dict[str, Tensor] = safetensors.torch.load((self.folder / name).read_bytes())
        return loaded


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Return where a run in `folder` keeps the checkpoint of a step: checkpoint-500, as diffusers does."""
    return folder / f"checkpoint-{step}"


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
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in named.items()}
        files[name] = safetensors_bytes(dict(sorted(plain.items())), {"format": "pt"})
    files[STATE] = json.dumps(state, indent=1, sort_keys=True).encode()
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[MANIFEST] = json.dumps(hashes, indent=1, sort_keys=True).encode()
    path = checkpoint_folder(folder, step)
    if path.exists():  # not whole, or the run would have gone on from it
        shutil.rmtree(path)
    try:
        write_folder(path, files)
    except OSError as error:
        size = sum(map(len, files.values())) / 2**20
        raise OSError(error.errno, f"{error.strerror}: {path.name} needs {size:.1f} MiB") from error
    for _, old in _numbered(folder)[num_kept:]:
        shutil.rmtree(old)
    return path


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run; what is not whole is passed over, and said."""
    for step, path in _numbered(folder):
        problem = _problem(path)
        if problem is None:
            return Checkpoint(path, step)
        logger.warning("%s is not whole (%s); an older checkpoint is used", path, problem)
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint by its folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not whole.
    """
    match = _NAME.fullmatch(path.name)
    if match is None or not path.is_dir():
        raise FileNotFoundError(f"{path} is no checkpoint; name a folder like checkpoint-500 of this run")
    problem = _problem(path)
    if problem is not None:
        raise ValueError(f"{path} is not whole ({problem}); use an older checkpoint")
    return Checkpoint(path, int(match[1]))


def newer_checkpoints(folder: Path, step: int) -> list[Path]:
    """Return the checkpoints of later steps than this one, whole or not."""
    return [path for number, path in _numbered(folder) if number > step]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints of a run, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _problem(path: Path) -> str | None:
    """Say what a checkpoint lacks; None if it is whole."""
    try:
        hashes = parse_json((path / MANIFEST).read_bytes(), MANIFEST)
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or damaged"
    if not isinstance(hashes, dict) or STATE not in hashes:
        return f"{MANIFEST} is damaged"
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            return f"{name} is missing or damaged"
    return None

"""Durable writing: what a kill at any system call leaves behind is whole."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ether_diffusion.durable_files import delete_unfinished, write_files, write_folder

OLD, NEW = {"a.json": b"old a", "b.bin": b"old b"}, {"a.json": b"new a", "b.bin": b"new b"}


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it, though clean-up of ours may still run."""


def die_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> Callable[[], int]:
    """Let the number-th fsync fail; returns what counts them."""
    calls = 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error

    monkeypatch.setattr(os, "fsync", failing)
    return lambda: calls


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_file_is_old_or_new_and_never_half_when_writing_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_files(tmp_path, OLD)
    die_at(monkeypatch, number, Killed())
    with pytest.raises(Killed):
        write_files(tmp_path, NEW)
    assert contents(tmp_path) == (OLD if number < 3 else NEW)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_folder_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    die_at(monkeypatch, number, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        write_folder(tmp_path / "checkpoint", NEW)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_holds_its_subfolders(tmp_path: Path) -> None:
    files = {"top.bin": b"1", "text_encoder/inner.bin": b"2"}
    write_folder(tmp_path / "checkpoint", files)
    assert contents(tmp_path / "checkpoint") == files


def test_what_a_kill_left_unfinished_is_not_taken_over(tmp_path: Path) -> None:
    left = tmp_path / ".checkpoint.unfinished"
    left.mkdir()
    (left / "stale.bin").write_bytes(b"stale")
    write_folder(tmp_path / "checkpoint", NEW)
    assert contents(tmp_path / "checkpoint") == NEW
    assert not left.exists()


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    write_folder(tmp_path / "checkpoint", OLD)
    with pytest.raises(FileExistsError, match="not replaced"):
        write_folder(tmp_path / "checkpoint", NEW)
    assert contents(tmp_path / "checkpoint") == OLD


def test_only_what_is_unfinished_is_deleted(tmp_path: Path) -> None:
    kept = {".hidden": b"1", "a.part": b"2", ".git/x.part": b"3", "checkpoint/b.bin": b"4"}
    left = {".a.json.17.part": b"5", "inner/.b.bin.9.part": b"6", ".checkpoint-2.unfinished/b.bin": b"7"}
    for name, data in (kept | left).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    delete_unfinished(tmp_path)
    assert contents(tmp_path) == kept


def test_where_others_write_only_what_is_of_processes_that_ended_is_deleted(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    living = {f".a.png.{os.getpid()}.part": b"1", "b.png": b"2", ".c.unfinished": b"3"}
    for name, data in (living | {f".a.png.{ended.pid}.part": b"4"}).items():
        (tmp_path / name).write_bytes(data)
    delete_unfinished(tmp_path, is_shared=True)
    assert contents(tmp_path) == living


def test_of_a_link_among_what_is_unfinished_only_the_link_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_folder(tmp_path / "mine", OLD)
    (tmp_path / "run" / ".samples.unfinished").symlink_to(tmp_path / "mine")
    (tmp_path / "run" / ".a.json.1.part").symlink_to(tmp_path / "mine" / next(iter(OLD)))
    delete_unfinished(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    assert contents(tmp_path / "mine") == OLD

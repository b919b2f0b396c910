"""Checkpoints: whole or passed over, pruned only once a newer one is whole."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ether_diffusion.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    named_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)

OPTIMIZER = "optimizer.safetensors"


def save(folder: Path, step: int, *, num_kept: int = 2) -> Path:
    return save_checkpoint(
        folder,
        step,
        adapter_files={"adapter_config.json": b"{}", "text_encoder/adapter_config.json": b"{}"},
        tensors={OPTIMIZER: moments(step)},
        state={"step": step, "rate": 0.006, "empty": None},
        num_kept=num_kept,
    )


def moments(step: int) -> dict[str, Tensor]:
    return {"0.exp_avg": torch.full((3,), float(step)), "0.step": torch.tensor(float(step))}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def newest(folder: Path) -> Checkpoint:
    found = newest_checkpoint(folder)
    assert found is not None
    return found


def test_a_checkpoint_gives_back_what_it_was_given_in_bytes_of_its_values_alone(tmp_path: Path) -> None:
    first, found = save(tmp_path, 7), newest(tmp_path)
    assert (found.step, found.state()) == (7, {"step": 7, "rate": 0.006, "empty": None})
    for name, tensor in moments(7).items():
        assert torch.equal(found.tensors(OPTIMIZER)[name], tensor)
    second = save_checkpoint(
        tmp_path / "other order",
        7,
        adapter_files={},
        tensors={OPTIMIZER: dict(reversed(moments(7).items()))},
        state={"empty": None, "rate": 0.006, "step": 7},
        num_kept=1,
    )
    for name in (OPTIMIZER, "state.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_newest_are_kept_and_found_by_number_beside_other_folders(tmp_path: Path) -> None:
    others = {"checkpoint-tmp", "checkpoint-", ".checkpoint-9.unfinished", "samples"}
    for name in others:
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 40, 300):
        save(tmp_path, step, num_kept=2)
    assert newest(tmp_path).step == 300
    assert names(tmp_path) == {"checkpoint-40", "checkpoint-300"} | others


@pytest.mark.parametrize("damage", ["manifest", "missing", "shortened", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / (MANIFEST if damage == "manifest" else OPTIMIZER)
    data = file.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    file.write_bytes(flipped if damage == "flipped" else data[: len(data) // 2])
    if damage == "missing":
        file.unlink()
    assert newest(tmp_path).step == 1
    assert "checkpoint-2 is not whole" in caplog.text


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, num_kept=1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, num_kept=1)
    assert names(tmp_path) == {"checkpoint-1"}
    assert newest(tmp_path).step == 1


def test_opening_by_name_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    manifest = save(tmp_path, 1) / MANIFEST
    assert named_checkpoint(tmp_path, "checkpoint-1") == newest(tmp_path)
    manifest.write_text(json.dumps({"state.json": "0"}))
    with pytest.raises(ValueError, match=r"not whole \(state\.json is missing or damaged\)"):
        named_checkpoint(tmp_path, "checkpoint-1")


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "huge", "folder", "link to nothing"])
def test_what_stands_in_the_place_of_a_manifest_is_passed_over_at_once(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / MANIFEST
    manifest.unlink()
    if kind == "FIFO":
        os.mkfifo(manifest)
    elif kind == "socket":
        os.mknod(manifest, stat.S_IFSOCK | 0o600)
    elif kind == "huge":
        manifest.touch()
        os.truncate(manifest, 2**40)
    elif kind == "folder":
        manifest.mkdir()
    else:
        manifest.symlink_to("/dev/zero" if kind == "device" else "nothing")
    assert newest(tmp_path).step == 1


@pytest.mark.parametrize("name", ["", "..", "x" * 300, "a\0b", "/dev/zero"])
def test_a_manifest_of_names_that_no_file_has_is_passed_over(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {name: "0"}))
    assert newest(tmp_path).step == 1


def test_only_what_the_manifest_names_belongs_to_a_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for name in ("average.safetensors", "text_encoder/adapter_model.safetensors"):
        (path / name).write_bytes(b"foreign")
    assert not newest(tmp_path).tensors("average.safetensors")
    assert newest(tmp_path).inside("text_encoder") == {"adapter_config.json": b"{}"}


def test_what_only_has_a_checkpoints_name_is_left_alone(tmp_path: Path) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    mine.mkdir()
    (mine / "letter").write_text("dear")
    (run / "checkpoint-1").write_text("mine")
    (run / "checkpoint-2").symlink_to(mine)
    (run / "checkpoint-3").symlink_to("nothing")
    assert newest_checkpoint(run) is None
    for step in (1, 2, 3):
        save(run, step, num_kept=1)
    assert (newest(run).step, newest(run).folder.is_symlink()) == (3, False)
    assert (mine / "letter").read_text() == "dear"
    kept = {path.name.partition(".")[0]: path for path in run.iterdir()}
    assert kept["checkpoint-1"].read_text() == "mine"
    assert kept["checkpoint-2"].resolve() == mine


def test_a_checkpoint_behind_a_link_is_read_and_of_it_only_the_link_is_deleted(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    (run / "checkpoint-1").symlink_to(save(elsewhere, 1))
    assert newest(run).state()["step"] == 1
    save(run, 2, num_kept=1)
    assert names(run) == {"checkpoint-2"}
    assert newest(elsewhere).step == 1


def test_what_stands_where_a_checkpoint_is_written_aside_does_not_stop_it(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (tmp_path / ".checkpoint-1.unfinished").write_text("")
    (tmp_path / ".checkpoint-2.unfinished").symlink_to(mine)
    for step in (1, 2):
        assert not save(tmp_path, step).is_symlink()
    assert newest(tmp_path).step == 2
    assert not list(mine.iterdir())

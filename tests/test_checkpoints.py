"""Checkpoints: whole or passed over, pruned only once a newer one is whole."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ether_diffusion.training.checkpoint import (
    MANIFEST,
    newest_checkpoint,
    open_checkpoint,
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


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path: Path) -> None:
    save(tmp_path, 7)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 7
    assert found.state() == {"step": 7, "rate": 0.006, "empty": None}
    for name, tensor in moments(7).items():
        assert torch.equal(found.tensors(OPTIMIZER)[name], tensor)


def test_equal_values_give_equal_bytes_in_whatever_order_they_come(tmp_path: Path) -> None:
    first = save(tmp_path / "a", 1)
    reordered = dict(reversed(moments(1).items()))
    second = save_checkpoint(
        tmp_path / "b",
        1,
        adapter_files={},
        tensors={OPTIMIZER: reordered},
        state={"empty": None, "rate": 0.006, "step": 1},
        num_kept=1,
    )
    for name in (OPTIMIZER, "state.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (5, 40, 300):
        save(tmp_path, step, num_kept=3)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 300


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 40, 300):
        save(tmp_path, step, num_kept=2)
    assert names(tmp_path) == {"checkpoint-40", "checkpoint-300"}


@pytest.mark.parametrize("damage", ["manifest", "missing", "shortened", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    save(tmp_path, 1)
    newer = save(tmp_path, 2)
    file = newer / (MANIFEST if damage == "manifest" else OPTIMIZER)
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        file.write_bytes(data[: len(data) // 2])
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "checkpoint-2 is not whole" in caplog.text


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, num_kept=1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, num_kept=1)
    assert names(tmp_path) == {"checkpoint-1"}
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-tmp", "checkpoint-", ".checkpoint-9.unfinished", "samples"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 1, num_kept=1)
    assert len(names(tmp_path)) == 5


def test_opening_by_name_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert open_checkpoint(tmp_path / "checkpoint-1").step == 1
    with pytest.raises(FileNotFoundError, match="checkpoint-2 is no checkpoint"):
        open_checkpoint(tmp_path / "checkpoint-2")
    manifest = tmp_path / "checkpoint-1" / MANIFEST
    manifest.write_text(json.dumps({"state.json": "0"}))
    with pytest.raises(ValueError, match=r"not whole \(state\.json is missing or damaged\)"):
        open_checkpoint(tmp_path / "checkpoint-1")

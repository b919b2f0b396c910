"""Checkpoints of Tiny World's stages: written aside, synced and renamed; a kill never leaves half of one."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ether_diffusion.tiny_world.training.average import Average

Json = dict[str, int | float | str]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file in one step: aside, synced, renamed."""
    unfinished = path.with_suffix(".unfinished")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
    _sync(unfinished)
    unfinished.replace(path)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a stage, or None."""
    checkpoints = sorted(folder.glob("step-????????"))
    return checkpoints[-1] if checkpoints else None


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state = optimizer.state_dict()
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".")
        slots.setdefault(int(index), {})[name] = tensor
    state["state"] = slots
    optimizer.load_state_dict(state)


def save_checkpoint(
    folder: Path, model: torch.nn.Module, *, average: Average, optimizer: torch.optim.Optimizer, state: Json
) -> Path:
    """Save a stage at state["step"] and delete its older checkpoints; return the new one's folder."""
    final = folder / f"step-{state['step']:08d}"
    unfinished = folder / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_tensors(model.state_dict(), unfinished / "model.safetensors")
    write_tensors(average.tensors, unfinished / "average.safetensors")
    write_tensors(_optimizer_tensors(optimizer), unfinished / "optimizer.safetensors")
    state_file = unfinished / "state.json"
    state_file.write_text(json.dumps(state, indent=1), encoding="utf-8")
    _sync(state_file)
    _sync(unfinished)
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)
    _sync(folder)
    for old in sorted(folder.glob("step-????????"))[:-1]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    checkpoint: Path, model: torch.nn.Module, *, average: Average, optimizer: torch.optim.Optimizer
) -> Json:
    """Load what save_checkpoint wrote into model, average and optimizer; return its state."""
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    average.tensors = load_file(checkpoint / "average.safetensors")
    _load_optimizer(optimizer, load_file(checkpoint / "optimizer.safetensors"))
    state: Json = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return state


def load_averaged(folder: Path, model: torch.nn.Module) -> int:
    """Load the averaged weights of a stage's newest checkpoint into model; return its step.

    Raises:
        FileNotFoundError: the stage has no checkpoint.
    """
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} has no checkpoint; train the stage {folder.name} first")
    model.load_state_dict(load_file(checkpoint / "average.safetensors"))
    return int(checkpoint.name.removeprefix("step-"))

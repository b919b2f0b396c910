"""Checkpoints of Tiny World's stages: written aside, synced and renamed; a kill never leaves half of one."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from ether_diffusion.durable_files import write_folder
from recipes.tiny_world.average import Average

Json = dict[str, int | float | str]


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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
    shutil.rmtree(final, ignore_errors=True)
    write_folder(
        final,
        {
            "model.safetensors": save(_plain(model.state_dict())),
            "average.safetensors": save(_plain(average.tensors)),
            "optimizer.safetensors": save(_plain(_optimizer_tensors(optimizer))),
            "state.json": json.dumps(state, indent=1).encode(),
        },
    )
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

"""Optimizers and learning-rate schedules by name, and their state as tensors and JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import OptimizationConfig

CONFIGURED = ("lr", "initial_lr", "betas", "eps", "weight_decay")
"""Entries of a parameter group that are settings of the run; the others are what the optimizer found."""

ParameterGroup = tuple[Sequence[nn.Parameter], float]
"""Parameters, and their learning rate."""


def make_optimizer(config: OptimizationConfig, groups: Sequence[ParameterGroup]) -> Optimizer:
    """Return the optimizer that the configuration names.

    Raises:
        ValueError: its package is not installed, or it needs a GPU.
    """
    parameters = [{"params": list(group), "lr": rate} for group, rate in groups]
    common: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, eps=config.adam_epsilon, **common)
    optimizer: Optimizer = find_optimizer(config)(parameters, eps=config.adam_epsilon, **common)
    return optimizer


def find_optimizer(config: OptimizationConfig) -> Any:
    """Return the class of the optimizer, so that a missing package is said before anything slow.

    Raises:
        ValueError: its package is not installed, or it needs a GPU.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW
    if config.optimizer == "prodigy":
        try:
            from prodigyopt import Prodigy
        except ImportError:
            raise ValueError(
                "optimizer=prodigy needs the package prodigyopt; pip install prodigyopt"
            ) from None
        return Prodigy
    if not torch.cuda.is_available():
        raise ValueError("optimizer=adamw8bit needs a CUDA GPU, and there is none; use adamw")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError(
            "optimizer=adamw8bit needs the package bitsandbytes; pip install bitsandbytes"
        ) from None
    return AdamW8bit


def make_schedule(config: OptimizationConfig, optimizer: Optimizer, num_steps: int) -> LambdaLR:
    """Return diffusers' schedule of that name over so many updates."""
    schedule: LambdaLR = get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    return schedule


def go_to_step(schedule: LambdaLR, num_steps: int) -> None:
    """Set the learning rates that a schedule gives after so many updates, from its rates of now."""
    factors = [factor(num_steps) for factor in schedule.lr_lambdas]
    rates = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
    place = {"last_epoch": num_steps, "_step_count": num_steps + 1, "_last_lr": rates}
    schedule.load_state_dict(schedule.state_dict() | place)
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Json]]:
    """Return an optimizer's state: tensors by "slots.0.exp_avg" or "groups.0.d", the rest as JSON alike."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Json] = {}
    owners = [(f"slots.{index}", slot) for index, slot in state["state"].items()]
    owners += [(f"groups.{index}", group) for index, group in enumerate(state["param_groups"])]
    for owner, values in owners:
        for name, value in values.items():
            key = f"{owner}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            elif name != "params":
                numbers[key] = list(value) if isinstance(value, tuple) else value
    return tensors, numbers


def load_optimizer_state(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Json]
) -> None:
    """Put back what `optimizer_state` returned, but for what the configuration sets."""
    state = optimizer.state_dict()
    for key, value in (*tensors.items(), *numbers.items()):
        owner, index, name = key.split(".", 2)
        if owner == "groups":
            if name in CONFIGURED:
                continue
            group = state["param_groups"][int(index)]
            group[name] = tuple(value) if isinstance(group.get(name), tuple) else value  # type: ignore[arg-type]
        else:
            state["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(state)

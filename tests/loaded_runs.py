"""Runs loaded as training loads them, for tests that drive the loop by hand."""

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ether_diffusion.training.batches import Batch
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.methods import prepared
from ether_diffusion.training.processes import make_accelerator
from ether_diffusion.training.setup import Run, check_run, load_run


def load(config: DreamBoothConfig) -> Run:
    """Load all that a run trains; nothing is written."""
    return load_run(check_run(config, make_accelerator(config.compute)))


def batches(run: Run) -> Iterator[Batch]:
    """Return the micro-batches of the whole run."""
    return run.source.batches(run.trainer.progress.samples(0, 0))


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters in training by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def gradients(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Return the gradients of a batch's loss by parameter name, and leave none behind."""
    with ExitStack() as stack:
        for part in run.trainer.parts:
            stack.enter_context(prepared(part.model, part.config))
        run.trainer.denoising.losses(batch).mean().backward()
    found = {}
    for part in run.trainer.parts:
        for name, parameter in part.model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                found[f"{part.part}.{name}"] = parameter.grad
                parameter.grad = None
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float, atol: float) -> None:
    """Compare tensors by name."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol)

"""The gradient-informed start of ETHER: vectors along which the loss falls most at first.

With G = dL/dW of the base, reflecting W's input along û changes the loss by -2λ ûᵀ sym(WᵀG) û at first
order, and ETHER+'s relaxation by λ (v̂ᵀ sym(WᵀG) v̂ - ûᵀ sym(WᵀG) û); on the output side it is sym(G Wᵀ).
So û is the eigenvector of each diagonal block with the largest eigenvalue, v̂ that with the smallest, and
λ starts at 0, with the base itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ether_diffusion.training.methods import ADAPTER_NAME, adapters_off
from ether_diffusion.training.setup import Run
from ether_diffusion.tuner.linear import EtherLinear

NUM_ROWS = 32
"""Photos with noise that the gradient is of: those of the first updates."""


def start_from_gradient(run: Run) -> None:
    """Give the adapters of a run that begins the vectors of the gradient."""
    models = [part.model for part in run.trainer.parts]
    layers = [m for model in models for m in model.modules() if isinstance(m, EtherLinear)]
    with adapters_off(models), _with_gradients(layers):
        _add_gradients(run)
        for layer in layers:
            weight = layer.base_linear.weight
            if weight.grad is not None:
                gradient = run.accelerator.reduce(weight.grad, reduction="mean").float()
                set_vectors(layer, weight.detach().float(), gradient)


def _add_gradients(run: Run) -> None:
    trainer, progress, num_rows = run.trainer, run.trainer.progress, 0
    for batch in run.source.batches(progress.samples(0, run.accelerator.process_index)):
        torch.manual_seed(trainer.seed)
        with run.accelerator.autocast():
            losses = trainer.denoising.losses(batch)
        torch.autograd.backward((losses * batch.weights.to(losses.device)).sum())
        num_rows += len(batch.latents)
        if num_rows >= NUM_ROWS:
            return


@contextmanager
def _with_gradients(layers: Sequence[EtherLinear]) -> Iterator[None]:
    """Let the frozen weights have gradients inside."""
    weights = [layer.base_linear.weight for layer in layers]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


@torch.no_grad()
def set_vectors(layer: EtherLinear, weight: Tensor, gradient: Tensor) -> None:
    """Point the vectors of a layer along the eigenvectors of its sides, their norms as they are."""
    sides = (
        (layer.ether_input_u, layer.ether_input_v, weight.mT @ gradient),
        (layer.ether_output_u, layer.ether_output_v, gradient @ weight.mT),
    )
    for us, vs, product in sides:
        if ADAPTER_NAME not in us:
            continue
        u = us[ADAPTER_NAME]
        num_blocks, width = u.shape
        symmetric = (product + product.mT) / 2
        blocks = symmetric.view(num_blocks, width, num_blocks, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        vectors = torch.linalg.eigh(blocks).eigenvectors.to(u.dtype)
        norms = torch.linalg.vector_norm(u, dim=1, keepdim=True)
        u.copy_(vectors[..., -1] * norms)
        if ADAPTER_NAME in vs:
            vs[ADAPTER_NAME].copy_(vectors[..., 0] * norms)

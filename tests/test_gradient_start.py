"""The gradient-informed start: the base at first, and no direction that lowers the loss faster."""

from pathlib import Path

import pytest
import torch
from loaded_runs import batches, load, trained
from torch import Tensor
from training_runs import config

from ether_diffusion.strict_json import Json
from ether_diffusion.training.gradient_start import NUM_ROWS, start_from_gradient
from ether_diffusion.training.methods import adapters_off
from ether_diffusion.training.setup import Run

FLAGS: dict[str, Json] = {"strength": "learned", "gradient_init": True, "train_batch_size": 4}


def slopes(run: Run) -> Tensor:
    """How the loss of the rows that the start looks at changes with each λ, at λ = 0."""
    strengths = {n: p for n, p in run.unet.named_parameters() if "ether_strength" in n}
    for batch, _ in zip(batches(run), range(NUM_ROWS // 4), strict=False):
        (run.trainer.denoising.losses(batch) * batch.weights).sum().backward()
    found = torch.cat([p.grad for p in strengths.values() if p.grad is not None])
    for parameter in run.unet.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("adapter", ["ether", "ether_plus"])
@pytest.mark.parametrize("sides", ["input", "output"])
def test_no_direction_lowers_the_loss_faster(tmp_path: Path, adapter: str, sides: str) -> None:
    run = load(config(tmp_path, adapter=adapter, sides=sides, max_train_steps=NUM_ROWS // 4, **FLAGS))
    drawn = trained(run.unet)
    start_from_gradient(run)
    steepest = slopes(run)
    assert (steepest < 0).all()
    for seed in range(8):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in run.unet.named_parameters():
                if name in drawn and "strength" not in name:
                    parameter.copy_(torch.randn_like(parameter))
        assert (slopes(run) > steepest).all()


def test_it_starts_at_the_base_bit_for_bit_with_frozen_weights(tmp_path: Path) -> None:
    run = load(config(tmp_path, adapter="ether_plus", **FLAGS))
    before = {n: p.norm(dim=-1) for n, p in trained(run.unet).items() if "strength" not in n}
    start_from_gradient(run)
    batch = next(batches(run))
    with torch.no_grad():
        found = run.trainer.denoising.losses(batch)
        with adapters_off([run.unet]):
            assert torch.equal(found, run.trainer.denoising.losses(batch))
    base = {n: p for n, p in run.unet.named_parameters() if "ether_" not in n}
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base.values())
    after = trained(run.unet)
    for name, norms in before.items():
        torch.testing.assert_close(after[name].norm(dim=-1), norms)

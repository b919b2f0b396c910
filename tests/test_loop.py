"""The loop's arithmetic: accumulation, averages, refusals, and rates, driven by hand."""

from pathlib import Path

import pytest
import torch
from loaded_runs import assert_same, batches, load, trained
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training_runs import config

from ether_diffusion.strict_json import Json
from ether_diffusion.training.loop import NonFiniteError, Progress, averaged


@pytest.mark.parametrize("adapter", ["ether", "ether_plus", "lora"])
def test_four_photos_at_once_are_four_in_turn(tmp_path: Path, adapter: str) -> None:
    found = []
    for batch, turns in ((4, 1), (2, 2), (1, 4)):
        flags: dict[str, Json] = {"train_batch_size": batch, "gradient_accumulation_steps": turns}
        flags |= {"caption_dropout": 0.5, "random_flip": True}
        run = load(config(tmp_path, adapter=adapter, max_train_steps=3, **flags))
        losses = [report.loss for report in run.trainer.steps(batches(run))]
        found.append((losses, trained(run.unet)))
    for losses, parameters in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        # Adam's first steps divide gradients by their own size, which blows rounding up near zero
        assert_same(parameters, found[0][1], rtol=1e-3, atol=1e-4)


def test_the_average_is_that_of_torch(tmp_path: Path) -> None:
    run = load(config(tmp_path, max_train_steps=6, use_ema=True, ema_decay=0.6))
    trainer = run.trainer
    holder = torch.nn.ParameterList(trainer.parameters)
    oracle = None
    for count, _ in enumerate(trainer.steps(batches(run)), 1):
        # diffusers warms the decay up: (1 + n) / (10 + n) after n earlier updates, and none at first
        decay = 0.0 if count == 1 else min(0.6, count / (9 + count))
        if oracle is None:
            oracle = AveragedModel(holder, multi_avg_fn=get_ema_multi_avg_fn(0.0))
            oracle.update_parameters(holder)
        else:
            oracle.multi_avg_fn = get_ema_multi_avg_fn(decay)
            oracle.update_parameters(holder)
    assert oracle is not None
    learned = [parameter.detach().clone() for parameter in trainer.parameters]
    with averaged(trainer):
        for found, expected in zip(trainer.parameters, oracle.module.parameters(), strict=True):
            torch.testing.assert_close(found, expected)
        assert not torch.equal(trainer.parameters[0], learned[0])
    for found, before in zip(trainer.parameters, learned, strict=True):
        assert torch.equal(found, before)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_leaves_the_adapter_as_it_was(tmp_path: Path, what: str) -> None:
    run = load(config(tmp_path, learning_rate=0.5))
    trainer, given = run.trainer, batches(run)
    trainer.train_step([next(given)])
    before, state = trained(run.unet), trainer.state()
    batch = next(given)
    if what == "loss":
        batch.latents[0, 0, 0, 0] = float("nan")
    else:
        trainer.parameters[3].register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError) as refused:
        trainer.train_step([batch])
    assert str(refused.value).startswith(f"the {what} of step 2 is not finite, at learning rate 0.5, with ")
    assert batch.names[0] in str(refused.value)
    after = trained(run.unet)
    assert all(torch.equal(after[name], before[name]) for name in before)
    tensors, numbers = trainer.state()
    assert numbers == state[1]
    for file, stored in state[0].items():
        assert all(torch.equal(tensors[file][name], stored[name]) for name in stored)


def test_the_text_encoder_has_a_rate_of_its_own(tmp_path: Path) -> None:
    run = load(config(tmp_path, train_text_encoder=True, learning_rate=0.01, text_encoder_lr=0.002))
    groups = run.trainer.optimizer.param_groups
    assert [group["lr"] for group in groups] == [0.01, 0.002]
    assert [len(group["params"]) for group in groups] == [len(part.parameters) for part in run.trainer.parts]


@pytest.mark.parametrize(("batch", "turns", "processes"), [(1, 1, 1), (2, 3, 1), (1, 2, 3), (2, 2, 2)])
def test_every_visit_falls_to_one_process_once(batch: int, turns: int, processes: int) -> None:
    progress = Progress(4, batch, turns, processes)
    size = batch * turns * processes
    for first in (0, 2):
        by_process = [list(progress.samples(first, index)) for index in range(processes)]
        for step in range(first, 4):
            lists = [visits[(step - first) * turns : (step - first + 1) * turns] for visits in by_process]
            seen = sorted(visit for micro in lists for visits in micro for visit in visits)
            assert seen == list(range(step * size, (step + 1) * size))

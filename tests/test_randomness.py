"""Streams of random numbers: functions of their names, and of nothing else."""

import subprocess
import sys

import torch

from ether_diffusion.training.randomness import stream


def draw(*arguments: int, purpose: str = "noise", seed: int = 0) -> torch.Tensor:
    return torch.randn(4, generator=stream(seed, purpose, *arguments))


def test_equal_names_give_equal_numbers_whatever_was_drawn_before() -> None:
    first = draw(1, 2)
    torch.manual_seed(5)
    draw(7)
    assert torch.equal(draw(1, 2), first)


def test_seed_purpose_and_each_index_change_the_numbers() -> None:
    drawn = [draw(1, 2), draw(2, 1), draw(12), draw(1, 2, purpose="crop"), draw(1, 2, seed=1), draw(1, 2, 0)]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(drawn)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    draw(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_process_draws_the_same_numbers() -> None:
    code = (
        "import torch; from ether_diffusion.training.randomness import stream; "
        "print(torch.randn(4, generator=stream(0, 'noise', 1, 2)).tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(draw(1, 2).tolist())

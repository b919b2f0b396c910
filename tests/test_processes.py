"""A run in two processes: the adapter of one process with twice the batch, and one end for both."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked_runs import exit_code, fork, fork_pair, training, wait_for_lines
from safetensors.torch import load_file
from training_runs import command, config, contents, environment, log_of

from ether_diffusion.adapters.format import TENSORS_NAME
from ether_diffusion.strict_json import Json
from ether_diffusion.training.checkpoint import newest_checkpoint


def assert_equal_runs(one: Path, other: Path) -> None:
    """Assert that two runs learned the same, to the rounding of sums in another order."""
    expected = load_file(one / TENSORS_NAME)
    for name, tensor in load_file(other / TENSORS_NAME).items():
        # sums in another order, and Adam divides small gradients by each other
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-5)
    for line, before in zip(log_of(other), log_of(one), strict=True):
        assert line == pytest.approx(before, rel=1e-4)


def exit_codes(pair: tuple[int, int]) -> list[int]:
    return [exit_code(child) for child in pair]


def test_two_launched_processes_learn_what_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    one = config(tmp_path, output_dir=str(tmp_path / "one"), train_batch_size=4)
    two = config(tmp_path, output_dir=str(tmp_path / "two"), train_batch_size=2)
    assert exit_code(fork(training(one))) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *command(two)]
    done = subprocess.run(
        launch, env=environment() | {"ACCELERATE_USE_CPU": "true"}, timeout=120, check=False
    )
    assert done.returncode == 0
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path: Path) -> None:
    run = config(tmp_path, max_train_steps=1000, checkpointing_steps=1000)
    for told, number in enumerate((signal.SIGINT, signal.SIGTERM)):
        pair = fork_pair(run)
        wait_for_lines(pair[0], tmp_path / "run" / "log.jsonl", 2 + 3 * told)
        os.kill(pair[told], number)
        assert exit_codes(pair) == [128 + number] * 2
        checkpoint = newest_checkpoint(tmp_path / "run")
        assert checkpoint is not None
        assert checkpoint.step == len(log_of(tmp_path / "run")) < 1000


def test_a_second_signal_to_the_main_process_ends_both_at_once(tmp_path: Path) -> None:
    drawing: dict[str, Json] = {"validation_prompt": ["a cat"], "validation_num_inference_steps": 500}
    said = tmp_path / "said"
    main, other = fork_pair(config(tmp_path, **drawing), said)
    end = time.monotonic() + 60
    while not (said.exists() and "0/4" in said.read_text()):  # the bar comes before the first images
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.5)
    for _ in range(2):
        os.kill(main, signal.SIGTERM)
        time.sleep(0.005)
    codes = exit_codes((main, other))
    assert codes[0] == 143
    assert codes[1] != 0  # where the second came between two messages, the other finds a closed connection
    assert newest_checkpoint(tmp_path / "run") is None


def test_a_run_of_two_processes_goes_on_to_the_same_bytes_and_stops_as_one(tmp_path: Path) -> None:
    flags: dict[str, Json] = {"train_text_encoder": True, "use_ema": True, "validation_prompt": ["a cat"]}
    flags |= {"validation_num_inference_steps": 1, "num_validation_images": 1, "validation_steps": 2}
    flags |= {"report_to": "tensorboard"}  # closing it does not part the processes
    assert exit_codes(fork_pair(config(tmp_path, **flags))) == [0, 0]
    whole = contents(tmp_path / "run")
    again = config(tmp_path, resume_from_checkpoint="checkpoint-2", **flags)
    assert exit_codes(fork_pair(again)) == [0, 0]
    before = contents(tmp_path / "run")
    assert before[TENSORS_NAME] == whole[TENSORS_NAME]
    said = tmp_path / "said"
    other = config(tmp_path, **(flags | {"learning_rate": 1.0}))
    assert exit_codes(fork_pair(other, said)) == [2, 2]
    assert "holds a run that was begun otherwise" in said.read_text()
    assert "Traceback" not in said.read_text()
    assert contents(tmp_path / "run") == before

"""SIGKILL at any instant, saves included: started again, a run ends with the bytes it would have had."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from forked_runs import exit_code, fork, training, wait_for_lines
from training_runs import config, log_of, trained_files

from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import DreamBoothConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

NUM_KILLS, NUM_STEPS = 10, 30


def uninterrupted(tmp_path: Path, **flags: Json) -> tuple[DreamBoothConfig, float]:
    """Train without a kill; return the run and the seconds that it took."""
    whole = config(tmp_path, output_dir=str(tmp_path / "whole"), **flags)
    began = time.monotonic()
    assert exit_code(fork(training(whole))) == 0
    return whole, time.monotonic() - began


def assert_same(tmp_path: Path, run: Path) -> None:
    whole = tmp_path / "whole"
    assert trained_files(run) == trained_files(whole)
    assert log_of(run) == log_of(whole)
    assert [line["step"] for line in log_of(run)] == list(range(1, len(log_of(whole)) + 1))


def kill_somewhere(run: DreamBoothConfig, rng: random.Random, seconds: float) -> int:
    """Start a run and kill it while it loads, or some updates later; return its exit code."""
    log = run.output.output_dir / "log.jsonl"
    lines = log.read_bytes().count(b"\n") if log.exists() else 0
    child = fork(training(run))
    if rng.random() < 0.8:
        wait_for_lines(child, log, lines + rng.randrange(1, 3))
    time.sleep(rng.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    return exit_code(child)


def test_a_run_killed_at_many_instants_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    flags: dict[str, Json] = {
        "max_train_steps": NUM_STEPS,
        "checkpointing_steps": 1,
        "cache_latents": False,
        "dropout": 0.2,
        "adapter": "ether",
        "use_ema": True,
        "lr_scheduler": "cosine",
    }
    _, seconds = uninterrupted(tmp_path, **flags)
    for num_workers in (0, 2):
        path = tmp_path / f"workers-{num_workers}"
        run = config(tmp_path, output_dir=str(path), dataloader_num_workers=num_workers, **flags)
        rng = random.Random(num_workers)
        codes = [kill_somewhere(run, rng, 2 * seconds / NUM_STEPS) for _ in range(NUM_KILLS)]
        assert codes == [-signal.SIGKILL] * NUM_KILLS
        assert exit_code(fork(training(run))) == 0
        assert_same(tmp_path, path)

"""SIGKILL at any instant, saves included: started again, a run ends with the bytes it would have had."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from encoder_models import save_clip
from forked_runs import exit_code, fork, training, training_until_change, wait_for_lines
from training_runs import config, log_of, trained_files

from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import DreamBoothConfig

NUM_KILLS, NUM_STEPS = 20, 52


def assert_as_if_alive(tmp_path: Path, run: DreamBoothConfig) -> None:
    """Let a run end, and compare it with one that nothing disturbed."""
    path, whole = run.output.output_dir, tmp_path / "whole"
    assert exit_code(fork(training(run))) == 0
    assert trained_files(path) == trained_files(whole)
    assert log_of(path) == log_of(whole)


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
    began = time.monotonic()
    assert exit_code(fork(training(config(tmp_path, output_dir=str(tmp_path / "whole"), **flags)))) == 0
    seconds = 2 * (time.monotonic() - began) / NUM_STEPS
    for num_workers in (0, 2):
        path = str(tmp_path / f"workers-{num_workers}")
        run = config(tmp_path, output_dir=path, dataloader_num_workers=num_workers, **flags)
        rng = random.Random(num_workers)
        codes = [kill_somewhere(run, rng, seconds) for _ in range(NUM_KILLS)]
        assert codes == [-signal.SIGKILL] * NUM_KILLS
        assert_as_if_alive(tmp_path, run)


def test_a_measured_run_killed_before_changes_of_the_disk_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ether_diffusion.training.evaluation.draw_curve", lambda curve: b"slow to draw")
    flags: dict[str, Json] = {
        "max_train_steps": 2,
        "eval_steps": 1,
        "eval_encoder": [str(save_clip(tmp_path / "clip"))],
        "eval_prompt": ["a sks cat"],
        "num_eval_images": 1,
        "eval_num_inference_steps": 1,
        "eval_max_drift": 100.0,
        "eval_max_prompt_loss": 1.0,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 1,
    }
    assert exit_code(fork(training(config(tmp_path, output_dir=str(tmp_path / "whole"), **flags)))) == 0
    run, rng, number, num_kills, code = config(tmp_path, **flags), random.Random(0), 0, -1, -9
    while code == -9:
        number, num_kills = number + rng.randrange(1, 5), num_kills + 1
        code = exit_code(fork(training_until_change(run, number)))
    assert code == 0
    assert num_kills > 5  # a save alone has about twenty changes
    assert_as_if_alive(tmp_path, run)

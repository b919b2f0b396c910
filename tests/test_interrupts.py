"""SIGINT and SIGTERM: the step ends, is saved, and the exit code says which; asked twice, at once."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_runs import exit_code, fork, training, wait_for_lines
from training_runs import command, config, contents, log_of, trained_files, write_photos

from ether_diffusion.scripts.train_dreambooth import main
from ether_diffusion.strict_json import Json
from ether_diffusion.training.checkpoint import newest_checkpoint
from ether_diffusion.training.run_lock import LOCK_NAME

LONG: dict[str, Json] = {"max_train_steps": 5000, "checkpointing_steps": 5000}


def wait_until(claim: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.002)


def saved_step(run: Path) -> int:
    """Return the last step of the log, which must be in a whole checkpoint, as the folder must be free."""
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    assert [line["step"] for line in log_of(run)] == list(range(1, checkpoint.step + 1))
    assert not (run / LOCK_NAME).exists()
    return checkpoint.step


@pytest.mark.parametrize(("number", "num_workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_a_signal_ends_the_step_and_saves_it(
    tmp_path: Path, number: signal.Signals, num_workers: int
) -> None:
    run = config(tmp_path, cache_latents=num_workers == 0, dataloader_num_workers=num_workers, **LONG)
    child = fork(training(run), tmp_path / "said")
    wait_for_lines(child, tmp_path / "run" / "log.jsonl", 3)
    os.kill(child, number)
    assert exit_code(child) == 128 + number
    assert saved_step(tmp_path / "run") >= 3
    assert f"stopped by {number.name}; the same command goes on from here" in (tmp_path / "said").read_text()


def test_an_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one(tmp_path: Path) -> None:
    flags: dict[str, Json] = {"max_train_steps": 8, "checkpointing_steps": 1000}
    assert exit_code(fork(training(config(tmp_path, output_dir=str(tmp_path / "whole"), **flags)))) == 0
    stopped: list[int] = []
    codes: list[int] = []
    for _ in range(2):
        child = fork(training(config(tmp_path, **flags)))
        wait_for_lines(child, tmp_path / "run" / "log.jsonl", max(stopped, default=0) + 1)
        os.kill(child, signal.SIGTERM)
        codes.append(exit_code(child))
        stopped.append(saved_step(tmp_path / "run"))
    assert codes == [143, 143]
    assert exit_code(fork(training(config(tmp_path, **flags)))) == 0
    files, whole = (trained_files(tmp_path / name) for name in ("run", "whole"))
    assert {name: data for name, data in files.items() if data != whole.get(name)}.keys() == {
        name for name in files if name.startswith(f"checkpoint-{stopped[1]}/")
    }
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def test_a_second_signal_ends_at_once_and_leaves_whole_checkpoints(tmp_path: Path) -> None:
    run = config(tmp_path, max_train_steps=5000, checkpointing_steps=2)
    child = fork(training(run))
    wait_for_lines(child, tmp_path / "run" / "log.jsonl", 5)
    os.kill(child, signal.SIGINT)
    time.sleep(0.02)
    began = time.monotonic()
    os.kill(child, signal.SIGTERM)
    assert exit_code(child) in (143, 130)  # the step had ended before
    assert time.monotonic() - began < 5
    assert newest_checkpoint(tmp_path / "run") is not None
    assert not list((tmp_path / "run").glob(".*"))


def test_a_signal_while_class_images_are_drawn_keeps_those_that_are(tmp_path: Path) -> None:
    flags: dict[str, Json] = {
        "prior_preservation": "class_images",
        "class_data_dir": str(tmp_path / "classes"),
        "class_prompt": "a cat",
        "sample_batch_size": 1,
    }
    run = config(tmp_path, num_class_images=1000, **flags)
    child = fork(training(run))
    wait_until(lambda: len(list((tmp_path / "classes").glob("*.png"))) >= 1)
    os.kill(child, signal.SIGINT)
    assert exit_code(child) == 130
    drawn = len(list((tmp_path / "classes").glob("*.png")))
    assert 1 <= drawn < 1000
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_a_signal_while_images_are_drawn_saves_what_was_learned(tmp_path: Path) -> None:
    drawing: dict[str, Json] = {"validation_prompt": ["a cat"], "validation_num_inference_steps": 40}
    child = fork(training(config(tmp_path, validation_steps=3, num_validation_images=1, **drawing, **LONG)))
    wait_for_lines(child, tmp_path / "run" / "log.jsonl", 3)
    os.kill(child, signal.SIGTERM)
    assert exit_code(child) == 143
    assert saved_step(tmp_path / "run") == 3
    assert not (tmp_path / "run" / "samples" / "step-000003").exists()


def test_a_signal_while_photos_are_encoded_writes_no_checkpoint(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", count=40)
    child = fork(training(config(tmp_path, crops_per_photo=50, center_crop=False, **LONG)))
    wait_until(lambda: (tmp_path / "run" / "run.json").exists())
    os.kill(child, signal.SIGTERM)
    assert exit_code(child) == 143
    assert contents(tmp_path / "run").keys() <= {"run.json", "training_config.yaml"}


def test_an_interrupt_while_photos_are_checked_ends_without_a_traceback(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", count=1000)
    asked = command(config(tmp_path))[2:]

    def trained() -> int:
        # a job in the background of a shell is started with SIGINT ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return main(asked)

    child = fork(trained, tmp_path / "said")
    time.sleep(0.4)
    os.kill(child, signal.SIGINT)
    assert exit_code(child) == 130
    assert "Traceback" not in (tmp_path / "said").read_text()

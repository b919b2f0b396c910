"""Going on with a run: the bytes of an uninterrupted one, whatever is trained; and what is refused."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import config, contents, log_of, trained_files, write_base, write_photos

from ether_diffusion.strict_json import Json
from ether_diffusion.training.run import train_dreambooth

CLASSES: dict[str, Json] = {
    "prior_preservation": "class_images",
    "class_data_dir": "classes",
    "class_prompt": "a cat",
    "num_class_images": 2,
}
DRAWN: dict[str, Json] = {
    "validation_prompt": ["a sks cat"],
    "num_validation_images": 1,
    "validation_steps": 2,
    "validation_num_inference_steps": 2,
}
KINDS: dict[str, dict[str, Json]] = {
    "ether, dropped, with its text encoder": {"adapter": "ether", "dropout": 0.5, "train_text_encoder": True},
    "ether_plus, averaged, captions dropped": {"use_ema": True, "ema_decay": 0.5, "caption_dropout": 0.5},
    "lora on a cosine": {"adapter": "lora", "export_lora": True, "lr_scheduler": "cosine", "snr_gamma": 5.0},
    "oft, accumulated": {"adapter": "oft", "train_batch_size": 2, "gradient_accumulation_steps": 2},
    "boft, two workers": {
        "adapter": "boft",
        "cache_latents": False,
        "dataloader_num_workers": 2,
        "random_flip": True,
    },
    "hra, frozen prior": {"adapter": "hra", "prior_preservation": "frozen", "class_prompt": "a cat"},
    "delora, validated": {"adapter": "delora", **DRAWN},
    "full, warmed up": {"adapter": "full", "lr_scheduler": "polynomial", "lr_warmup_steps": 1},
    "prodigy, class images": {"optimizer": "prodigy", **CLASSES},
    "buckets, offset noise": {
        "aspect_ratio_buckets": "8,8;8,16",
        "train_batch_size": 2,
        "noise_offset": 0.1,
    },
    "sdxl": {"train_text_encoder": True},
}


def class_images(tmp_path: Path) -> dict[str, Json]:
    write_photos(tmp_path / "classes", count=2, wide=2)
    return CLASSES | {"class_data_dir": str(tmp_path / "classes")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that ended, for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("trained")
    assert train_dreambooth(config(folder)) == 0
    return folder


def run_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture, **flags: Json) -> None:
    """Train, then train the second half again, and assert that all is as it was."""
    run = tmp_path / "run"
    assert train_dreambooth(config(tmp_path, **flags)) == 0
    whole, log = trained_files(run), log_of(run)
    with caplog.at_level(logging.INFO):
        assert train_dreambooth(config(tmp_path, resume_from_checkpoint="checkpoint-2", **flags)) == 0
    assert "going on from step 2" in caplog.text
    assert f"{run / 'checkpoint-4'} is later than where this run goes on from" in caplog.text
    assert trained_files(run) == whole
    assert log_of(run) == log
    assert [line["step"] for line in log] == [1, 2, 3, 4]


# PEFT's BOFT looks for a compiler of CUDA
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1")
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_and_two_are_four(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    flags = KINDS[kind]
    if "optimizer" in flags:
        pytest.importorskip("prodigyopt")
    if "class_data_dir" in flags:
        flags = flags | class_images(tmp_path)
    for wide in (1, 2) if "buckets" in kind else ():
        write_photos(tmp_path / "photos", wide=wide)
    if kind == "sdxl":
        write_base(tmp_path / "base", is_xl=True)
    run_twice(tmp_path, caplog, **flags)


def test_the_same_command_goes_on_by_itself_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_dreambooth(config(tmp_path, max_train_steps=2))
    with caplog.at_level(logging.INFO):
        train_dreambooth(config(tmp_path, max_train_steps=4))
    assert f"going on from step 2 of {tmp_path / 'run' / 'checkpoint-2'}" in caplog.text
    parts = trained_files(tmp_path / "run")
    train_dreambooth(config(tmp_path, output_dir=str(tmp_path / "whole")))
    assert parts == trained_files(tmp_path / "whole")


def test_a_learning_rate_that_may_change_is_the_one_that_trains(tmp_path: Path) -> None:
    train_dreambooth(config(tmp_path, max_train_steps=2, lr_scheduler="linear", adam_beta2=0.9))
    later = config(tmp_path, lr_scheduler="linear", learning_rate=1e-3, adam_beta2=0.99)
    train_dreambooth(later, allow_changes=True)
    rates = [line["learning_rate"] for line in log_of(tmp_path / "run")]
    assert rates == pytest.approx([6e-3, 3e-3, 1e-3 * 2 / 4, 1e-3 * 1 / 4])
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "state.json").read_text())
    assert state["optimizer"]["groups.0.betas"] == [0.9, 0.99]


def test_another_form_of_adapter_is_refused_even_with_allow_changes(trained: Path) -> None:
    before = contents(trained / "run")
    for names, flags in {
        "num_blocks": {"num_blocks": 4},
        "adapter": {"adapter": "lora"},
        "train_text_encoder": {"train_text_encoder": True},
        "sides, target_modules": {"target_modules": "to_q", "sides": "input"},
    }.items():
        with pytest.raises(ValueError, match=f"trains one adapter, and {names} would make another"):
            train_dreambooth(config(trained, **flags), allow_changes=True)  # type: ignore[arg-type]
    assert contents(trained / "run") == before


def test_an_average_may_begin_with_a_later_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train_dreambooth(config(tmp_path, max_train_steps=2))
    assert train_dreambooth(config(tmp_path, use_ema=True, ema_decay=0.5), allow_changes=True) == 0
    assert "no average was kept then; it begins with the adapter of step 2" in caplog.text


def test_images_of_what_is_trained_or_drawn_otherwise_are_drawn_again(tmp_path: Path) -> None:
    train_dreambooth(config(tmp_path, **DRAWN))
    samples = tmp_path / "run" / "samples"
    before = contents(samples)
    later = config(tmp_path, resume_from_checkpoint="checkpoint-2", learning_rate=10.0, **DRAWN)
    train_dreambooth(later, allow_changes=True)
    after = contents(samples)
    differing = {name for name, data in after.items() if before[name] != data}
    assert {str(Path(name).parent) for name in differing} == {".", "step-000004", "final"}
    other = config(tmp_path, learning_rate=10.0, **(DRAWN | {"validation_prompt": ["a sks cat on a wall"]}))
    train_dreambooth(other)
    last = contents(samples)
    assert {str(Path(name).parent) for name in after.keys() - last.keys()} == {"step-000000", "step-000002"}
    assert all(data != after[name] for name, data in last.items())


@pytest.mark.parametrize("changed", ["unet", "class images"])
def test_a_checkpoint_of_other_weights_or_class_images_is_refused(tmp_path: Path, changed: str) -> None:
    run = config(tmp_path, **class_images(tmp_path))
    train_dreambooth(run)
    before = contents(tmp_path / "run")
    if changed == "unet":
        write_base(tmp_path / "base", seed=7)
    else:
        write_photos(tmp_path / "classes", count=2, wide=2, seed=1)
    name = "weights of the base" if changed == "unet" else "photos or class images"
    with pytest.raises(ValueError, match=f"the {name} changed since .*; give --allow_changes"):
        train_dreambooth(run)
    assert contents(tmp_path / "run") == before
    assert train_dreambooth(run, allow_changes=True) == 0


def test_what_cannot_be_resumed_from_is_refused_and_nothing_changes(trained: Path) -> None:
    (trained / "elsewhere").mkdir()
    state = trained / "run" / "checkpoint-2" / "state.json"
    whole = state.read_text()
    state.write_text("{}")
    before = contents(trained / "run")
    for asked, sentence in {
        "checkpoint-3": "checkpoint-3 is no checkpoint; name a folder like checkpoint-500",
        str(trained / "elsewhere"): "elsewhere is no checkpoint of .*run",
        "checkpoint-2": "checkpoint-2 is not whole",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            train_dreambooth(config(trained, resume_from_checkpoint=asked))
    assert contents(trained / "run") == before
    state.write_text(whole)


def test_what_a_kill_right_after_a_save_left_is_gone_after_the_next_start(tmp_path: Path) -> None:
    drawn = class_images(tmp_path)
    assert train_dreambooth(config(tmp_path, **drawn)) == 0
    run, whole = tmp_path / "run", trained_files(tmp_path / "run")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-1")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    part = tmp_path / "classes" / f".00001-abc.png.{ended.pid}.part"
    part.write_bytes(b"half")
    assert train_dreambooth(config(tmp_path, **drawn)) == 0
    assert trained_files(run) == whole
    assert not part.exists()


@pytest.mark.parametrize("name", ["run.json", "log.jsonl"])
def test_a_fifo_in_a_run_is_refused_at_once(trained: Path, name: str) -> None:
    path = trained / "run" / name
    before = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"{name} is a FIFO, which is never opened; delete it"):
        train_dreambooth(config(trained))
    path.unlink()
    path.write_bytes(before)

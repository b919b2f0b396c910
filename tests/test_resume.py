"""Going on with a run: the bytes of an uninterrupted one, whatever is trained; and what is refused."""

import logging
from pathlib import Path

import pytest
from training_runs import config, log_of, trained_files, write_base, write_photos

from ether_diffusion.adapter_file.strict_json import Json
from ether_diffusion.training.run import train_dreambooth

KINDS: dict[str, dict[str, Json]] = {
    "ether": {"adapter": "ether"},
    "ether_plus": {},
    "lora": {"adapter": "lora", "export_lora": True},
    "oft": {"adapter": "oft"},
    "boft": {"adapter": "boft"},
    "hra": {"adapter": "hra"},
    "delora": {"adapter": "delora"},
    "averaged": {"use_ema": True, "ema_decay": 0.5},
    "warmed up on a cosine": {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
    "polynomial": {"lr_scheduler": "polynomial", "lr_power": 2.0, "lr_warmup_steps": 1},
    "prodigy": {"optimizer": "prodigy"},
    "captions dropped": {"caption_dropout": 0.5},
    "adapter dropped": {"adapter": "ether", "dropout": 0.5},
    "text encoder": {"train_text_encoder": True},
    "latents not cached": {"cache_latents": False, "random_flip": True},
    "two workers": {"cache_latents": False, "dataloader_num_workers": 2},
    "accumulated": {"train_batch_size": 2, "gradient_accumulation_steps": 2},
    "weighed": {"snr_gamma": 5.0, "noise_offset": 0.1},
    "frozen prior": {"prior_preservation": "frozen", "class_prompt": "a cat"},
    "validated": {"validation_prompt": ["a sks cat"], "num_validation_images": 1, "validation_steps": 2},
}


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
    if kind == "prodigy":
        pytest.importorskip("prodigyopt")
    flags = KINDS[kind]
    if kind == "validated":
        flags = flags | {"validation_num_inference_steps": 2}
    run_twice(tmp_path, caplog, **flags)


def test_two_steps_and_two_are_four_beside_class_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_photos(tmp_path / "classes", count=2, wide=2)
    run_twice(
        tmp_path,
        caplog,
        prior_preservation="class_images",
        class_data_dir=str(tmp_path / "classes"),
        class_prompt="a cat",
        num_class_images=2,
    )


def test_two_steps_and_two_are_four_in_buckets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for wide in (1, 2):
        write_photos(tmp_path / "photos", wide=wide)
    run_twice(tmp_path, caplog, aspect_ratio_buckets="8,8;8,16", train_batch_size=2)


def test_two_steps_and_two_are_four_on_sdxl(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_base(tmp_path / "base", is_xl=True)
    run_twice(tmp_path, caplog, train_text_encoder=True)

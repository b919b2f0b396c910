"""Validation images: base beside steps on equal seeds, a sheet that survives restarts, files drawn again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from base_kinds import open_pipeline
from loaded_runs import load
from numpy.typing import NDArray
from PIL import Image
from training_runs import config

from ether_diffusion import load_ether
from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.strict_json import Json
from ether_diffusion.training.result import write_adapters
from ether_diffusion.training.run import train_dreambooth
from ether_diffusion.training.validation import draw

DRAWN: dict[str, Json] = {
    "validation_prompt": ["a sks cat", "a dog"],
    "num_validation_images": 2,
    "validation_steps": 2,
    "validation_num_inference_steps": 2,
    "validation_guidance_scale": 2.0,
    "validation_negative_prompt": "a wall",
    "learning_rate": 0.1,
    "seed": 5,
}
NAMES = [f"prompt-{prompt:02d}_seed-{seed}.png" for prompt in (0, 1) for seed in (5, 6)]


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def drawn(samples: Path, name: str) -> list[NDArray[np.uint8]]:
    assert sorted(path.name for path in (samples / name).iterdir()) == NAMES
    return [pixels(samples / name / file) for file in NAMES]


def same(ones: list[NDArray[np.uint8]], others: list[NDArray[np.uint8]]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validated")
    assert train_dreambooth(config(folder, **DRAWN)) == 0
    return folder / "run"


def test_all_are_drawn_and_step_0_of_ether_plus_is_the_base_to_the_last_bit(run: Path) -> None:
    samples = run / "samples"
    folders = sorted(path.name for path in samples.iterdir() if path.is_dir())
    assert folders == ["base", "final", "step-000000", "step-000002", "step-000004"]
    for name in folders:
        drawn(samples, name)
    assert same(drawn(samples, "step-000000"), drawn(samples, "base"))
    assert not same(drawn(samples, "step-000004"), drawn(samples, "base"))


def test_a_step_of_ether_and_a_text_encoder_is_drawn_without_dropout_and_the_base_without_them(
    tmp_path: Path,
) -> None:
    settings = {**DRAWN, "adapter": "ether", "train_text_encoder": True, "dropout": 0.5, "max_train_steps": 1}
    assert train_dreambooth(config(tmp_path, **settings)) == 0
    samples = tmp_path / "run" / "samples"
    assert same(drawn(samples, "base"), by_diffusers(tmp_path / "run", adapted=False))
    assert not same(drawn(samples, "step-000000"), drawn(samples, "base"))
    assert same(drawn(samples, "step-000001"), drawn(samples, "final"))


def by_diffusers(run: Path, *, adapted: bool) -> list[NDArray[np.uint8]]:
    """Draw the validation's pictures as a user of diffusers would."""
    pipe = open_pipeline(run.parent / "base")
    pipe.set_progress_bar_config(disable=True)
    if adapted:
        load_ether(pipe, run)
    pictures = []
    for prompt in ("a sks cat", "a dog"):
        for seed in (5, 6):
            image = pipe(
                prompt,
                negative_prompt="a wall",
                height=8,
                width=8,
                num_inference_steps=2,
                guidance_scale=2.0,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]
            pictures.append(np.asarray(image))
    return pictures


@pytest.mark.parametrize(("name", "adapted"), [("base", False), ("final", True), ("step-000004", True)])
def test_the_pictures_are_those_of_diffusers_pipeline(run: Path, name: str, adapted: bool) -> None:
    for found, expected in zip(drawn(run / "samples", name), by_diffusers(run, adapted=adapted), strict=True):
        # attention is computed in another order: at most a step of rounding
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_the_last_pictures_come_from_the_files_that_were_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that is spoilt on its way to the disk is seen in them, and only in them."""

    def spoil(folder: Path, files: dict[str, bytes]) -> None:
        other = (tmp_path / "other" / "run" / "adapter_model.safetensors").read_bytes()
        write_adapters(folder, files | {"adapter_model.safetensors": other})

    short = DRAWN | {"max_train_steps": 2}
    assert train_dreambooth(config(tmp_path / "other", **(short | {"learning_rate": 0.3}))) == 0
    monkeypatch.setattr("ether_diffusion.training.result.write_adapters", spoil)
    assert train_dreambooth(config(tmp_path, **short)) == 0
    samples, others = tmp_path / "run" / "samples", tmp_path / "other" / "run" / "samples"
    assert same(drawn(samples, "final"), drawn(others, "final"))
    assert not same(drawn(samples, "final"), drawn(samples, "step-000002"))


def test_after_a_restart_the_sheet_shows_all_steps_and_half_a_step_is_drawn_again(
    run: Path, tmp_path: Path
) -> None:
    assert train_dreambooth(config(tmp_path, max_train_steps=2, **DRAWN)) == 0
    (tmp_path / "run" / "samples" / "step-000002" / NAMES[3]).unlink()
    assert train_dreambooth(config(tmp_path, **DRAWN)) == 0
    assert same(drawn(tmp_path / "run" / "samples", "step-000002"), drawn(run / "samples", "step-000002"))
    sheets = [pixels(folder / "samples" / "contact_sheet.png") for folder in (run, tmp_path / "run")]
    columns = ["base", "step-000000", "step-000002", "step-000004"]
    opened = [[Image.open(run / "samples" / column / name) for column in columns] for name in NAMES]
    expected = draw_contact_sheet(
        opened,
        row_labels=[f"{prompt} · seed {seed}" for prompt in ("a sks cat", "a dog") for seed in (5, 6)],
        column_labels=["base", "step 0", "step 2", "step 4"],
    )
    assert np.array_equal(sheets[0], np.asarray(expected))
    assert np.array_equal(sheets[1], sheets[0])


def test_a_picture_in_the_making_can_be_interrupted(tmp_path: Path) -> None:
    run, seen = load(config(tmp_path, validation_prompt=["a cat"])), list[int]()

    def stop() -> None:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt

    run.check = stop
    with pytest.raises(KeyboardInterrupt):
        draw(run, ["a cat"], seeds=[0], num_steps=5, guidance_scale=2.0)
    assert len(seen) == 2
    assert run.unet.training  # as it was

"""The demonstration does what the README says of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ether_diffusion.tiny_world.concepts import find_concept
from recipes.tiny_world.learned_subject import draw_subject, learn_subject

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return call("-m", f"recipes.tiny_world.{script}", *arguments)


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.slow
def test_the_demo_writes_a_sheet_and_scores(tmp_path: Path) -> None:
    done = run("demo", "--output_dir", tmp_path, "--subject", "teapot", "--steps", "2")
    assert done.returncode == 0, done.stderr
    sheet = tmp_path / "teapot" / "contact_sheet.png"
    assert done.stdout.strip() == str(sheet)
    with Image.open(sheet) as picture:
        assert picture.width > 1000
    for score in ("base, recognised", "adapter, recognised", "adapter, background", "training"):
        assert f"{score}: " in done.stderr
    assert (tmp_path / "teapot" / "adapter" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("subject", "sentence"),
    [("dragon", "no concept is named 'dragon'"), ("cat", "the base knows 'cat' already")],
)
def test_a_subject_that_is_none_is_refused(tmp_path: Path, subject: str, sentence: str) -> None:
    done = run("demo", "--output_dir", tmp_path, "--subject", subject)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_adapter_draws_its_subject_where_no_photo_showed_it(tmp_path: Path) -> None:
    fox = find_concept("fox")
    adapter = learn_subject(fox, tmp_path, {"max_train_steps": 100})
    scores = draw_subject(fox, adapter).scores()
    assert scores["base_recognised"] <= 0.25
    assert scores["adapter_recognised"] >= 0.75
    assert scores["adapter_background"] == 1.0


@pytest.mark.slow
def test_several_subjects_are_learned_and_scored(tmp_path: Path) -> None:
    short = ("--subjects", "taxi", "--steps", "2")
    done = call("-m", "research.learn_subjects", *short, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["subjects"]["taxi"]) >= {"base_recognised", "adapter_recognised", "seconds"}
    assert (tmp_path / "sheet.png").is_file()

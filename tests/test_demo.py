"""The demonstrations do what the README says of them."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from recipes.tiny_world import demo
from research import learn_subjects


@pytest.fixture(autouse=True)
def as_many_threads_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the demonstrations would set


@pytest.mark.slow
def test_the_demo_draws_its_subject_where_no_photo_showed_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert demo.main(["--output_dir", str(tmp_path), "--subject", "fox", "--steps", "100"]) == 0
    sheet = tmp_path / "fox" / "contact_sheet.png"
    assert capsys.readouterr().out.splitlines()[-1] == str(sheet)
    with Image.open(sheet) as picture:
        assert picture.width > 1000
    said = re.findall(r"^([a-z, ]+): (\d[\d.]*)(?: s)?$", "\n".join(caplog.messages), re.MULTILINE)
    scores = {name: float(value) for name, value in said}
    assert scores["base, recognised"] <= 0.25
    assert scores["adapter, recognised"] >= 0.75
    assert scores["adapter, background"] == 1.0
    assert scores["training"] > 0
    assert (tmp_path / "fox" / "adapter" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("subject", "sentence"),
    [("dragon", "no concept is named 'dragon'"), ("cat", "the base knows 'cat' already")],
)
def test_a_subject_that_is_none_is_refused(
    tmp_path: Path, subject: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--output_dir", str(tmp_path), "--subject", subject]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_several_subjects_are_learned_and_scored(tmp_path: Path) -> None:
    arguments = ["--subjects", "taxi", "--steps", "2", "--output_dir", str(tmp_path)]
    assert learn_subjects.main(arguments) in (0, None)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["subjects"]["taxi"]) >= {"base_recognised", "adapter_recognised", "seconds"}
    assert (tmp_path / "sheet.png").is_file()

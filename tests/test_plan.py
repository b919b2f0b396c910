"""`ether plan`: advice that follows the measured curves, and says where there are none."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from measured_files import LIKENESS, benchmark, photos, write_all
from PIL import Image
from training_runs import write_photos

from ether_diffusion.benchmark.plan import advise, read_curves
from ether_diffusion.scripts import ether
from ether_diffusion.training.config import DreamBoothConfig
from research.measured import Measured
from research.write_results import curves_of

NO_CURVES: dict[str, Any] = {"benchmark": None, "usable_range": None, "photos": None}
PLUS: dict[str, Any] = {"ether_plus": (0.66, 0.40), "lora": (0.62, 0.44)}
"""Likeness with which ETHER+ has the fewest parameters of those that are not behind."""


def curves(tmp_path: Path, files: dict[str, Any] | None = None, **likeness: tuple[float, ...]) -> Any:
    made = benchmark({**LIKENESS, **likeness})
    measured = Measured.read(write_all(tmp_path, benchmark=made, **(files or {})))
    return json.loads(json.dumps(curves_of(measured)))


def test_the_method_with_fewest_parameters_of_those_not_behind_is_advised(tmp_path: Path) -> None:
    found = advise(6, "tiny_world", curves(tmp_path, **PLUS))
    assert (found.method, found.learning_rate) == ("ether_plus", 0.006)
    behind = curves(tmp_path, ether_plus=(0.30, 0.10), ether=(0.10, 0.05))
    assert advise(6, "tiny_world", behind).method == "oft"
    whole = curves(tmp_path, full=(0.99, 0.98), **PLUS)
    assert "full" not in whole["benchmark"]["methods"]
    assert advise(6, "tiny_world", whole).method == "ether_plus"


def test_a_row_with_options_is_advised_with_them(tmp_path: Path) -> None:
    row = "ether:target_modules=.*to_(v|out.0),train_text_encoder=true,learning_rate=0.01"
    found = advise(6, "tiny_world", curves(tmp_path, **{**PLUS, row: (0.62, 0.45)}))
    assert (found.method, found.label) == (
        "ether",
        "ETHER .*to_(v|out.0) train_text_encoder=True",
    )
    assert found.flags()[:2] == ["--adapter ether", "--learning_rate 0.006"]
    assert {"--target_modules '.*to_(v|out.0)'", "--train_text_encoder", "--max_train_steps 200"} <= set(
        found.flags()
    )


def test_what_is_to_be_expected_is_what_was_measured(tmp_path: Path) -> None:
    found = advise(6, "tiny_world", curves(tmp_path))
    assert found.options["max_train_steps"] == 200
    assert "likeness to the subject 0.555 ± 0.100 by object" in found.expected[0]
    assert any("rates from 0.001 to 0.1" in sentence for sentence in found.basis)
    assert found.doubts == ()


@pytest.mark.parametrize(
    ("num_photos", "steps", "studied"),
    [(1, 100, "one photo"), (3, 100, "one photo"), (4, 50, "4 photos"), (40, 50, "4 photos")],
)
def test_steps_are_those_that_were_enough_for_as_many_photos(
    tmp_path: Path, num_photos: int, steps: int, studied: str
) -> None:
    found = advise(num_photos, "tiny_world", curves(tmp_path, {"photos": photos()}, **PLUS))
    assert (found.method, found.options["max_train_steps"]) == ("ether_plus", steps)
    (told,) = [sentence for sentence in found.basis if "fewest steps" in sentence]
    score = photos()["photos"][studied.partition(" ")[0].replace("one", "1")][str(steps)]["object"]["mean"]
    assert f"of trainings with {studied}: likeness {score:.3f} ± " in told
    assert told.endswith("the base alone 0.300")
    assert bool(found.doubts) == (num_photos == 40)


def test_a_study_of_another_method_says_nothing_of_this_one(tmp_path: Path) -> None:
    made = curves(tmp_path, {"photos": photos("ether")}, **PLUS)
    assert advise(1, "tiny_world", made).options["max_train_steps"] == 200


@pytest.mark.parametrize(
    ("base", "steps", "rate"),
    [("tiny_world", 200, 3e-3), ("tiny_world_2", 200, 3e-3), ("some/base", 1200, 6e-3)],
)
def test_what_was_not_measured_has_no_promise(base: str, steps: int, rate: float) -> None:
    found = advise(5, base, NO_CURVES)
    assert found.expected == ()
    assert (found.method, found.learning_rate, found.options["max_train_steps"]) == (
        "ether_plus",
        rate,
        steps,
    )
    assert found.doubts[0].startswith(f"nothing was measured here on {base}")


@pytest.mark.parametrize(("num_photos", "doubted"), [(1, True), (4, False), (6, False), (40, True)])
def test_other_numbers_of_photos_than_were_measured_are_doubted(num_photos: int, doubted: bool) -> None:
    doubts = advise(num_photos, "some/base", NO_CURVES).doubts
    assert any(sentence.startswith(f"{num_photos} photos: ") for sentence in doubts) == doubted


@pytest.mark.parametrize("base", ["tiny_world", "tiny_world_2", "some/base"])
def test_the_advice_is_a_configuration_of_training(base: str) -> None:
    found = advise(5, base, read_curves())
    options = {
        **found.options,
        "instance_prompt": "a photo of sks thing",
        "token": "sks",
        "output_dir": "run",
    }
    if "prior_preservation" in options:
        options |= {"class_data_dir": "classes", "class_prompt": "a photo of thing"}
    options |= {"adapter": found.method, "learning_rate": found.learning_rate, "instance_data_dir": "photos"}
    assert DreamBoothConfig.from_flat(options).learning_rate == found.learning_rate


def test_the_command_counts_photos_and_prints_a_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_photos(tmp_path / "photos", count=5)
    assert ether.main(["plan", "--photos", str(folder), "--base", "some/base"]) == 0
    said = capsys.readouterr().out
    words = shlex.split(said.splitlines()[1])
    assert words[0] == "train-dreambooth"
    assert words[words.index("--max_train_steps") + 1] == "1200"
    assert words[words.index("--class_prompt") + 1] == "a photo of THING"
    assert words[words.index("--instance_data_dir") + 1] == str(folder)
    assert "not known: nothing was measured here on some/base" in said
    (folder / "empty.png").touch()
    Image.new("RGB", (64, 64)).save(folder / "black.png")
    assert ether.main(["plan", "--photos", str(folder), "--base", "some/base"]) == 0
    said = capsys.readouterr().out
    assert "photos: not used: empty.png is empty" in said
    assert "photos: black.png: is black" in said
    assert ether.main(["plan", "--photos", "5", "--base", "some/base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["learning_rate"] == 6e-3


@pytest.mark.parametrize(
    ("photos", "words"),
    [("0", "needs photos; found 0"), ("nowhere", "nowhere"), ("", "found nothing"), ("9" * 5000, "999")],
)
def test_what_is_no_number_and_no_folder_gets_a_sentence(
    capsys: pytest.CaptureFixture[str], photos: str, words: str
) -> None:
    assert ether.main(["plan", "--photos", photos]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ether plan: ")
    assert words in error


def test_a_folder_that_is_no_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ether.main(["plan", "--photos", "5", "--base", str(tmp_path)]) == 2
    assert "is not the folder of a base model: it has no model_index.json" in capsys.readouterr().err

"""The study of control: equal terms for all methods, nothing done twice, and rows that say what they are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ether_diffusion.tiny_world.concepts import load_concepts
from recipes.tiny_world.control_pairs import VALIDATION_CONCEPTS, training_concepts
from research import study_control
from research.control_results import score_runs, tiny_yardsticks, title_of, true_run
from research.study_control import StudyRun, StudySettings, carry_out, draw_base, validation_pairs

QUICK = StudySettings(num_pairs=4, steps=2, batch_size=2, scenes_per_concept=1, inference_steps=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two methods and the base, of two steps each."""
    folder = tmp_path_factory.mktemp("study")
    draw_base(folder, QUICK, 0)
    for method in ("ether_plus", "lora"):
        carry_out(StudyRun(method, None, 0), folder, QUICK)
    return folder


def test_no_concept_is_both_learned_from_and_drawn() -> None:
    drawn = {pair.scene.concept.name for pair in validation_pairs(QUICK)}
    assert drawn == set(VALIDATION_CONCEPTS)
    assert not drawn & {concept.name for concept in training_concepts()}


def test_a_run_that_is_drawn_is_read_and_not_done_again_nor_mixed_with_others(root: Path) -> None:
    file = root / "ether_plus_0" / "drawn.safetensors"
    before = file.stat().st_mtime_ns
    found = carry_out(StudyRun("ether_plus", None, 0), root, QUICK)
    assert file.stat().st_mtime_ns == before
    assert torch.equal(found.pictures, load_file(file)["pictures"].float() / 127.5 - 1)
    assert found.learning_rate == 1e-3  # the paper's, of ETHER
    with pytest.raises(ValueError, match="holds a run of other settings; name another folder"):
        carry_out(StudyRun("lora", None, 0), root, replace(QUICK, steps=3))


def test_a_run_says_its_rate_and_its_parameters_as_its_files_have_them(root: Path) -> None:
    folder = root / "lora_0" / "adapter"
    found = carry_out(StudyRun("lora", None, 0), root, QUICK)
    for name, number in (("adapter_model", found.parameters), ("control_encoder", found.encoder_parameters)):
        assert number == sum(each.numel() for each in load_file(folder / f"{name}.safetensors").values())
    assert found.learning_rate == 6e-4


def test_all_methods_learn_from_the_same_pairs(root: Path) -> None:
    assert len((root / "pairs" / "metadata.jsonl").read_text().splitlines()) == QUICK.num_pairs
    for method in ("ether_plus", "lora"):
        text = (root / f"{method}_0" / "adapter" / "training_config.yaml").read_text()
        assert str(root / "pairs") in text


def test_true_pictures_score_higher_than_the_base_without_control(root: Path) -> None:
    yardsticks = tiny_yardsticks()
    true = score_runs([true_run(QUICK)], QUICK, yardsticks)
    base = score_runs([draw_base(root, QUICK, 0)], QUICK, yardsticks)
    for column in ("miou", "accuracy", "object_iou"):
        assert true.scores.columns[column].mean > base.scores.columns[column].mean
    assert true.scores.columns["object_iou"].num_groups == len(VALIDATION_CONCEPTS)
    assert true.scores.columns["canny_iou"].mean == 1.0
    unseen = {"fox", "taxi", "doughnut", "guitar", "snowman"}  # which the base, too, never saw
    assert unseen == {concept.name for concept in load_concepts("held_out")} & set(VALIDATION_CONCEPTS)
    assert true.unseen.num_values == len(unseen)
    assert 0 < true.unseen.mean < 1
    assert true.cost["parameters"] is None


def test_two_seeds_are_one_row_and_black_pictures_are_reported_and_not_averaged_in() -> None:
    true = true_run(QUICK)
    pictures = true.pictures.clone()
    pictures[2] = -1
    row = score_runs([replace(true, pictures=pictures), true], QUICK, tiny_yardsticks())
    assert row.set_aside == {"0_2": "is black"}
    assert row.scores.columns["miou"].num_values == 2 * len(VALIDATION_CONCEPTS) - 1
    assert row.cost["num_seeds"] == 2


def test_the_command_writes_numbers_a_plot_and_a_sheet(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--steps", "2", "--batch_size", "2", "--num_pairs", "4", "--scenes_per_concept", "1"]
    where = ["--inference_steps", "2", "--output_dir", str(root), "--results", str(tmp_path / "results")]
    assert study_control.main(["--methods", "ether_plus", "lora", *quick, *where]) == 0
    found = json.loads((tmp_path / "results" / "control.json").read_text())
    assert list(found["rows"]) == ["true", "base", "ether_plus", "lora"]
    assert found["settings"]["steps"] == 2
    assert "needs more than" in found["rows"]["lora"]["left_out"]["fid_tiny"]
    for name in ("control.png", "control_sheet.png"):
        with Image.open(tmp_path / "results" / name) as picture:
            assert picture.format == "PNG"
    table = capsys.readouterr().out
    assert "true pictures" in table
    mean = 100 * found["rows"]["lora"]["scores"]["miou"]["mean"]
    assert f"{mean:.1f} ± " in table


@pytest.mark.parametrize("text", ["oft@nothing", "oft@0", "oft@-1", "oft@nan", "full", "oft@"])
def test_a_method_that_is_none_is_refused_before_anything_is_made(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study_control.main(["--methods", text, "--output_dir", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith("study_control: found the ")
    assert not (tmp_path / "new").exists()


def test_a_rate_is_read_behind_the_method_and_rows_have_names_for_people() -> None:
    assert study_control.read_entry("oft@1e-4") == ("oft", 1e-4)
    assert study_control.read_entry("none") == ("none", None)
    assert StudyRun("oft", 1e-4, 0).row == "oft_0.0001"
    names = {
        "none": "encoder-only",
        "ether_plus": "ETHER+",
        "oft_0.0001": "OFT n=4, 0.0001",
        "nothing": "nothing",
    }
    assert {row: title_of(row) for row in names} == names

"""Evaluation in training: the rules, the best step kept, early ends, and a run that it does not disturb."""

import json
import random
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from encoder_models import save_clip, save_dino, save_other_model
from forked_runs import exit_code, fork_pair
from scripted_evaluation import RISING, train_scripted
from tiny_pipelines import tiny_sd
from training_runs import config, contents, log_of, trained_files

from ether_diffusion.adapters import load_any
from ether_diffusion.adapters.format import TENSORS_NAME
from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import DreamBoothConfig, EvaluationConfig
from ether_diffusion.training.curve import Curve, Record
from ether_diffusion.training.run import train_dreambooth


def measured(tmp_path: Path, name: str = "run", **flags: Json) -> DreamBoothConfig:
    """Return a run of four steps that is measured before, after two and at the end."""
    encoder = tmp_path / "clip"
    if not encoder.exists():
        save_clip(encoder)
    given: dict[str, Json] = {
        "output_dir": str(tmp_path / name),
        "eval_steps": 2,
        "eval_encoder": [str(encoder)],
        "eval_prompt": ["a sks cat", "a sks cat by a wall"],
        "num_eval_images": 1,
        "eval_num_inference_steps": 2,
        "eval_max_drift": 100.0,
        "eval_max_prompt_loss": 1.0,
    }
    return config(tmp_path, **given | flags)


def report_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "evaluation.json").read_bytes())
    return found


# The rules


def curve(
    fidelity: Sequence[Sequence[float]],
    *,
    drift: Sequence[float] | None = None,
    prompt: Sequence[float] | None = None,
    **flags: Json,
) -> Curve:
    """Return a curve of evaluations after 0, 10, 20 … updates."""
    zeros, ones = [0.0] * len(fidelity), [1.0] * len(fidelity)
    rows = enumerate(zip(fidelity, prompt or ones, drift or zeros, strict=True))
    records = [Record(10 * n, {"fidelity": f, "prompt": [p], "drift": [d]}) for n, (f, p, d) in rows]
    return Curve(tuple(records), EvaluationConfig(eval_steps=10, **flags))  # type: ignore[arg-type]


def best_step(found: Curve) -> int | None:
    best = found.best()
    return None if best is None else best.step


def test_the_best_step_has_the_highest_fidelity_within_the_bounds_and_is_the_earliest_of_equal_ones() -> None:
    rising = [[0.1], [0.5], [0.9], [0.7]]
    assert best_step(curve(rising)) == 20
    assert best_step(curve(rising, drift=[0, 0, 0.6, 0], eval_max_drift=0.5)) == 30
    assert best_step(curve(rising, prompt=[0.5, 0.5, 0.4, 0.3], eval_max_prompt_loss=0.1)) == 10
    assert best_step(curve(rising, prompt=[0.5, 0.5, 0.46, 0.3], eval_max_prompt_loss=0.1)) == 20
    assert best_step(curve(rising, drift=[0, 2, 2, 2])) is None
    assert best_step(curve([[0.9], [0.5], [0.5]])) == 10  # the base is never it
    assert best_step(curve([[0.9]])) is None


def test_a_run_is_good_after_so_many_evaluations_without_a_rise() -> None:
    flat = [[0.1, 0.2], [0.5, 0.7], [0.5, 0.7], [0.4, 0.6], [0.5, 0.7]]
    stop = curve(flat, eval_patience=3).stop()
    assert stop is not None
    assert stop.step == 40
    assert "from the base's 0.150 to 0.600 at step 10" in stop.reason
    assert curve(flat, eval_patience=4).stop() is None
    assert curve([*flat[:3], [0.9, 0.9], [0.9, 0.9]], eval_patience=2).stop() is None
    assert curve([[0.5, 0.5]] * 20, eval_patience=1).stop() is None  # never above the base
    assert curve([[0.1], *[[0.9]] * 20], drift=[0] + [9] * 20, eval_patience=1).stop() is None


@pytest.mark.parametrize("seed", range(5))
def test_a_rise_is_a_gain_above_the_standard_error_of_the_gain(seed: int) -> None:
    rng = random.Random(seed)
    first, then = ([rng.gauss(1 + 0.3 * part, 0.5) for _ in range(6)] for part in range(2))
    gains = [b - a for a, b in zip(first, then, strict=True)]
    rises = statistics.mean(gains) > statistics.stdev(gains) / 6**0.5
    stop = curve([[0.0] * 6, first, then, [0.0] * 6], eval_patience=2).stop()
    assert (stop is None) == rises


# A run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a base, photos, an encoder and a measured run."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_dreambooth(measured(folder)) == 0
    return folder


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in log_of(run) if "evaluation" in line]


def test_a_measured_run_learns_what_one_that_is_not_does(whole: Path) -> None:
    assert train_dreambooth(config(whole, output_dir=str(whole / "plain"))) == 0
    for name in (TENSORS_NAME, "checkpoint-4/optimizer.safetensors"):
        assert (whole / "run" / name).read_bytes() == (whole / "plain" / name).read_bytes()
    assert [line for line in log_of(whole / "run") if "loss" in line] == log_of(whole / "plain")


def test_scores_are_logged_and_reported_by_step(whole: Path) -> None:
    points, logged = report_of(whole / "run")["curve"], evaluations_of(whole / "run")
    assert [point["step"] for point in points] == [0, 2, 4]
    for point, line in zip(points, logged, strict=True):
        for name in ("fidelity", "prompt", "drift"):
            values = line["evaluation"][name]
            assert point[name]["mean"] == pytest.approx(statistics.mean(values))
            assert line[f"eval_{name}"] == pytest.approx(statistics.mean(values), abs=1e-6)
    assert logged[0]["eval_drift"] == pytest.approx(0, abs=1e-6)
    assert logged[-1]["eval_drift"] > 0
    assert (whole / "run" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "## Evaluation" in (whole / "run" / "README.md").read_text()


def test_a_base_whose_pictures_are_all_kept_drifts_by_nothing_on_the_first_step(whole: Path) -> None:
    """ETHER+ begins as the base: with a rate of nearly nothing it stays there."""
    still = measured(whole, "still", learning_rate=1e-12, max_train_steps=1)
    assert train_dreambooth(still) == 0
    first, last = evaluations_of(whole / "still")
    assert [first["eval_drift"], last["eval_drift"]] == pytest.approx([0, 0], abs=1e-3)
    assert first["eval_fidelity"] == pytest.approx(last["eval_fidelity"], abs=1e-4)


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_that_goes_on_has_the_same_bytes_log_and_curve(whole: Path, step: int) -> None:
    before, log = trained_files(whole / "run"), log_of(whole / "run")
    assert train_dreambooth(measured(whole, resume_from_checkpoint=f"checkpoint-{step}")) == 0
    assert trained_files(whole / "run") == before
    assert log_of(whole / "run") == log


def test_two_processes_are_measured_by_the_main_one_and_end_together(whole: Path) -> None:
    def train(run: DreamBoothConfig, told: Sequence[float] = RISING) -> int:
        return train_scripted(run, *told)

    pair = fork_pair(good(whole, "two"), train=train)
    assert [exit_code(child) for child in pair] == [0, 0]
    assert [line["step"] for line in log_of(whole / "two") if "loss" in line] == [1, 2, 3, 4]
    again = fork_pair(good(whole, "two"), train=lambda run: train(run, ()))
    assert [exit_code(child) for child in again] == [0, 0]


def good(folder: Path, name: str, **flags: Json) -> DreamBoothConfig:
    """Return a run of eight steps, each measured, that ends two evaluations after the last rise."""
    often: dict[str, Json] = {"max_train_steps": 8, "eval_steps": 1, "checkpointing_steps": 3}
    ends: dict[str, Json] = {"eval_patience": 2, "stop_when_good": True}
    return measured(folder, name, **often | ends | flags)


def test_a_good_run_ends_with_the_best_step_as_its_result_and_stays_so(
    whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = whole / "good"
    assert train_scripted(good(whole, "good"), *RISING) == 0
    report = report_of(run)
    assert report["stopped"]["step"] == 4
    assert "from the base's 0.105 to 0.505 at step 2 and by no more" in report["stopped"]["reason"]
    assert report["best_step"] == 2
    assert log_of(run)[-1]["step"] == 4
    assert (run / TENSORS_NAME).read_bytes() == (run / "best" / TENSORS_NAME).read_bytes()
    assert "Training ended at step 4: fidelity rose" in (run / "README.md").read_text()
    before = contents(run)
    with caplog.at_level("INFO"):
        assert train_scripted(good(whole, "good")) == 0
    assert contents(run) == before
    assert "the run is finished at step 4: fidelity rose" in caplog.text
    assert f"the adapter of step 2 is in {run}" in caplog.text


@pytest.mark.parametrize("method", ["ether_plus", "lora"])
def test_the_best_step_is_what_the_run_was_after_so_many_steps(whole: Path, method: str) -> None:
    run, cut = good(whole, method, adapter=method, rank=2, export_lora=True), whole / f"{method} cut"
    short = config(whole, adapter=method, rank=2, max_train_steps=2, export_lora=True, output_dir=str(cut))
    assert train_scripted(run, *RISING) == train_dreambooth(short) == 0
    found, expected = contents(whole / method), contents(cut)
    for name in (TENSORS_NAME, "adapter_config.json", "pytorch_lora_weights.safetensors"):
        assert found[name] == expected[name]
    assert "steps: 2" in found["README.md"].decode()
    load_any(tiny_sd(), whole / method / "best", adapter_name="best")


def test_a_run_that_is_not_to_stop_goes_on_and_going_back_goes_back_to_an_earlier_best(whole: Path) -> None:
    flags: dict[str, Json] = {"stop_when_good": False, "checkpoints_total_limit": 1}
    assert train_scripted(good(whole, "on", checkpointing_steps=1, **flags), *RISING) == 0
    assert log_of(whole / "on")[-1]["step"] == 8
    result, best = (whole / "on" / place / TENSORS_NAME for place in ("", "best"))
    assert result.read_bytes() != best.read_bytes()
    assert [path.name for path in (whole / "on").glob("checkpoint-*")] == ["checkpoint-8"]

    flags["checkpoints_total_limit"] = 9
    run = good(whole, "back", **flags)
    assert train_scripted(run, 0.1, 0.2, 0.5, 0.4, 0.5, 0.9, 0.3, 0.3, 0.3) == 0
    assert report_of(whole / "back")["best_step"] == 5
    back = good(whole, "back", resume_from_checkpoint="checkpoint-3", **flags)
    # step 3 was measured after its checkpoint was written, and is not again
    assert train_scripted(back, 0.3, 0.3, 0.3, 0.3, 0.3) == 0
    assert report_of(whole / "back")["best_step"] == 2
    assert (whole / "back" / "best" / TENSORS_NAME).read_bytes() == best.read_bytes()


def test_another_way_to_measure_begins_the_curve_anew(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(whole / "run", whole / "changed")
    changed = measured(whole, "changed", eval_num_inference_steps=1, max_train_steps=5)
    assert train_dreambooth(changed) == 0
    assert [point["step"] for point in report_of(whole / "changed")["curve"]] == [0, 4, 5]
    assert "evaluated otherwise before" in caplog.text


def test_likeness_and_prompts_may_have_an_encoder_each(whole: Path) -> None:
    dino = str(save_dino(whole / "dino"))
    both = measured(whole, "both", eval_encoder=[dino, str(whole / "clip")])
    assert train_dreambooth(both) == 0
    one, two = evaluations_of(whole / "run"), evaluations_of(whole / "both")
    assert [line["eval_prompt"] for line in one] == [line["eval_prompt"] for line in two]
    assert all(a["eval_fidelity"] != b["eval_fidelity"] for a, b in zip(one, two, strict=True))


def test_a_rehearsal_says_what_evaluations_cost(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = measured(whole, "rehearsed")
    with caplog.at_level("INFO"):
        assert train_dreambooth(run, dry_run=True) == 0
    assert "an evaluation draws 6 pictures" in caplog.text
    assert "and 3 evaluations (" in caplog.text
    assert not run.output.output_dir.exists()


# What cannot be measured


def test_encoders_that_are_missing_or_none_are_one_sentence_each(tmp_path: Path) -> None:
    def refused(run: DreamBoothConfig, words: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            train_dreambooth(run)
        assert not run.output.output_dir.exists()

    wrong, dino = save_other_model(tmp_path / "bert"), save_dino(tmp_path / "dino")
    refused(measured(tmp_path, eval_encoder=[]), "eval_steps needs eval_encoder with this base: clip, or")
    refused(measured(tmp_path, eval_encoder=[str(tmp_path / "none")]), "found no encoder .*none: ")
    refused(measured(tmp_path, eval_encoder=[str(wrong)]), r"is no encoder \(model_type bert")
    refused(measured(tmp_path, eval_encoder=[str(dino)]), "reads no texts, which likeness to prompts needs")
    broken = tmp_path / "clip" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    refused(measured(tmp_path), "is not whole; fetch it again")

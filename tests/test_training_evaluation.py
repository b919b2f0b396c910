"""Evaluation in training: the rules, the best step kept, early ends, and a run that it does not disturb."""

import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from encoder_models import save_clip, save_dino, save_other_model
from forked_runs import exit_code, fork, fork_pair, training_until_change
from safetensors.torch import load_file
from scripted_evaluation import RISING, train_scripted
from tiny_pipelines import tiny_sd
from training_runs import config, contents, log_of, trained_files

from ether_diffusion import load_ether
from ether_diffusion.adapters.format import TENSORS_NAME
from ether_diffusion.scripts.train_control import main as train_control
from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import DreamBoothConfig, EvaluationConfig
from ether_diffusion.training.curve import Curve, Measured, Record
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


def report_of(run: Path) -> dict[str, Json]:
    found: dict[str, Json] = json.loads((run / "evaluation.json").read_bytes())
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
    settings = EvaluationConfig(eval_steps=10, **flags)  # type: ignore[arg-type]
    records = [
        Record(
            10 * number,
            Measured(
                tuple(values),
                ((prompt[number] if prompt else 1.0),),
                ((drift[number] if drift else 0.0),),
            ),
        )
        for number, values in enumerate(fidelity)
    ]
    return Curve(tuple(records), settings)


def best_step(found: Curve) -> int | None:
    best = found.best()
    return None if best is None else best.step


def test_the_best_step_has_the_highest_fidelity_within_the_bounds() -> None:
    rising = [[0.1], [0.5], [0.9], [0.7]]
    assert best_step(curve(rising)) == 20
    assert best_step(curve(rising, drift=[0, 0, 0.6, 0], eval_max_drift=0.5)) == 30
    assert best_step(curve(rising, prompt=[0.5, 0.5, 0.4, 0.3], eval_max_prompt_loss=0.1)) == 10
    assert best_step(curve(rising, prompt=[0.5, 0.5, 0.46, 0.3], eval_max_prompt_loss=0.1)) == 20
    assert best_step(curve(rising, drift=[0, 2, 2, 2])) is None


def test_the_base_is_never_the_best_step_and_of_equal_ones_the_earliest_is() -> None:
    assert best_step(curve([[0.9], [0.5], [0.5]])) == 10
    assert best_step(curve([[0.9]])) is None


def test_a_run_is_good_after_so_many_evaluations_without_a_rise() -> None:
    flat = [[0.1, 0.2], [0.5, 0.7], [0.5, 0.7], [0.4, 0.6], [0.5, 0.7]]
    stop = curve(flat, eval_patience=3).stop()
    assert stop is not None
    assert stop.step == 40
    assert "from the base's 0.150 to 0.600 at step 10" in stop.reason
    assert curve(flat, eval_patience=4).stop() is None
    assert curve([*flat[:3], [0.9, 0.9], [0.9, 0.9]], eval_patience=2).stop() is None


def test_a_run_that_never_rose_above_the_base_is_not_good() -> None:
    assert curve([[0.5, 0.5]] * 20, eval_patience=1).stop() is None
    out = curve([[0.1], *[[0.9]] * 20], drift=[0] + [9] * 20, eval_patience=1)
    assert out.stop() is None


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


def test_a_measured_run_learns_what_one_that_is_not_does(whole: Path) -> None:
    assert train_dreambooth(config(whole, output_dir=str(whole / "plain"))) == 0
    for name in (TENSORS_NAME, "checkpoint-4/optimizer.safetensors"):
        assert (whole / "run" / name).read_bytes() == (whole / "plain" / name).read_bytes()
    lines = [line for line in log_of(whole / "run") if "loss" in line]
    assert lines == log_of(whole / "plain")


def test_scores_are_logged_and_reported_by_step(whole: Path) -> None:
    report = report_of(whole / "run")
    points = report["curve"]
    assert isinstance(points, list)
    assert [point["step"] for point in points] == [0, 2, 4]  # type: ignore[index,call-overload]
    logged = [line for line in log_of(whole / "run") if "evaluation" in line]
    for point, line in zip(points, logged, strict=True):
        for name in ("fidelity", "prompt", "drift"):
            values = line["evaluation"][name]
            assert point[name]["mean"] == pytest.approx(statistics.mean(values))  # type: ignore[index,call-overload]
            assert line[f"eval_{name}"] == pytest.approx(statistics.mean(values), abs=1e-6)
    assert logged[0]["eval_drift"] == pytest.approx(0, abs=1e-6)
    assert logged[-1]["eval_drift"] > 0
    assert (whole / "run" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "## Evaluation" in (whole / "run" / "README.md").read_text()


def test_best_holds_the_adapter_of_the_best_step_and_loads(whole: Path, tmp_path: Path) -> None:
    best = report_of(whole / "run")["best_step"]
    again = measured(whole, "cut", max_train_steps=best, lr_scheduler="constant")
    assert train_dreambooth(again) == 0
    expected = (whole / "cut" / TENSORS_NAME).read_bytes()
    assert (whole / "run" / "best" / TENSORS_NAME).read_bytes() == expected
    pipeline = tiny_sd()
    load_ether(pipeline, whole / "run" / "best", adapter_name="best")


def test_a_base_whose_pictures_are_all_kept_drifts_by_nothing_on_the_first_step(whole: Path) -> None:
    """ETHER+ begins as the base: with a rate of nearly nothing it stays there."""
    assert train_dreambooth(measured(whole, "still", learning_rate=1e-12)) == 0
    lines = [line for line in log_of(whole / "still") if "evaluation" in line]
    assert [line["eval_drift"] for line in lines] == pytest.approx([0, 0, 0], abs=1e-3)
    assert lines[0]["eval_fidelity"] == pytest.approx(lines[-1]["eval_fidelity"], abs=1e-4)


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_that_goes_on_has_the_same_bytes_log_and_curve(whole: Path, step: int) -> None:
    before, log = trained_files(whole / "run"), log_of(whole / "run")
    run = measured(whole, resume_from_checkpoint=f"checkpoint-{step}")
    assert train_dreambooth(run) == 0
    assert trained_files(whole / "run") == before
    assert log_of(whole / "run") == log


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_run_killed_before_each_change_of_the_disk_ends_as_if_it_had_not_been(whole: Path) -> None:
    flags: dict[str, Json] = {"max_train_steps": 2, "eval_steps": 1}
    flags |= {"checkpointing_steps": 1, "checkpoints_total_limit": 1}
    assert train_dreambooth(measured(whole, "alive", **flags)) == 0
    run = measured(whole, "killed", **flags)
    number, code = 0, -9
    while code == -9:
        number += 1
        code = exit_code(fork(training_until_change(run, number)))
    assert code == 0
    assert number > 30  # a save alone has about twenty changes
    assert trained_files(whole / "killed") == trained_files(whole / "alive")
    assert log_of(whole / "killed") == log_of(whole / "alive")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_processes_are_measured_by_the_main_one_and_end_together(whole: Path) -> None:
    pair = fork_pair(good(whole, "two"), train=lambda run: train_scripted(run, *RISING))
    assert [exit_code(child) for child in pair] == [0, 0]
    assert [line["step"] for line in log_of(whole / "two") if "loss" in line] == [1, 2, 3, 4]
    again = fork_pair(good(whole, "two"), train=lambda run: train_scripted(run))
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
    reason = (
        "fidelity rose from the base's 0.105 to 0.505 at step 2 and by no more than its standard error in "
    )
    assert report["stopped"] == {"step": 4, "reason": f"{reason}the 2 evaluations since"}
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


@pytest.mark.parametrize("method", ["lora", "hra"])
def test_the_best_step_of_any_method_is_what_it_was_after_so_many_steps(whole: Path, method: str) -> None:
    run, cut = good(whole, method, adapter=method, rank=2, export_lora=True), whole / f"{method} cut"
    short = config(whole, adapter=method, rank=2, max_train_steps=2, export_lora=True, output_dir=str(cut))
    assert train_scripted(run, *RISING) == train_dreambooth(short) == 0
    found, expected = contents(whole / method), contents(cut)
    for name in (TENSORS_NAME, "adapter_config.json", "pytorch_lora_weights.safetensors"):
        assert found.get(name) == expected.get(name)
    assert "steps: 2" in found["README.md"].decode()


def test_a_run_that_is_not_to_stop_goes_on_and_its_result_is_the_last_step(whole: Path) -> None:
    run = good(whole, "on", stop_when_good=False)
    assert train_scripted(run, *RISING) == 0
    assert log_of(whole / "on")[-1]["step"] == 8
    result, best = (load_file(whole / "on" / place / TENSORS_NAME) for place in ("", "best"))
    assert any(not torch.equal(result[name], best[name]) for name in result)


def test_going_back_to_a_checkpoint_goes_back_to_its_best_step(whole: Path) -> None:
    run = good(whole, "back", stop_when_good=False, checkpoints_total_limit=9)
    assert train_scripted(run, 0.1, 0.2, 0.5, 0.4, 0.5, 0.9, 0.3, 0.3, 0.3) == 0
    assert report_of(whole / "back")["best_step"] == 5
    flags: dict[str, Json] = {"stop_when_good": False, "checkpoints_total_limit": 9}
    back = good(whole, "back", resume_from_checkpoint="checkpoint-3", **flags)
    # step 3 was measured after its checkpoint was written, and is not again
    assert train_scripted(back, 0.3, 0.3, 0.3, 0.3, 0.3) == 0
    assert report_of(whole / "back")["best_step"] == 2
    on = (whole / "on" / "best" / TENSORS_NAME).read_bytes()
    assert (whole / "back" / "best" / TENSORS_NAME).read_bytes() == on


def test_another_way_to_measure_begins_the_curve_anew(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert train_dreambooth(measured(whole, "changed")) == 0
    changed = measured(whole, "changed", eval_num_inference_steps=3, max_train_steps=6)
    assert train_dreambooth(changed) == 0
    points = report_of(whole / "changed")["curve"]
    assert isinstance(points, list)
    assert [point["step"] for point in points] == [0, 4, 6]  # type: ignore[index,call-overload]
    assert "evaluated otherwise before" in caplog.text


def test_pruning_checkpoints_leaves_the_best_step(whole: Path) -> None:
    run = good(whole, "pruned", checkpointing_steps=1, checkpoints_total_limit=1, stop_when_good=False)
    assert train_scripted(run, *RISING) == 0
    assert [path.name for path in (whole / "pruned").glob("checkpoint-*")] == ["checkpoint-8"]
    assert (whole / "pruned" / "best" / TENSORS_NAME).is_file()


# What cannot be measured


def refused(run: DreamBoothConfig, words: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        train_dreambooth(run)
    assert not run.output.output_dir.exists()


def test_encoders_that_are_missing_or_none_are_one_sentence_each(tmp_path: Path) -> None:
    wrong, dino = save_other_model(tmp_path / "bert"), save_dino(tmp_path / "dino")
    refused(measured(tmp_path, eval_encoder=[]), "eval_steps needs eval_encoder with this base: clip, or")
    refused(measured(tmp_path, eval_encoder=[str(tmp_path / "none")]), "there is no encoder in .*none; give")
    refused(
        measured(tmp_path, eval_encoder=[str(wrong)]), r"is no encoder that can be used \(model_type bert"
    )
    refused(measured(tmp_path, eval_encoder=[str(dino)]), "reads no texts, which likeness to prompts needs")
    broken = tmp_path / "clip" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    refused(measured(tmp_path), "is incomplete or damaged; fetch it again")


def test_likeness_and_prompts_may_have_an_encoder_each(tmp_path: Path) -> None:
    dino = str(save_dino(tmp_path / "dino"))
    run = measured(tmp_path)
    both = measured(tmp_path, "both", eval_encoder=[dino, *run.evaluation.eval_encoder])
    assert train_dreambooth(run) == train_dreambooth(both) == 0
    one, two = (
        [line for line in log_of(tmp_path / name) if "evaluation" in line] for name in ("run", "both")
    )
    assert [line["eval_prompt"] for line in one] == [line["eval_prompt"] for line in two]
    assert all(a["eval_fidelity"] != b["eval_fidelity"] for a, b in zip(one, two, strict=True))


def test_what_lacks_something_is_said_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="stop_when_good needs to know what is good; give eval_steps"):
        config(tmp_path, stop_when_good=True)
    with pytest.raises(ValueError, match="eval_steps needs prompts with the subject; give eval_prompt"):
        config(tmp_path, eval_steps=2)
    control = ["--instance_data_dir", "a", "--conditioning_data_dir", "b", "--eval_steps", "2"]
    assert train_control([*control, "--instance_prompt", "a cat"]) == 2
    assert "eval_steps measures likeness to a subject's photos" in capsys.readouterr().err


def test_a_rehearsal_says_what_evaluations_cost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = measured(tmp_path)
    with caplog.at_level("INFO"):
        assert train_dreambooth(run, dry_run=True) == 0
    assert "an evaluation draws 6 pictures" in caplog.text
    assert "and 3 evaluations (" in caplog.text
    assert not run.output.output_dir.exists()

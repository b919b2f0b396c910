"""The study of learning rates: ranges as numbers, distances of every method, runs that are not done twice."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_unet
from peft import DeloraConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig, inject_adapter_in_model
from PIL import Image
from tiny_pipelines import tiny_sd
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import AdapterMetadata
from ether_diffusion.metrics.likeness import Estimate, estimate
from ether_diffusion.training.methods import adapter_files, adapter_tensors, attach_saved
from research import study_learning_rate
from research.distances import effective_weight, weight_distance
from research.study import Scores, summarise
from research.study_learning_rate import fidelity_range, least_prompt, plan, usable_range
from research.subject_scores import learn_and_score

TARGETS = ["to_q", "to_v"]
CONFIGS: dict[str, PeftConfig] = {
    "ether": EtherConfig(target_modules=TARGETS, init_weights=False),
    "ether_plus": EtherConfig(variant="ether_plus", target_modules=TARGETS, init_weights=False),
    "lora": LoraConfig(target_modules=TARGETS, init_lora_weights=False),
    "oft": OFTConfig(r=4, oft_block_size=0, target_modules=TARGETS, init_weights=False),
    "hra": HRAConfig(r=4, target_modules=TARGETS, init_weights=False),
    "delora": DeloraConfig(r=4, target_modules=TARGETS, init_weights=False),
}


def attached(method: str) -> nn.Module:
    unet: nn.Module = tiny_unet()
    inject_adapter_in_model(CONFIGS[method], unet, "default")
    return unet.eval()


@pytest.mark.parametrize("method", CONFIGS)
def test_the_effective_weight_of_any_method_is_the_merged_one(method: str) -> None:
    unet = attached(method)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer: Any = unet.get_submodule(path)
    with torch.no_grad():
        found = effective_weight(layer)
        layer.merge()
    torch.testing.assert_close(found, layer.get_base_layer().weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", CONFIGS)
def test_the_distance_is_the_mean_relative_change_of_the_weights(method: str) -> None:
    unet, before = attached(method), dict(tiny_unet().named_parameters())
    distance = weight_distance(unet)
    changes = []
    for name, layer in unet.named_modules():
        if hasattr(layer, "merge") and hasattr(layer, "get_base_layer"):
            layer.merge()
            weight = before[f"{name}.weight"]
            change = layer.get_base_layer().weight.detach() - weight.detach()
            changes.append(float(change.norm() / weight.detach().norm()))
    assert len(changes) == 16
    assert distance == pytest.approx(sum(changes) / len(changes), rel=1e-3)
    assert distance > 1e-3


def test_a_model_without_an_adapter_has_no_distance() -> None:
    with pytest.raises(ValueError, match="no adapted Linear"):
        weight_distance(tiny_unet())


@pytest.mark.parametrize("method", CONFIGS)
def test_a_saved_adapter_of_any_method_is_attached_as_it_was(method: str, tmp_path: Path) -> None:
    trained = tiny_sd()
    config = replace(CONFIGS[method]) if method.startswith("ether") else CONFIGS[method]
    inject_adapter_in_model(config, trained.unet, "default")
    for name, data in adapter_files(trained.unet, AdapterMetadata()).items():
        (tmp_path / name).write_bytes(data)
    loaded = tiny_sd()
    attach_saved(loaded, tmp_path)
    assert adapter_tensors(trained.unet)
    assert weight_distance(loaded.unet.eval()) == pytest.approx(
        weight_distance(trained.unet.eval()), rel=1e-5
    )


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        attach_saved(tiny_sd(), tmp_path)


def test_the_usable_range_reaches_as_far_as_the_score_stays_near_its_best() -> None:
    scores = {1e-4: 0.10, 1e-3: 0.96, 3e-3: 1.00, 1e-2: 0.94, 1e-1: 0.951, 1: 0.90}
    found = usable_range(scores)
    assert found is not None
    assert (found.lowest, found.highest, found.best) == (1e-3, 1e-1, 3e-3)
    assert found.ratio == pytest.approx(100)
    assert found.missed == (1e-2,)
    assert not found.is_open


def test_the_usable_range_does_not_depend_on_the_order_of_the_rates() -> None:
    scores = {1e-3: 0.96, 1e-4: 0.1, 1e-2: 1.0}
    assert usable_range(scores) == usable_range(dict(reversed(scores.items())))


def test_a_range_of_one_rate_is_a_ratio_of_one_and_of_none_is_none() -> None:
    found = usable_range({1e-3: 0.5, 1e-2: -math.inf})
    assert found is not None
    assert found.ratio == 1
    assert usable_range({1e-3: -math.inf}) is None
    assert usable_range({}) is None


def test_the_usable_range_of_negative_scores_is_below_the_best() -> None:
    found = usable_range({1e-3: -0.100, 1e-2: -0.104, 1e-1: -0.2})
    assert found is not None
    assert (found.lowest, found.highest, found.is_open) == (1e-3, 1e-2, True)


def test_a_rate_that_ignores_the_prompt_is_not_usable_however_like_the_photos() -> None:
    def scores(likeness: float, prompt: float) -> dict[str, Estimate]:
        return {"object": estimate([likeness], "a"), "tiny_t": estimate([prompt], "a")}

    rates = {1e-4: scores(0.20, 0.70), 1e-3: scores(0.21, 0.64), 1e-2: scores(0.90, 0.62), 1e-1: {}}
    least = least_prompt([{"tiny_t": 0.8}, {"tiny_t": 0.6}])
    assert least == pytest.approx(0.63)
    kept, alone = fidelity_range(rates, least_prompt=least), fidelity_range(rates)
    assert kept is not None
    assert alone is not None
    assert (kept.lowest, kept.highest, kept.best) == (1e-4, 1e-3, 1e-3)
    assert (alone.lowest, alone.highest) == (1e-2, 1e-2)


def test_estimates_have_errors_over_subjects_and_none_where_a_run_came_to_nothing() -> None:
    def scores(asked: Mapping[str, Any]) -> Scores:
        if (asked["learning_rate"], asked["subject"], asked["seed"]) == (2.0, "owl", 1):
            return {}
        bonus = {"fox": 0.0, "owl": 1.0}[asked["subject"]]
        return {"object": asked["learning_rate"] + bonus + asked["seed"] / 10, "tiny_t": 0.7}

    trainings = plan(["lora"], [1.0, 2.0], ["fox", "owl"], [0, 1], 1)
    rates = summarise([(training, scores(training.asked)) for training in trainings])["lora"]
    assert rates[1.0]["object"].mean == pytest.approx(1.55)
    assert rates[1.0]["object"].standard_error == pytest.approx(0.5)
    assert rates[2.0] == {}
    found = fidelity_range(rates)
    assert found is not None
    assert (found.lowest, found.highest) == (1.0, 1.0)


def test_a_plan_has_every_run_once() -> None:
    runs = plan(["ether", "lora"], [1e-2, 1e-3, 1e-3], ["fox"], [0, 1], 1)
    assert len(runs) == len({run.folder for run in runs}) == 8
    assert [run.asked["learning_rate"] for run in runs[:4]] == [1e-3, 1e-3, 1e-2, 1e-2]


def study(folder: Path, *arguments: str) -> int:
    quick = ["--steps", "1", "--inference_steps", "1", "--output_dir", str(folder)]
    return study_learning_rate.main([*quick, *arguments])


def test_a_study_is_run_written_and_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--methods", "ether_plus", "lora", "--learning_rates", "1e-3", "1e-2", "--subjects", "fox"]
    assert study(tmp_path, *chosen) == 0
    found = json.loads((tmp_path / "study.json").read_text())
    assert set(found["methods"]) == set(found["usable_range"]) == {"ether_plus", "lora"}
    assert set(found["methods"]["lora"]) == {"0.001", "0.01"}
    scores = found["methods"]["lora"]["0.01"]
    assert set(scores) == {"object", "tiny_i", "tiny_t", "recognised", "drift", "weight_distance"}
    assert set(found["methods"]["ether_plus"]["0.01"]) - set(scores) == {"transform_distance"}
    assert set(found["base"]) == {"object", "tiny_i", "tiny_t", "recognised"}
    assert scores["drift"]["mean"] > 0
    assert found["least_prompt"] == pytest.approx(0.9 * found["base"]["tiny_t"])
    assert (
        scores["weight_distance"]["mean"] > found["methods"]["lora"]["0.001"]["weight_distance"]["mean"] > 0
    )
    with Image.open(tmp_path / "study.png") as plot:
        assert plot.format == "PNG"

    adapters = list(tmp_path.rglob("adapter_model.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in adapters}
    assert study(tmp_path, *chosen) == 0
    assert {path: path.stat().st_mtime_ns for path in adapters} == before
    assert json.loads((tmp_path / "study.json").read_text()) == found

    assert study(tmp_path, *chosen, "--inference_steps", "2") == 2
    assert "holds a run of other settings" in capsys.readouterr().err


def test_an_unknown_subject_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study(tmp_path / "out", "--subjects", "nothing") == 2
    assert "no concept is named 'nothing'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_is_a_result_without_scores(tmp_path: Path) -> None:
    (run,) = plan(["lora"], [1e30], ["fox"], [0], 3)
    assert not learn_and_score(run, tmp_path, 1)
    assert not learn_and_score(run, tmp_path, 1)

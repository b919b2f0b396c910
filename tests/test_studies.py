"""The studies: runs that are not done twice, ranges, fewest steps, distances and energies of methods."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Capture, Patch, tiny_unet
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from oracles import dense_weight
from oracles import hyperspherical_energy as by_definition
from peft import DeloraConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig, inject_adapter_in_model
from PIL import Image
from tiny_pipelines import tiny_sd
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import AdapterMetadata, read_adapter
from ether_diffusion.bases.stable_diffusion import StableDiffusion
from ether_diffusion.durable_files import write_files
from ether_diffusion.metrics.scores import Estimate, estimate
from ether_diffusion.reflections import Vectors
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.training.config import AdapterConfig
from ether_diffusion.training.methods import (
    adapter_files,
    adapter_tensors,
    attach_new,
    attach_saved,
    peft_config,
)
from ether_diffusion.tuner import EtherLayer, chosen_adapters
from research import (
    study_blocks,
    study_cost,
    study_learning_rate,
    study_photos,
    study_strength,
    study_timesteps,
)
from research import study_energy as energy
from research.distances import effective_weight, transform_distance, weight_distance
from research.study import Scores, summarise
from research.study_energy import energy_changes, hyperspherical_energy
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


@pytest.mark.parametrize("method", CONFIGS)
def test_effective_weight_and_distance_are_those_of_the_merged_weights(method: str) -> None:
    unet: nn.Module = tiny_unet()
    inject_adapter_in_model(CONFIGS[method], unet, "default")
    unet.eval()
    before, changes, distance = dict(tiny_unet().named_parameters()), [], weight_distance(unet)
    for name, module in unet.named_modules():
        layer: Any = module
        if hasattr(layer, "merge") and hasattr(layer, "get_base_layer"):
            with torch.no_grad():
                found = effective_weight(layer)
            layer.merge()
            merged, weight = layer.get_base_layer().weight.detach(), before[f"{name}.weight"].detach()
            torch.testing.assert_close(found, merged, atol=1e-5, rtol=1e-4)
            changes.append(float((merged - weight).norm() / weight.norm()))
    assert len(changes) == 16
    assert distance == pytest.approx(sum(changes) / len(changes), rel=1e-3)
    assert distance > 1e-3


@pytest.mark.parametrize("method", CONFIGS)
def test_a_saved_adapter_of_any_method_is_attached_as_it_was(method: str, tmp_path: Path) -> None:
    trained, loaded = tiny_sd(), tiny_sd()
    config = replace(CONFIGS[method]) if method.startswith("ether") else CONFIGS[method]
    inject_adapter_in_model(config, trained.unet, "default")
    for name, data in adapter_files(trained.unet, AdapterMetadata()).items():
        (tmp_path / name).write_bytes(data)
    attach_saved(loaded, tmp_path)
    assert adapter_tensors(trained.unet)
    expected = weight_distance(trained.unet.eval())
    assert weight_distance(loaded.unet.eval()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["ether", "ether_plus", "oft", "hra"])
def test_the_distance_of_a_transform_is_that_of_the_matrix_between_the_weights(method: str) -> None:
    sided = {"sides": "input"} if method == "ether_plus" else {}
    model: Any = nn.ModuleDict({"to_q": nn.Linear(32, 32)}).eval()
    inject_adapter_in_model(replace(CONFIGS[method], target_modules=["to_q"], **sided), model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        weight, changed = model.to_q.get_base_layer().weight.double(), effective_weight(model.to_q).double()
        transform = torch.linalg.solve(weight, changed)  # W' = W T
    assert transform_distance(model) == pytest.approx(float((transform - torch.eye(32)).norm()), rel=1e-3)


def test_two_sides_count_in_quadrature_and_what_adds_to_the_weight_has_no_transform() -> None:
    for config, expected in (
        (EtherConfig(sides="both", target_modules=["to_q"]), math.sqrt(2) * 2 * math.sqrt(4)),
        (LoraConfig(target_modules=["to_q"]), None),
        (None, None),
    ):
        model = nn.ModuleDict({"to_q": nn.Linear(32, 32)})
        if config is not None:
            inject_adapter_in_model(config, model)
        assert transform_distance(model) == (expected and pytest.approx(expected, rel=1e-6))


def test_a_model_or_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapted Linear"):
        weight_distance(tiny_unet())
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        attach_saved(tiny_sd(), tmp_path)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (
            {1e-4: 0.10, 1e-3: 0.96, 3e-3: 1.00, 1e-2: 0.94, 1e-1: 0.951, 1: 0.90},
            (1e-3, 1e-1, 3e-3, (1e-2,), False),
        ),
        ({1e-3: 0.5, 1e-2: -math.inf}, (1e-3, 1e-3, 1e-3, (), True)),
        ({1e-3: -0.100, 1e-2: -0.104, 1e-1: -0.2}, (1e-3, 1e-2, 1e-3, (), True)),
        ({1e-3: -math.inf}, None),
        ({}, None),
    ],
)
def test_the_usable_range_reaches_as_far_as_the_score_stays_near_its_best(
    scores: dict[float, float], expected: tuple[Any, ...] | None
) -> None:
    found = usable_range(scores)
    assert found == usable_range(dict(reversed(scores.items())))
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert (found.lowest, found.highest, found.best, found.missed, found.is_open) == expected
        assert found.ratio == pytest.approx(found.highest / found.lowest)


def scores_of(likeness: float, prompt: float) -> dict[str, Estimate]:
    return {"object": estimate([likeness], "a"), "tiny_t": estimate([prompt], "a")}


def test_a_rate_that_ignores_the_prompt_is_not_usable_however_like_the_photos() -> None:
    rates = {1e-4: scores_of(0.20, 0.70), 1e-3: scores_of(0.21, 0.64), 1e-2: scores_of(0.90, 0.62), 1e-1: {}}
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

    trainings = plan(["lora", "lora"], [2.0, 1.0, 1.0], ["fox", "owl"], [0, 1], 1)
    assert len(trainings) == len({run.folder for run in trainings}) == 8
    rates = summarise([(training, scores(training.asked)) for training in trainings])["lora"]
    assert rates[1.0]["object"].mean == pytest.approx(1.55)
    assert rates[1.0]["object"].standard_error == pytest.approx(0.5)
    assert rates[2.0] == {}
    found = fidelity_range(rates)
    assert found is not None
    assert (found.lowest, found.highest) == (1.0, 1.0)


def test_the_fewest_steps_near_the_best_are_enough() -> None:
    for row, expected in (
        ({50: (0.191, 0.7), 100: (0.197, 0.7), 200: (0.20, 0.7)}, 100),
        ({50: (0.10, 0.7), 100: (0.15, 0.7), 200: (0.40, 0.1)}, 100),
        ({50: (0.10, 0.5)}, None),
    ):
        made = {steps: scores_of(*values) for steps, values in row.items()}
        assert study_photos.enough_steps(made, 0.6) == expected


QUICK = ["--inference_steps", "1", "--steps", "1"]


def is_png(file: Path) -> bool:
    with Image.open(file) as picture:
        return picture.format == "PNG"


def test_a_study_is_run_written_and_not_repeated(tmp_path: Path, capsys: Capture) -> None:
    rank_1 = "lora:rank=1"
    chosen = ["--methods", "ether_plus", rank_1, "--learning_rates", "1e-2", "--subjects", "fox"]
    chosen += [*QUICK, "--output_dir", str(tmp_path)]
    assert study_learning_rate.main(chosen) == 0
    found = json.loads((tmp_path / "study.json").read_text())
    assert set(found["methods"]) == set(found["usable_range"]) == {"ether_plus", rank_1}
    scores = found["methods"][rank_1]["0.01"]
    of_pictures = {"object", "tiny_i", "tiny_t", "recognised"}
    assert set(scores) == of_pictures | {"drift", "weight_distance"}
    assert set(found["methods"]["ether_plus"]["0.01"]) - set(scores) == {"transform_distance"}
    assert set(found["base"]) == of_pictures
    assert scores["drift"]["mean"] > 0
    assert scores["weight_distance"]["mean"] > 0
    assert found["least_prompt"] == pytest.approx(0.9 * found["base"]["tiny_t"])
    assert is_png(tmp_path / "study.png")
    config = json.loads(next(tmp_path.glob("lora*/*/*/adapter/adapter_config.json")).read_text())
    assert config["r"] == 1

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert study_learning_rate.main(chosen) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    assert json.loads((tmp_path / "study.json").read_text()) == found
    assert study_learning_rate.main([*chosen, "--inference_steps", "2"]) == 2
    assert "holds a run of other settings" in capsys.readouterr().err


def test_a_study_of_blocks_trains_every_variant_with_its_blocks_and_sides(tmp_path: Path) -> None:
    words = ["--subjects", "fox", "--blocks", "8", *QUICK, "--output_dir", str(tmp_path)]
    assert study_blocks.main(words) == 0
    for training in study_blocks.plan([8], ["fox"], [0], 1):
        config = read_adapter(tmp_path / training.folder / "adapter").config
        asked = study_blocks.VARIANTS[str(training.asked["variant"])]
        assert (config.variant, config.sides) == (asked["adapter"], asked["sides"])
        assert config.num_blocks == 8
    found = json.loads((tmp_path / "blocks.json").read_text())["variants"]
    assert {name: set(row) for name, row in found.items()} == {name: {"8"} for name in study_blocks.VARIANTS}
    assert found["ETHER"]["8"]["object"]["num_values"] == 1
    assert is_png(tmp_path / "blocks.png")


def test_a_study_of_strengths_tells_what_is_learned_from_what_is_lost(tmp_path: Path) -> None:
    words = ["--subjects", "fox", "--steps", "20", "1", "--output_dir", str(tmp_path)]
    rows = ["ether", "ether_plus"]
    assert study_strength.main([*words, "--methods", *rows]) == 0
    found = json.loads((tmp_path / "strength.json").read_text())
    assert (found["base"], list(found["methods"])) == ("tiny_world_2", rows)
    for row in found["methods"].values():
        assert row["20"]["scene_loss"]["mean"] < row["1"]["scene_loss"]["mean"]
    drifts = [found["methods"][row]["1"]["prediction_drift"]["mean"] for row in rows]
    assert drifts[1] < drifts[0] / 10  # a step from the base, and one from a reflection of it
    for row in rows:  # the longer training went on where the shorter one ended
        folder = tmp_path / study_strength.plan([row], [1], ["fox"], [0])[0].folder.parent / "adapter"
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log if "loss" in line] == list(range(1, 21))
        assert read_adapter(folder).config.variant == row
    assert is_png(tmp_path / "strength.png")


def test_an_adapter_works_on_each_row_as_its_timestep_says() -> None:
    """Against the same adapter at that strength, row by row."""
    unet = StableDiffusionPipeline.from_pretrained(tiny_world_path()).unet
    torch.manual_seed(0)
    unet.add_adapter(EtherConfig())
    latents, states, timesteps = (
        torch.randn(3, 4, 16, 16),
        torch.randn(3, 24, 192),
        torch.tensor([0, 400, 999]),
    )
    expected = []
    for row, timestep in enumerate(timesteps.tolist()):
        with chosen_adapters(unet, {"default": 1 - timestep / 2000}), torch.no_grad():
            expected.append(unet(latents[row : row + 1], timesteps[row], states[row : row + 1]).sample)
    study_timesteps.work_by_timestep(unet, study_timesteps.SCHEDULES["1 - t/2"])
    with torch.no_grad():
        found = unet(latents, timesteps, states).sample
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_study_of_timesteps_learns_with_every_schedule(tmp_path: Path) -> None:
    assert study_timesteps.main(["--subjects", "fox", "--steps", "3", "--output_dir", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "timesteps.json").read_text())
    losses = {name: row["3"]["scene_loss"]["mean"] for name, row in found["schedules"].items()}
    assert losses.keys() == study_timesteps.SCHEDULES.keys()
    assert len(set(losses.values())) == len(losses)


def test_rows_of_a_benchmark_take_the_place_of_variants(tmp_path: Path, capsys: Capture) -> None:
    sides = "ether:sides=both,learning_rate=0.02"
    words = ["--subjects", "fox", "--steps", "1", "--output_dir", str(tmp_path)]
    assert study_strength.main([*words, "--methods", "ether:num_block=2"]) == 2
    assert "'num_block' is not an option" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert study_strength.main([*words, "--methods", sides]) == 0
    (adapter,) = tmp_path.rglob("adapter")
    assert read_adapter(adapter).config.sides == "both"
    found = json.loads((tmp_path / "strength.json").read_text())
    assert found["settings"][sides]["learning_rate"] == 0.02


def test_a_study_of_photos_shows_a_run_as_many_as_it_says(tmp_path: Path) -> None:
    words = ["--subjects", "panda", "--num_photos", "1", "3", *QUICK, "--output_dir", str(tmp_path)]
    assert study_photos.main(words) == 0
    found = json.loads((tmp_path / "photos.json").read_text())
    for number in (1, 3):
        one = study_photos.training(found["method"], number, 1, "panda", 0)
        photos = tmp_path / one.folder / "photos"
        assert len(list(photos.glob("*.png"))) == number
        assert len((photos / "metadata.jsonl").read_text().splitlines()) == number
    assert {number: set(cells) for number, cells in found["photos"].items()} == {"1": {"1"}, "3": {"1"}}
    assert found["enough_steps"] == {"1": 1, "3": 1}
    assert is_png(tmp_path / "photos.png")


Main = Callable[[list[str]], int]


@pytest.mark.parametrize(
    ("main", "arguments", "sentence"),
    [
        (study_learning_rate.main, ["--subjects", "nothing"], "no concept is named 'nothing'"),
        (study_learning_rate.main, ["--methods", "lora:rang=1"], "'rang' is not an option"),
        (study_blocks.main, ["--subjects", "wombat"], "no concept is named 'wombat'"),
        (study_photos.main, ["--method", "nothing"], "nothing is no method"),
        (study_photos.main, ["--num_photos", "7"], "1 to 6 photos; asked for 7"),
    ],
)
def test_what_cannot_be_studied_is_one_sentence(
    main: Main, arguments: list[str], sentence: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main([*arguments, "--output_dir", str(tmp_path / "new")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_training_that_diverges_is_a_result_without_scores(tmp_path: Path) -> None:
    (run,) = plan(["lora"], [1e30], ["fox"], [0], 3)
    assert not learn_and_score(run, tmp_path, 1)
    assert not learn_and_score(run, tmp_path, 1)


PAPER = {"ETHER": 99_456, "ETHER+": 398_592, "PEFT LoRA r=4": 797_184, "PEFT OFT 4 blocks": 11_602_368}
"""Of SD 1.5, from the widths of its attention projections: 0.1, 0.4, 0.8 and 11.6 million in Table 2."""


def test_parameters_are_those_of_the_paper_and_files_hold_them(tmp_path: Path) -> None:
    assert study_cost.main(["--what", "size", "--output_dir", str(tmp_path)]) == 0
    methods = json.loads((tmp_path / "cost.json").read_text())["methods"]
    assert {name: methods[name]["parameters"] for name in PAPER} == PAPER
    for costs in (methods[name] for name in PAPER):
        assert 0 < costs["file_bytes"] - 4 * costs["parameters"] < 200_000  # the header
    assert is_png(tmp_path / "cost.png")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.to_q(x)
        return y


def test_energy_is_that_of_its_definition_also_in_pieces(monkeypatch: Patch) -> None:
    weight = torch.randn(40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert hyperspherical_energy(weight) == pytest.approx(float(by_definition(weight)), rel=1e-12)
    monkeypatch.setattr(energy, "_MAX_PAIRS", 100)
    assert hyperspherical_energy(weight) == pytest.approx(float(by_definition(weight)), rel=1e-12)
    assert hyperspherical_energy(torch.ones(2, 4)) == float("inf")  # two neurons of one direction


def adapted(config: EtherConfig | OFTConfig) -> nn.Module:
    torch.manual_seed(0)
    model = Attention().eval()
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_reflections_of_the_input_and_rotations_keep_the_energy() -> None:
    for config in (
        EtherConfig(target_modules=["to_q"]),
        OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=["to_q"]),
    ):
        (before,), (change,) = energy_changes(adapted(config))
        assert abs(change) < 1e-4 * before


def test_ether_plus_changes_the_energy_by_what_dense_matrices_say() -> None:
    model = adapted(EtherConfig(variant="ether_plus", target_modules=["to_q"]))
    layer = model.get_submodule("to_q")
    assert isinstance(layer, EtherLayer)
    sides = [
        Vectors(us["default"].detach().double(), vs["default"].detach().double())
        for us, vs in (
            (layer.ether_input_u, layer.ether_input_v),
            (layer.ether_output_u, layer.ether_output_v),
        )
    ]
    weight = layer.base_linear.weight.detach().double()
    expected = by_definition(dense_weight(weight, *sides)) - by_definition(weight)
    (before,), (change,) = energy_changes(model)
    assert change == pytest.approx(float(expected), abs=1e-4 * before)
    assert abs(change) > 1e-3 * before


@pytest.fixture
def tiny_world_adapters(tmp_path: Path) -> Path:
    """Adapters of three methods, as training saves them, far from where they start."""
    for method in ("ether", "ether_plus", "lora"):
        unet = UNet2DConditionModel.from_pretrained(tiny_world_path() / "unet")
        config = peft_config(AdapterConfig(adapter=method), "unet", StableDiffusion)
        for parameter in attach_new(unet, config, seed=0, part="unet"):
            nn.init.normal_(parameter, std=0.3)
        folder = tmp_path / "runs" / method / "adapter"
        folder.mkdir(parents=True)
        write_files(folder, adapter_files(unet, AdapterMetadata(base_model="tiny_world")))
        (folder / "checkpoint-1").mkdir()
        write_files(folder / "checkpoint-1", {"adapter_config.json": b"{}"})
    return tmp_path / "runs"


def test_the_study_of_energy_measures_every_adapter_it_is_given(
    tmp_path: Path, tiny_world_adapters: Path
) -> None:
    words = ["--adapters", str(tiny_world_adapters), "--base", "tiny_world"]
    assert energy.main([*words, "--output_dir", str(tmp_path / "energy")]) == 0
    found = json.loads((tmp_path / "energy/energy.json").read_text())
    assert set(found["methods"]) == {"ether", "ether_plus", "lora"}
    assert found["methods"]["ether"]["absolute_change"]["mean"] < 1e-4
    assert found["methods"]["lora"]["absolute_change"]["mean"] > 1e-6
    assert (tmp_path / "energy/energy.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_adapters_is_one_sentence(tmp_path: Path, capsys: Capture) -> None:
    assert energy.main(["--adapters", str(tmp_path), "--output_dir", str(tmp_path / "energy")]) == 2
    assert "holds no adapter_config.json" in capsys.readouterr().err
    assert not (tmp_path / "energy").exists()

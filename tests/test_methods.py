"""Adapters of every method: attached, trained, stored as PEFT does, and loaded by PEFT and diffusers."""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from base_kinds import draw, open_pipeline
from conftest import Factory
from diffusers.models.attention_processor import AttnProcessor
from loaded_runs import batches, load, trained
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from small_models import output
from tiny_pipelines import tiny_sd
from training_runs import config, write_base

from ether_diffusion.adapters import read_adapter
from ether_diffusion.bases.stable_diffusion import StableDiffusion
from ether_diffusion.training.config import AdapterConfig
from ether_diffusion.training.methods import adapters_off, attach_new, peft_config, restore_adapter
from ether_diffusion.training.result import load_saved, result_files, write_adapters, write_card, write_export
from ether_diffusion.training.setup import Run

PEFT_METHODS = ["lora", "oft", "hra", "delora", "boft", "ia3", "full"]
Runs = Callable[[str], tuple[Run, Path]]
METHODS = ["ether", "ether_plus", *PEFT_METHODS]

# PEFT's BOFT looks for a compiler of CUDA
pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
]


def trained_run(tmp_path: Path, method: str, *, text: bool = False, is_xl: bool = False) -> Run:
    """Do two updates and write the adapter into the run's folder."""
    write_base(tmp_path / "base", is_xl=is_xl)
    run = load(
        config(tmp_path, adapter=method, max_train_steps=2, learning_rate=0.05, train_text_encoder=text)
    )
    losses = [report.loss for report in run.trainer.steps(batches(run))]
    assert len(losses) == 2
    folder = run.config.output.output_dir
    folder.mkdir()
    write_adapters(folder, result_files(run))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Factory) -> Runs:
    """A run of each method on both models, for tests that leave its values as they are, and its folder."""

    @cache
    def run_of(method: str) -> tuple[Run, Path]:
        folder = tmp_path_factory.mktemp(method)
        run = trained_run(folder, method, text=True)
        for part in run.trainer.parts:
            part.model.eval()
        return run, folder

    return run_of


def far(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one - other).abs().max().item() > 1e-4


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_peft_loads_what_training_saved(runs: Runs, method: str) -> None:
    run, tmp_path = runs(method)
    fresh = open_pipeline(tmp_path / "base").unet
    assert far(output(run.unet), output(fresh))
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "run").eval()
    torch.testing.assert_close(output(loaded), output(run.unet))
    config = PeftConfig.from_pretrained(tmp_path / "run")
    assert str(getattr(config.peft_type, "value", config.peft_type)).lower() == method
    assert config.inference_mode


@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_near_the_base_and_all_of_it_learns(tmp_path: Path, method: str) -> None:
    write_base(tmp_path / "base")
    run = load(config(tmp_path, adapter=method, max_train_steps=3))
    base = open_pipeline(tmp_path / "base").unet
    run.unet.eval()
    if method == "ether":
        assert far(output(run.unet), output(base))  # a reflection is never the identity
    else:
        torch.testing.assert_close(output(run.unet), output(base), rtol=1e-4, atol=1e-5)
    run.unet.train()
    before = trained(run.unet)
    list(run.trainer.steps(batches(run)))
    after = trained(run.unet)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    frozen = {name: p for name, p in run.unet.named_parameters() if name not in before}
    weights = dict(base.named_parameters())
    for name, parameter in frozen.items():
        assert torch.equal(parameter, weights[name.replace(".base_layer", "").replace(".base_linear", "")])


@pytest.mark.parametrize("method", METHODS)
def test_a_method_switched_off_is_the_base_bit_for_bit_and_restored_values_are_those_stored(
    runs: Runs, method: str
) -> None:
    run, tmp_path = runs(method)
    base_unet = open_pipeline(tmp_path / "base").unet
    base_unet.set_attn_processor(AttnProcessor())  # as training's, on a CPU
    adapted, base = output(run.unet), output(base_unet)
    with adapters_off([run.unet]):
        assert torch.equal(output(run.unet), base)
    assert torch.equal(output(run.unet), adapted)
    expected = trained(run.unet)
    for parameter in run.trainer.parts[0].parameters:
        parameter.data.add_(1)
    restore_adapter(run.unet, load_file(tmp_path / "run" / "adapter_model.safetensors"))
    found = trained(run.unet)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_takes_the_place_of_the_trained_one(tmp_path: Path, method: str) -> None:
    run = trained_run(tmp_path, method, text=True)
    models = [part.model.eval() for part in run.trainer.parts]
    expected = output(run.unet), run.encode(["a sks cat"]).sequence.detach()
    load_saved(tmp_path / "run", run)
    torch.testing.assert_close(output(run.unet), expected[0])
    torch.testing.assert_close(run.encode(["a sks cat"]).sequence.detach(), expected[1])
    assert [list(model.__dict__["peft_config"]) for model in models] == [["saved"], ["saved"]]


@pytest.mark.parametrize("is_xl", [False, True], ids=["sd", "sdxl"])
def test_a_lora_is_what_diffusers_own_scripts_save(tmp_path: Path, is_xl: bool) -> None:
    run = trained_run(tmp_path, "lora", text=True, is_xl=is_xl)
    write_export(tmp_path / "run", run)
    pipe = open_pipeline(tmp_path / "base")
    base = draw(pipe)
    pipe.load_lora_weights(tmp_path / "run")
    for part in run.trainer.parts:
        pipe.register_modules(**{part.part: pipe.components[part.part]})
        stored = trained(part.model.eval())
        found = {
            name.replace("default_0", "default"): parameter
            for name, parameter in pipe.components[part.part].named_parameters()
            if "lora_" in name
        }
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[name], stored[name]) for name in stored)
    loras = draw(pipe)
    assert far(loras, base)
    ours = open_pipeline(tmp_path / "base")
    ours.register_modules(**{part.part: part.model for part in run.trainer.parts})
    torch.testing.assert_close(loras, draw(ours))


def test_a_lora_file_is_a_function_of_its_values(runs: Runs) -> None:
    run, tmp_path = runs("lora")
    written = set()
    for _ in range(8):  # safetensors orders metadata anew each time
        path = write_export(tmp_path / "run", run)
        assert path is not None
        written.add(path.read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("method", METHODS)
def test_options_mean_what_they_mean_in_peft(method: str) -> None:
    values: dict[str, Any] = peft_config(
        AdapterConfig(adapter=method, rank=3, num_blocks=2, lora_alpha=7, dropout=0.5),  # type: ignore[arg-type]
        "unet",
        StableDiffusion,
    ).to_dict()
    in_peft: dict[str, dict[str, Any]] = {
        "ether": {"num_blocks": 2, "variant": "ether", "dropout": 0.5},
        "ether_plus": {"num_blocks": 2, "variant": "ether_plus", "dropout": 0.5},
        "lora": {"r": 3, "lora_alpha": 7, "lora_dropout": 0.5},
        "oft": {"r": 2, "oft_block_size": 0, "module_dropout": 0.5},
        "hra": {"r": 3},
        "delora": {"r": 3, "module_dropout": 0.5},
        "boft": {"boft_block_num": 2, "boft_block_size": 0, "boft_dropout": 0.5},
        "ia3": {"feedforward_modules": set(StableDiffusion.targets["attention"])},
        "full": {"target_modules": ".*"},
    }
    expected = in_peft[method]
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_first_adapter_is_a_function_of_the_seed_and_float32_on_half_a_base(method: str) -> None:
    found: list[torch.Tensor] = []
    for seed in (0, 0, 1):
        unet = tiny_sd().unet.to(torch.bfloat16).requires_grad_(False)
        torch.manual_seed(len(found))  # what the global generator does is nobody's business
        settings = AdapterConfig(adapter=method)  # type: ignore[arg-type]
        added = attach_new(unet, peft_config(settings, "unet", StableDiffusion), seed=seed, part="unet")
        found.append(torch.cat([parameter.detach().flatten() for parameter in added]))
        assert {parameter.dtype for parameter in added} == {torch.float32}
        assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert torch.equal(found[0], found[1])
    if method not in ("oft", "boft", "ia3", "full"):  # which start from zeros or ones
        assert not torch.equal(found[0], found[2])


def test_targets_may_be_names_or_a_regex() -> None:
    def names(targets: str) -> set[str]:
        unet = copy.deepcopy(tiny_sd().unet).requires_grad_(False)
        attach_new(
            unet,
            peft_config(AdapterConfig(target_modules=targets), "unet", StableDiffusion),
            seed=0,
            part="unet",
        )
        return {name.split(".ether_")[0] for name in trained(unet)}

    everywhere = names("attention")
    assert len(everywhere) == 32
    assert names("to_q, to_k") == {name for name in everywhere if name.endswith(("to_q", "to_k"))}
    assert names(r"mid_block\..*attn2.*to_v") == {
        name for name in everywhere if name.startswith("mid_block") and name.endswith("attn2.to_v")
    }
    assert names("attention_and_feedforward") > everywhere


def test_a_method_that_does_not_fit_the_widths_says_so(tmp_path: Path) -> None:
    for method in ("ether", "oft", "boft"):
        with pytest.raises(ValueError, match=r"7"):
            load(config(tmp_path, adapter=method, num_blocks=7))


@pytest.mark.parametrize("method", ["ether_plus", "lora"])
def test_an_adapter_names_its_base_without_the_way_to_it(runs: Runs, method: str) -> None:
    run, tmp_path = runs(method)
    write_export(tmp_path / "run", run)
    write_card(tmp_path / "run", run, [])
    for path in (path for path in (tmp_path / "run").rglob("*") if path.is_file()):
        assert str(tmp_path).encode() not in path.read_bytes()
    if method == "ether_plus":
        assert read_adapter(tmp_path / "run").metadata.base_model == "base"
    else:
        stored = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
        assert stored["base_model_name_or_path"] == "base"


def test_full_fine_tuning_trains_every_weight_of_both_models(runs: Runs) -> None:
    run, tmp_path = runs("full")
    base = open_pipeline(tmp_path / "base")
    for part in run.trainer.parts:
        own = sum(parameter.numel() for parameter in getattr(base, part.part).parameters())
        assert sum(parameter.numel() for parameter in part.parameters) == own
    assert all(parameter.dtype == torch.float32 for parameter in run.trainer.parameters)


def test_merged_full_fine_tuning_is_a_plain_model_and_unmerges_bit_for_bit(runs: Runs) -> None:
    run, tmp_path = runs("full")
    fresh = open_pipeline(tmp_path / "base").unet
    before = {name: weight.clone() for name, weight in fresh.state_dict().items()}
    model = PeftModel.from_pretrained(fresh, tmp_path / "run").eval()
    model.merge_adapter()
    with model.disable_adapter():
        model.unmerge_adapter()
    restored = {name.replace(".base_layer", ""): weight for name, weight in fresh.state_dict().items()}
    assert all(torch.equal(restored[name], weight) for name, weight in before.items())
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == before.keys()
    torch.testing.assert_close(output(merged), output(run.unet))

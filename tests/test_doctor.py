"""What lies on this machine and what it can do, as `ether bases` and `ether doctor` say it."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Capture, Patch
from safetensors.torch import save_file
from tiny_pipelines import tiny_sd, tiny_sdxl

from ether_diffusion.bases.distilled import distilled_from
from ether_diffusion.scripts import doctor_command, ether
from ether_diffusion.tiny_world import EMBEDDED

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_bases_are_listed_wherever_they_lie(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    snapshot = tmp_path / "hub" / "models--somebody--base" / "snapshots" / ("0" * 40)
    tiny_sd().save_pretrained(snapshot)
    references = snapshot.parent.parent / "refs"
    references.mkdir()
    (references / "main").write_text(snapshot.name)
    here = tmp_path / "here"
    tiny_sdxl().save_pretrained(here / "xl")
    shutil.copytree(snapshot, here / "broken")
    (here / "broken" / "unet" / "config.json").write_text("{")
    save_file({"model.diffusion_model.x": torch.zeros(1)}, here / "single.safetensors")
    save_file({"x": torch.zeros(1)}, here / "adapter.safetensors")
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert ether.main(["bases", "--folder", str(here), "--json"]) == 0
    found = {Path(each["name"]).name: each for each in json.loads(capsys.readouterr().out)}
    assert set(found) == {*EMBEDDED, "base", "xl", "broken", "single.safetensors"}
    assert found["base"]["name"] == "somebody/base"
    assert found["base"]["kind"].startswith("StableDiffusionPipeline")
    assert found["xl"]["kind"].startswith("StableDiffusionXLPipeline")
    assert "config.json" in found["broken"]["problem"]
    assert all(each["problem"] is None for name, each in found.items() if name != "broken")
    assert found["single.safetensors"]["num_bytes"] == (here / "single.safetensors").stat().st_size


def test_a_folder_that_is_not_there_is_refused(capsys: Capture, tmp_path: Path) -> None:
    assert ether.main(["bases", "--folder", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err


def test_the_doctor_trains_a_step_and_names_what_is_old_or_missing(
    capsys: Capture, monkeypatch: Patch
) -> None:
    true = importlib.metadata.version
    versions = {"safetensors": "0.1", "peft": None}

    def version(name: str) -> str:
        found = versions.get(name, true(name))
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    assert ether.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "one step: " in said
    assert "peak memory" in said
    assert "tiny_world: StableDiffusionPipeline, 64 px" in said
    assert "tiny_world_flow: StableDiffusion3Pipeline, 64 px" in said
    assert f"torch {true('torch')} (needs >=" in said
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert ether.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "safetensors 0.1 (needs >=0.8): TOO OLD" in said
    assert "peft is not installed" in said
    assert said.count("to mend: pip install") == 2


@pytest.mark.parametrize(("offline", "says"), [(True, "HF_HUB_OFFLINE"), (False, "cannot be reached")])
def test_a_hub_that_is_not_there_is_said(offline: bool, says: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    (said,) = doctor_command._hub()
    assert says in said


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("stabilityai/sdxl-turbo", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("ByteDance/SDXL-Lightning", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("stabilityai/sd-turbo", "stabilityai/stable-diffusion-2-1"),
        ("models/FLUX.1-schnell/", "black-forest-labs/FLUX.1-dev"),
        ("black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-base-4B"),
        ("Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image"),
        ("stabilityai/stable-diffusion-3.5-large-turbo", "stabilityai/stable-diffusion-3.5-large"),
        ("black-forest-labs/FLUX.2-klein-base-4B", None),
        ("black-forest-labs/FLUX.1-dev", None),
        ("Tongyi-MAI/Z-Image", None),
        ("turbo/stable-diffusion-v1-5", None),
    ],
)
def test_a_distilled_base_is_known_by_its_name(name: str, instead: str | None) -> None:
    assert distilled_from(name) == instead


@pytest.mark.parametrize(
    ("index", "config", "instead"),
    [
        ({"_class_name": "FluxPipeline"}, {"guidance_embeds": False}, "black-forest-labs/FLUX.1-dev"),
        ({"_class_name": "FluxPipeline"}, {"guidance_embeds": True}, None),
        ({"is_distilled": True}, {"num_layers": 5}, "black-forest-labs/FLUX.2-klein-base-4B"),
        ({"is_distilled": True}, {"num_layers": 8}, "black-forest-labs/FLUX.2-klein-base-9B"),
        ({"_class_name": "StableDiffusionPipeline", "unet": []}, {"time_cond_proj_dim": 256}, SD15),
        ({"_class_name": "StableDiffusionPipeline", "unet": []}, {"time_cond_proj_dim": None}, None),
    ],
)
def test_a_distilled_base_is_known_by_its_configs_and_plan_says_so(
    index: dict[str, object],
    config: dict[str, object],
    instead: str | None,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    part = tmp_path / ("unet" if "unet" in index else "transformer")
    part.mkdir()
    (part / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert distilled_from("base", tmp_path) == instead
    assert ether.main(["plan", "--photos", "5", "--base", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (f"train on {instead}" in said) == (instead is not None)

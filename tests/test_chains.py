"""Chains of reflections: files, counts, starts, serving and mixing; the laws have them as a case."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Capture
from loaded_runs import load
from tiny_pipelines import tiny_sd
from trained_adapters import CONFIGS, save_adapter
from training_runs import config

from ether_diffusion import EtherConfig, load_ether
from ether_diffusion.adapters import read_adapter
from ether_diffusion.bases import open_base
from ether_diffusion.mixing import Ingredient, mix_adapters
from ether_diffusion.scripts import ether
from ether_diffusion.serving.engine import Engine, Request
from ether_diffusion.tuner import EtherLinear

ASKED: dict[str, Any] = {"prompt": "abc", "steps": 2, "width": 16, "height": 16}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    tiny_sd().save_pretrained(folder / "base")
    for name in ("chain", "ether_plus"):
        save_adapter(tiny_sd(), CONFIGS[name], folder / name)
    return folder


def test_a_file_says_the_chain_and_others_say_what_they_said(saved: Path, capsys: Capture) -> None:
    said = json.loads((saved / "chain" / "adapter_config.json").read_text())
    assert said["num_reflections"] == 3
    assert "num_reflections" not in json.loads((saved / "ether_plus" / "adapter_config.json").read_text())
    found = read_adapter(saved / "chain").first
    assert {tensor.shape[0] for tensor in found.tensors.values()} == {3}
    single = sum(tensor.numel() for tensor in found.tensors.values()) // 3
    assert ether.main(["inspect", str(saved / "chain")]) == 0
    shown = capsys.readouterr().out
    assert "num reflections: 3" in shown
    assert f"parameters: {3 * single}" in shown
    assert "3 reflections in a chain" in (saved / "chain" / "README.md").read_text()


def test_loading_gives_the_bytes_back(saved: Path) -> None:
    pipe = tiny_sd()
    load_ether(pipe, saved / "chain", adapter_name="chain")
    tensors = read_adapter(saved / "chain").first.tensors
    loaded = {n.replace(".chain", ""): p for n, p in pipe.unet.named_parameters() if ".chain" in n}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("number", [2, 3])
def test_a_file_of_another_length_is_refused(saved: Path, tmp_path: Path, number: int) -> None:
    for file in (saved / "chain").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"num_reflections": number}))
    if number == 3:
        read_adapter(tmp_path)
        return
    with pytest.raises(ValueError, match="the two files do not belong together"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_reflections": 0}, "num_reflections=0 is not a number of reflections"),
        ({"num_reflections": 2.0}, "is not a number of reflections"),
        (
            {"num_reflections": 2, "variant": "ether_plus"},
            "is a chain of ether on the input side; found variant=",
        ),
        ({"num_reflections": 2, "sides": "both"}, "found variant='ether', sides='both'"),
    ],
)
def test_what_is_no_chain_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EtherConfig(**fields)


def test_the_command_refuses_a_chain_on_the_output_side(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_reflections=2 is a chain on the input side; found sides=both"):
        config(tmp_path, adapter="ether", num_reflections=2, sides="both")


@torch.no_grad()
@pytest.mark.parametrize(("number", "strength"), [(2, 1.0), (4, 1.0), (3, 0.0)])
def test_pairs_start_at_the_base(tmp_path: Path, number: int, strength: float) -> None:
    for learned in (None, "learned"):
        run = load(config(tmp_path / str(learned), adapter="ether", num_reflections=number, strength=learned))
        layers = [module for module in run.unet.modules() if isinstance(module, EtherLinear)]
        assert layers
        for layer in layers:
            λ = layer.strength("default")
            assert λ is None or float(λ) == strength
            update = layer.get_delta_weight("default").norm() / layer.base_linear.weight.norm()
            is_at_base = number % 2 == 0 or learned == "learned"  # in pairs, or by a strength of 0
            assert update < 1e-5 if is_at_base else update > 0.1


def test_it_is_served_as_the_pipelines_draw(saved: Path) -> None:
    base, drawn = open_base(saved / "base"), []
    for slots in (2, None):
        engine = Engine(base, num_slots=slots, max_rows=2)
        engine.add_adapter("chain", read_adapter(saved / "chain"))
        images = engine.draw([Request(**ASKED, seed=s, adapters={"chain": 0.7}) for s in (1, 2)])
        drawn.append(np.stack([np.asarray(image).astype(int) for image in images]))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_a_mix_draws_what_both_draw(saved: Path) -> None:
    strengths = {"chain": 0.8, "ether_plus": 0.5}
    adapters = {name: read_adapter(saved / name) for name in strengths}
    mixed = mix_adapters([Ingredient(n, adapters[n], s) for n, s in strengths.items()], tiny_sd())
    engine = Engine(open_base(saved / "base"), num_slots=None)
    for name, adapter in {**adapters, "mix": mixed}.items():
        engine.add_adapter(name, adapter)
    both, one = (
        np.asarray(image).astype(int)
        for image in engine.draw([Request(**ASKED, adapters=choice) for choice in (strengths, {"mix": 1.0})])
    )
    assert np.abs(both - one).max() <= 1

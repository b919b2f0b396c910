"""Hyperspherical energy: its definition, what leaves it as it is, and the study of saved adapters."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from oracles import dense_weight
from oracles import hyperspherical_energy as by_definition
from peft import OFTConfig, inject_adapter_in_model
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import AdapterMetadata
from ether_diffusion.bases.stable_diffusion import StableDiffusion
from ether_diffusion.durable_files import write_files
from ether_diffusion.reflections import Vectors
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.training.config import AdapterConfig
from ether_diffusion.training.methods import adapter_files, attach_new, peft_config
from ether_diffusion.tuner import EtherLayer
from research import study_energy as energy
from research.study_energy import energy_changes, hyperspherical_energy, main


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.to_q(x)
        return y


def test_energy_is_that_of_its_definition_also_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapted Linear"):
        energy_changes(Attention())


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


def test_the_study_measures_every_adapter_it_is_given(tmp_path: Path, tiny_world_adapters: Path) -> None:
    assert main(["--adapters", str(tiny_world_adapters), "--output_dir", str(tmp_path / "energy")]) == 0
    found = json.loads((tmp_path / "energy/energy.json").read_text())
    assert set(found["methods"]) == {"ether", "ether_plus", "lora"}
    assert found["methods"]["ether"]["absolute_change"]["mean"] < 1e-4
    assert found["methods"]["lora"]["absolute_change"]["mean"] > 1e-6
    assert (tmp_path / "energy/energy.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_adapters_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--adapters", str(tmp_path), "--output_dir", str(tmp_path / "energy")]) == 2
    assert "holds no adapter_config.json" in capsys.readouterr().err
    assert not (tmp_path / "energy").exists()

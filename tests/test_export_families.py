"""The export of every family's transformer: diffusers' own loaders and PEFT's compute the adapter from it."""

import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from trained_adapters import dense_update
from transformer_families import PIPELINES, TRANSFORMERS, pipeline_around

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import read_adapter, save_ether
from ether_diffusion.export import export_lora


def exported(family: str, folder: Path) -> Path:
    """Train every Linear of a family's transformer, save that, and export it on the same base."""
    model = TRANSFORMERS[family]()
    linears = [re.escape(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = EtherConfig(
        variant="ether_plus", num_blocks=1, target_modules="|".join(linears), init_weights=False
    )
    torch.manual_seed(1)
    save_ether(get_peft_model(model, config), folder)
    return export_lora(folder, TRANSFORMERS[family](), folder, dtype=torch.float32)


def assert_exact(model: nn.Module, adapter: Path) -> None:
    """Check that a model's LoRA adds to every weight just what the saved adapter does."""
    projections = read_adapter(adapter).projections()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert layers.keys() == projections.keys()
    for name, layer in layers.items():
        (lora,) = layer.lora_A
        expected = dense_update(layer.get_base_layer().weight.detach(), projections[name])
        found = layer.get_delta_weight(lora).detach().double()
        assert_close(found, expected, rtol=0, atol=1e-6 * max(1.0, float(expected.abs().max())), msg=name)


pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_model_computes_the_adapter_from_its_export(family: str, tmp_path: Path) -> None:
    path = exported(family, tmp_path)
    model = TRANSFORMERS[family]()
    if isinstance(model, PeftAdapterMixin):
        model.load_lora_adapter(tmp_path, weight_name=path.name)
    else:
        tensors = {key.removeprefix("transformer."): t for key, t in load_file(path).items()}
        rank = len(next(t for key, t in tensors.items() if "lora_A" in key))
        targets = {key.partition(".lora_")[0] for key in tensors}
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        inject_adapter_in_model(config, model, "x", state_dict=tensors)
        set_peft_model_state_dict(model, tensors, "x")
    assert_exact(model, tmp_path)


@pytest.mark.parametrize("family", PIPELINES)
def test_a_pipeline_computes_the_adapter_from_its_export(family: str, tmp_path: Path) -> None:
    path = exported(family, tmp_path)
    model = TRANSFORMERS[family]()
    pipeline_around(family, model).load_lora_weights(tmp_path, weight_name=path.name)
    assert_exact(model, tmp_path)

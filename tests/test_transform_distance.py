"""The distance of transforms from the identity is that of the matrix which the layer multiplies by."""

import math

import pytest
import torch
from peft import HRAConfig, LoraConfig, OFTConfig, PeftConfig, inject_adapter_in_model
from torch import nn

from ether_diffusion import EtherConfig
from research.distances import effective_weight, transform_distance

TARGETS = ["to_q"]
INPUT_SIDED: dict[str, PeftConfig] = {
    "ether": EtherConfig(target_modules=TARGETS),
    "ether_plus": EtherConfig(variant="ether_plus", sides="input", target_modules=TARGETS),
    "oft": OFTConfig(r=4, oft_block_size=0, target_modules=TARGETS),
    "hra": HRAConfig(r=4, target_modules=TARGETS),
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(32, 32)


def adapted(config: PeftConfig) -> nn.Module:
    model = Attention().eval()
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("method", INPUT_SIDED)
def test_it_is_that_of_the_matrix_between_the_weights(method: str) -> None:
    model = adapted(INPUT_SIDED[method])
    layer = model.get_submodule("to_q")
    with torch.no_grad():
        weight = layer.get_submodule("base_layer").weight
        assert isinstance(weight, torch.Tensor)
        transform = torch.linalg.solve(weight.double(), effective_weight(layer).double())  # W' = W T
        expected = float((transform - torch.eye(32)).norm())
    assert transform_distance(model) == pytest.approx(expected, rel=1e-3)


def test_two_sides_count_in_quadrature() -> None:
    model = adapted(EtherConfig(sides="both", target_modules=TARGETS))
    assert transform_distance(model) == pytest.approx(math.sqrt(2) * 2 * math.sqrt(4), rel=1e-6)


def test_what_adds_to_the_weight_has_none() -> None:
    assert transform_distance(adapted(LoraConfig(target_modules=TARGETS))) is None
    assert transform_distance(Attention()) is None

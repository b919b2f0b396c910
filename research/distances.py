"""How far adapters move weights, and the matrices that multiply them from the identity."""

import math

import torch
from peft.tuners.hra import HRALayer
from peft.tuners.oft import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.reflections import Rows, Vectors, rows
from ether_diffusion.tuner import EtherLayer


@torch.no_grad()
def weight_distance(model: nn.Module) -> float:
    """Return the mean over adapted Linears of ‖W' − W‖ / ‖W‖ (Frobenius), for any method.

    Raises:
        ValueError: no Linear is adapted.
    """
    distances = []
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), nn.Linear):
            weight = layer.get_base_layer().weight.float()
            distances.append(float((effective_weight(layer) - weight).norm() / weight.norm()))
    if not distances:
        raise ValueError("the model has no adapted Linear")
    return sum(distances) / len(distances)


def effective_weight(layer: nn.Module) -> Tensor:
    """Return W' (out, in) of an adapted Linear: what its forward makes of the unit vectors."""
    assert isinstance(layer, BaseTunerLayer)
    weight = layer.get_base_layer().weight
    unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    assert callable(layer)
    bias: Tensor = layer(torch.zeros_like(unit[:1]))
    made: Tensor = layer(unit)
    return (made - bias).T.float()


@torch.no_grad()
def transform_distance(model: nn.Module) -> float | None:
    """Return the mean over adapted Linears of ‖T − I‖ (Frobenius), in quadrature over sides and adapters.

    ETHER, Bini et al. 2024, arXiv:2405.20271, figure 4. None where a layer's method adds to the weight, as
    LoRA does, or no layer is adapted.
    """
    distances = []
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), nn.Linear):
            distance = _layer_distance(layer)
            if distance is None:
                return None
            distances.append(distance)
    return sum(distances) / len(distances) if distances else None


def distance_to_identity(side: Rows) -> float:
    """Return ‖H − I‖ (Frobenius) of one side, from its rows alone: ‖c Lᵀ R‖² = c² ⟨L Lᵀ, R Rᵀ⟩."""
    left, right = side.left.double(), side.right.double()
    return float(abs(side.scale) * ((left @ left.T) * (right @ right.T)).sum().clamp_min(0).sqrt())


def _layer_distance(layer: BaseTunerLayer) -> float | None:
    squares = 0.0
    for name in layer.active_adapters:
        if isinstance(layer, EtherLayer):
            sides = [
                Vectors(us[name], vs.get(name))
                for us, vs in (
                    (layer.ether_input_u, layer.ether_input_v),
                    (layer.ether_output_u, layer.ether_output_v),
                )
                if name in us
            ]
            squares += sum(distance_to_identity(side) ** 2 for side in rows(sides, torch.float64))
        elif isinstance(layer, OFTLayer):
            unit = torch.eye(layer.in_features)
            squares += _square(layer.oft_R[name](unit) - unit)
        elif isinstance(layer, HRALayer):
            squares += _square(layer.get_delta_weight(name) - torch.eye(layer.in_features))
        else:
            return None
    return math.sqrt(squares)


def _square(matrix: Tensor) -> float:
    return float(matrix.double().square().sum())

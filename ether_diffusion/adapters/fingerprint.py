"""The fingerprint of a base model: enough to tell another architecture and other weights, without a copy."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from ether_diffusion.reflections import wide

BaseMatch = Literal["same", "other weights", "other architecture"]

FLOAT32_TOLERANCE = 1e-6
"""Relative; norms are stored with nine digits and summed in float64."""


@dataclass(frozen=True)
class BaseFingerprint:
    """What an adapter remembers of the weights it was trained on.

    Attributes:
        architecture: hash over the adapted modules' names and weight shapes.
        norms: Frobenius norm of each adapted base weight, in the order of the sorted names.
        rounding: relative shift of a norm that the base's dtype explains by itself; 0 for float32.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    architecture: Annotated[str, Field(pattern="^[A-Za-z0-9]{1,64}$")]
    norms: tuple[Annotated[float, Field(ge=0)], ...]
    rounding: Annotated[float, Field(ge=0, le=0.1)] = 0.0

    @property
    def id(self) -> str:
        """A short name to print. Bases that compare as the same may differ in it, after the dash."""
        rounded = ",".join(f"{norm:.3g}" for norm in self.norms)
        return f"{self.architecture}-{hashlib.sha256(rounded.encode()).hexdigest()[:6]}"

    def compare(self, other: "BaseFingerprint") -> BaseMatch:
        """Say whether two bases are the same up to the rounding of their dtypes."""
        if self.architecture != other.architecture or len(self.norms) != len(other.norms):
            return "other architecture"
        tolerance = FLOAT32_TOLERANCE + max(self.rounding, other.rounding)
        pairs = zip(self.norms, other.norms, strict=True)
        same = all(math.isclose(mine, theirs, rel_tol=tolerance) for mine, theirs in pairs)
        return "same" if same else "other weights"


def fingerprint(weights: Mapping[str, Tensor]) -> BaseFingerprint | None:
    """Return the fingerprint of the base weights (out, in) by module name; None on the meta device."""
    names = sorted(weights)
    if any(weights[name].is_meta for name in names):
        return None
    shapes = json.dumps([(name, list(weights[name].shape)) for name in names])
    norms = [_norm(weights[name].detach()) for name in names]
    return BaseFingerprint(
        architecture=hashlib.sha256(shapes.encode()).hexdigest()[:12],
        norms=tuple(float(f"{norm:.9g}") for norm in norms),
        rounding=float(f"{max((_rounding(weights[name]) for name in names), default=0.0):.3g}"),
    )


def _norm(weight: Tensor) -> float:
    if weight.device.type == "mps":  # has no float64
        weight = weight.cpu()
    norm: float = torch.linalg.vector_norm(
        wide(weight), dtype=torch.float64
    ).item()  # float8 promotes to nothing
    return norm


def _rounding(weight: Tensor) -> float:
    # Rounding moves each of N entries by up to eps / 2 of itself, independently: the norm then moves by about
    # 0.35 eps / √N for normally distributed entries. Measured 0.3 to 0.5; 4 leaves room for heavy tails.
    if torch.finfo(weight.dtype).bits >= 32:
        return 0.0
    return 4 * torch.finfo(weight.dtype).eps / math.sqrt(weight.numel())

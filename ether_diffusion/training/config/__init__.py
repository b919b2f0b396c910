"""Configuration: every option declared once, checked before anything slow."""

from ether_diffusion.options import OptionsError
from ether_diffusion.training.config.dreambooth import ControlRunConfig, DreamBoothConfig, control_of
from ether_diffusion.training.config.options import (
    DEFAULT_LEARNING_RATES,
    DEFAULT_STEPS,
    AdapterConfig,
    AdapterMethod,
    BaseConfig,
    ComputeConfig,
    ControlConfig,
    DataConfig,
    EvaluationConfig,
    OptimizationConfig,
    OutputConfig,
    PriorConfig,
    ValidationConfig,
)

__all__ = [
    "AdapterConfig",
    "AdapterMethod",
    "BaseConfig",
    "ComputeConfig",
    "ControlConfig",
    "ControlRunConfig",
    "DEFAULT_LEARNING_RATES",
    "DEFAULT_STEPS",
    "DataConfig",
    "DreamBoothConfig",
    "EvaluationConfig",
    "OptimizationConfig",
    "OptionsError",
    "OutputConfig",
    "PriorConfig",
    "ValidationConfig",
    "control_of",
]

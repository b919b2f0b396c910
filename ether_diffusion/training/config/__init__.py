"""Configuration: one frozen dataclass per concern, one field per flag, checked before anything slow."""

from ether_diffusion.options import OptionsError
from ether_diffusion.training.config.adapter import DEFAULT_LEARNING_RATES, AdapterConfig, AdapterMethod
from ether_diffusion.training.config.base import BaseConfig
from ether_diffusion.training.config.compute import ComputeConfig
from ether_diffusion.training.config.control import ControlConfig
from ether_diffusion.training.config.control_run import ControlRunConfig, control_of
from ether_diffusion.training.config.data import DataConfig
from ether_diffusion.training.config.dreambooth import OPTION_NAMES, SECTIONS, DreamBoothConfig
from ether_diffusion.training.config.evaluation import EvaluationConfig
from ether_diffusion.training.config.optimization import DEFAULT_STEPS, OptimizationConfig
from ether_diffusion.training.config.output import OutputConfig
from ether_diffusion.training.config.prior import PriorConfig
from ether_diffusion.training.config.validation import ValidationConfig

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
    "OPTION_NAMES",
    "OptimizationConfig",
    "OptionsError",
    "OutputConfig",
    "PriorConfig",
    "SECTIONS",
    "ValidationConfig",
    "control_of",
]

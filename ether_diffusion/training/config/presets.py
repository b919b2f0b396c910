"""Presets: named sets of options, under which the configuration file and the flags go."""

from types import MappingProxyType
from typing import Literal

from ether_diffusion.strict_json import Json

PresetName = Literal["fast", "balanced", "faithful"]

PRESETS: dict[PresetName, str] = {
    "fast": "A first look in a minute or two: few steps, few images.",
    "balanced": "What most subjects want: the defaults, written down.",
    "faithful": "The setting of the ETHER paper (arXiv:2405.20271, 5.1.1 and C.1): 1400 steps with 200 "
    "class images, each method at the paper's learning rate. Needs class_data_dir and class_prompt.",
}
"""What each preset is for."""

PRESET_VALUES: MappingProxyType[PresetName, dict[str, Json]] = MappingProxyType(
    {
        "fast": {
            "max_train_steps": 200,
            "train_batch_size": 1,
            "checkpointing_steps": 50,
            "validation_steps": 100,
            "num_validation_images": 2,
            "validation_num_inference_steps": 12,
        },
        "balanced": {
            "max_train_steps": 800,
            "train_batch_size": 1,
            "checkpointing_steps": 100,
            "validation_steps": 100,
            "num_validation_images": 4,
            "validation_num_inference_steps": 20,
        },
        "faithful": {
            "max_train_steps": 1400,
            "train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "lr_scheduler": "constant",
            "adam_weight_decay": 0.0,
            "dropout": 0.0,
            "target_modules": "attention",
            "prior_preservation": "class_images",
            "num_class_images": 200,
            "prior_loss_weight": 1.0,
            "checkpointing_steps": 200,
            "validation_steps": 200,
        },
    }
)
"""What each preset sets, in the flat form of a configuration."""

"""The configuration of a run that learns to follow control images: a DreamBooth run with one section more."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

from ether_diffusion.adapter_file.strict_json import Json
from ether_diffusion.options import shown
from ether_diffusion.training.config.adapter import AdapterMethod
from ether_diffusion.training.config.control import ControlConfig
from ether_diffusion.training.config.dreambooth import SECTIONS, DreamBoothConfig
from ether_diffusion.training.config.section import Section

# ETHER, Bini et al. 2024, arXiv:2405.20271, appendix C.2: controllable generation
CONTROL_LEARNING_RATES: dict[AdapterMethod, float] = {"ether": 1e-3, "ether_plus": 1e-3, "oft": 1e-5}
"""The learning rate of methods that take another one here than for a subject."""
CONTROL_TARGETS = "attention_and_feedforward"


@dataclass(frozen=True)
class ControlRunConfig(DreamBoothConfig):
    """All that a run with control images is told.

    Raises:
        OptionsError: options that cannot be used together; all are listed.
    """

    control: ControlConfig = field(default_factory=ControlConfig)

    sections: ClassVar[dict[str, type[Section]]] = {**SECTIONS, "control": ControlConfig}
    method_rates: ClassVar[Mapping[AdapterMethod, float]] = {
        **DreamBoothConfig.method_rates,
        **CONTROL_LEARNING_RATES,
    }

    def contradictions(self) -> Iterator[str]:
        """Say which options of different sections exclude or lack each other."""
        yield from super().contradictions()
        control = self.control
        if control.conditioning_data_dir is None:
            yield "there is nothing to follow; give conditioning_data_dir, a folder of control images"
        if control.control_type is not None and not re.fullmatch(
            r"[A-Za-z0-9_-]{1,40}", control.control_type
        ):
            yield f"control_type={shown(control.control_type)} is no name; use letters, digits, _ and -"
        num_images, num_prompts = len(control.validation_image), len(self.validation.validation_prompt)
        if num_images != num_prompts:
            yield (
                f"found {num_images} of validation_image and {num_prompts} of validation_prompt; give a "
                "control image for each prompt"
            )

    @classmethod
    def from_flat(cls, values: Mapping[str, Json]) -> Self:
        """Return the configuration that a flat one describes, as `DreamBoothConfig.from_flat`.

        Without target_modules, GEGLU's projections are adapted too, as in the paper.
        """
        return super().from_flat({"target_modules": CONTROL_TARGETS, **values})


def control_of(config: DreamBoothConfig) -> ControlConfig | None:
    """Return what a run is told of control; None where it has no control images."""
    return config.control if isinstance(config, ControlRunConfig) else None

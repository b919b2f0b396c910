"""The configuration of a run that learns to follow control images: a DreamBooth run with one section more."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

from ether_diffusion.control.detector_names import MODEL_DETECTORS, control_type_of
from ether_diffusion.strict_json import Json
from ether_diffusion.training.config.adapter import AdapterMethod
from ether_diffusion.training.config.control import ControlConfig
from ether_diffusion.training.config.dreambooth import SECTIONS, DreamBoothConfig
from ether_diffusion.training.config.section import Section

# ETHER, Bini et al. 2024, arXiv:2405.20271, appendix C.2: controllable generation
CONTROL_LEARNING_RATES: dict[AdapterMethod, float] = {"ether": 1e-3, "ether_plus": 1e-3, "oft": 1e-5}
"""The learning rate of methods that take another one here than for a subject."""
CONTROL_TARGETS = "attention_and_feedforward"
CAPTION_COLUMN = "text"


@dataclass(frozen=True)
class ControlRunConfig(DreamBoothConfig):
    """All that a run with control images is told.

    Raises:
        OptionsError: options that cannot be used together; all are listed.
    """

    control: ControlConfig = field(default_factory=ControlConfig)

    needs_adapter: ClassVar[bool] = False
    sections: ClassVar[dict[str, type[Section]]] = {**SECTIONS, "control": ControlConfig}
    method_rates: ClassVar[Mapping[AdapterMethod, float]] = {
        **DreamBoothConfig.method_rates,
        **CONTROL_LEARNING_RATES,
    }

    def contradictions(self) -> Iterator[str]:
        """Say which options of different sections exclude or lack each other."""
        yield from super().contradictions()
        control = self.control
        has_images = control.conditioning_data_dir is not None or self.data.dataset_name is not None
        if not has_images and not control.is_detected:
            yield (
                "there is nothing to follow; give conditioning_data_dir, a folder of control images, or "
                "dataset_name with a column of them, or a detector that draws them"
            )
        if control.detector in MODEL_DETECTORS and not self.data.cache_latents:
            yield (
                f"detector={control.detector} is a model, which would look at every photo again each time; "
                "leave cache_latents on"
            )
        if self.evaluation.eval_steps:
            yield (
                "eval_steps measures likeness to a subject's photos, and control images teach no subject; "
                "leave it out: validation_prompt with validation_image shows how the run learns"
            )
        num_images, num_prompts = len(control.validation_image), len(self.validation.validation_prompt)
        if num_images != num_prompts:
            yield (
                f"found {num_images} of validation_image and {num_prompts} of validation_prompt; give a "
                "control image for each prompt, or one for all"
            )

    @classmethod
    def from_flat(cls, values: Mapping[str, Json]) -> Self:
        """Return the configuration that a flat one describes, as `DreamBoothConfig.from_flat`.

        Without target_modules, GEGLU's projections are adapted too, as in the paper. What follows from other
        options is written out: the control type from the detector or the palette, captions from a data set's
        column text, as in diffusers' train_controlnet.py, and one validation image or prompt beside several.
        """
        implied: dict[str, Json] = {"target_modules": CONTROL_TARGETS}
        if values.get("dataset_name") is not None and values.get("instance_prompt") is None:
            implied["caption_column"] = CAPTION_COLUMN
        merged = {**implied, **values}
        if merged.get("control_type") is None:
            if isinstance(merged.get("detector"), str):
                merged["control_type"] = control_type_of(str(merged["detector"]))
            elif merged.get("palette") is not None:
                merged["control_type"] = "palette"
        return super().from_flat(_as_many(merged, "validation_prompt", "validation_image"))


def _as_many(values: Mapping[str, Json], *names: str) -> dict[str, Json]:
    """Return flat values in which one text of these lists is repeated for all of the others."""
    lists = {
        name: values[name] if isinstance(values[name], list) else [values[name]]
        for name in names
        if values.get(name)
    }
    most = max((len(found) for found in lists.values() if isinstance(found, list)), default=0)
    repeated = {
        name: found * most for name, found in lists.items() if isinstance(found, list) and len(found) == 1
    }
    return {**values, **repeated}


def control_of(config: DreamBoothConfig) -> ControlConfig | None:
    """Return what a run is told of control; None where it has no control images."""
    return config.control if isinstance(config, ControlRunConfig) else None

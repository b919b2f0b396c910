"""The whole configuration of a run, and its flat form: one name and one JSON value for each option."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Self

from ether_diffusion.options import OptionsError, kinds_of, shown
from ether_diffusion.strict_json import Json
from ether_diffusion.training.config.adapter import DEFAULT_LEARNING_RATES, AdapterConfig, AdapterMethod
from ether_diffusion.training.config.base import BaseConfig
from ether_diffusion.training.config.compute import ComputeConfig
from ether_diffusion.training.config.data import DataConfig
from ether_diffusion.training.config.evaluation import EvaluationConfig
from ether_diffusion.training.config.legacy import NOT_OFFERED
from ether_diffusion.training.config.optimization import DEFAULT_STEPS, OptimizationConfig
from ether_diffusion.training.config.output import OutputConfig
from ether_diffusion.training.config.prior import PriorConfig
from ether_diffusion.training.config.section import Section
from ether_diffusion.training.config.validation import ValidationConfig

SECTIONS: dict[str, type[Section]] = {
    "base": BaseConfig,
    "data": DataConfig,
    "prior": PriorConfig,
    "adapter": AdapterConfig,
    "optimization": OptimizationConfig,
    "compute": ComputeConfig,
    "validation": ValidationConfig,
    "evaluation": EvaluationConfig,
    "output": OutputConfig,
}
"""The sections of DreamBoothConfig, in the order of its fields."""

OPTION_NAMES = tuple(each.name for section in SECTIONS.values() for each in fields(section))
"""The names of all options; each names one option only."""

PRODIGY_LEARNING_RATE = 1.0
"""Prodigy finds the rate itself and multiplies it by this one (Mishchenko and Defazio 2024)."""


@dataclass(frozen=True)
class DreamBoothConfig(Section):
    """All that a training run is told.

    Raises:
        OptionsError: options that cannot be used together; all are listed.
    """

    data: DataConfig
    base: BaseConfig = field(default_factory=BaseConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    sections: ClassVar[dict[str, type[Section]]] = SECTIONS
    method_rates: ClassVar[Mapping[AdapterMethod, float]] = DEFAULT_LEARNING_RATES

    needs_adapter: ClassVar[bool] = True

    def __post_init__(self) -> None:
        problems = list(self.contradictions())
        if problems:
            raise OptionsError(problems)

    def contradictions(self) -> Iterator[str]:
        """Say which options of different sections exclude or lack each other."""
        if self.adapter.adapter == "none" and (self.needs_adapter or self.adapter.train_text_encoder):
            rest = "train_text_encoder adapts it" if self.adapter.train_text_encoder else "nothing is trained"
            yield f"adapter=none trains the encoder of control images alone, and {rest}; choose a method"
        if self.adapter.train_text_encoder and self.data.pre_compute_text_embeddings:
            yield (
                "train_text_encoder changes the embeddings that pre_compute_text_embeddings keeps; "
                "switch one of them off"
            )
        if self.prior.prior_preservation == "frozen" and self.class_prompt is None:
            yield (
                "prior_preservation=frozen needs class_prompt, as 'a photo of a dog'; give it, or token and "
                "an instance_prompt that holds it and more, so that the class prompt is what is left"
            )
        if self.evaluation.eval_steps and not self.subject_prompts and self.data.instance_prompt is None:
            yield "eval_steps needs prompts with the subject; give eval_prompt, as 'a sks dog in the snow'"
        yield from self._shared_folders()

    def _shared_folders(self) -> Iterator[str]:
        folders = {
            "instance_data_dir": self.data.instance_data_dir,
            "class_data_dir": self.prior.class_data_dir,
            "mask_data_dir": self.data.mask_data_dir,
            "output_dir": self.output.output_dir,
        }
        names: dict[Path, str] = {}
        for name, folder in folders.items():
            if folder is None:
                continue
            same = names.setdefault(folder.absolute(), name)
            if same != name:
                yield f"{same} and {name} are the same folder, {shown(folder)}; give two folders"

    @property
    def learning_rate(self) -> float:
        """The learning rate: the one given, or Prodigy's, or the method's own."""
        if self.optimization.learning_rate is not None:
            return self.optimization.learning_rate
        if self.optimization.optimizer == "prodigy":
            return PRODIGY_LEARNING_RATE
        return self.method_rates[self.adapter.adapter]

    @property
    def text_encoder_learning_rate(self) -> float:
        """The learning rate of the text encoder's adapter: the one given, or the UNet's."""
        return self.optimization.text_encoder_lr or self.learning_rate

    @property
    def subject_prompts(self) -> tuple[str, ...]:
        """The prompts given to measure on, or else those to draw; none where they follow from the photos'."""
        return self.evaluation.eval_prompt or self.validation.validation_prompt

    @property
    def class_prompt(self) -> str | None:
        """The class prompt: the one given, or the instance prompt without its trigger word."""
        prompt, token = self.data.instance_prompt, self.data.token
        if self.prior.class_prompt is not None or prompt is None or token is None:
            return self.prior.class_prompt
        rest, count = re.subn(rf"\{{token\}}|(?<!\w){re.escape(token)}(?!\w)", " ", prompt)
        return " ".join(rest.split()) or None if count else None

    def resolved(self) -> Self:
        """Return the same run with what follows from other options written out."""
        optimization, prior = self.optimization, self.prior
        rates: dict[str, Any] = {"learning_rate": self.learning_rate}
        if self.adapter.train_text_encoder:
            rates["text_encoder_lr"] = self.text_encoder_learning_rate
        if optimization.max_train_steps is None and optimization.num_train_epochs is None:
            rates["max_train_steps"] = DEFAULT_STEPS
        if prior.prior_preservation != "none":
            prior = replace(prior, class_prompt=self.class_prompt)
        return replace(self, optimization=replace(optimization, **rates), prior=prior)

    def flat(self) -> dict[str, Json]:
        """Return every option's value by its name: paths as text, several texts as a list."""
        values: dict[str, Json] = {}
        for section in self.sections:
            for name, value in vars(getattr(self, section)).items():
                values[name] = _as_json(value)
        return values

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Return the names of all options of such a run; each names one option only."""
        return tuple(each.name for section in cls.sections.values() for each in fields(section))

    @classmethod
    def from_flat(cls, values: Mapping[str, Json]) -> Self:
        """Return the configuration that a flat one describes; options that it lacks have their defaults.

        What a given option implies is switched with it, unless it is given too: train_text_encoder switches
        pre_compute_text_embeddings off, and aspect_ratio_buckets switches use_aspect_ratio_buckets on.

        Raises:
            OptionsError: names that are no options, values that cannot be used; all are listed.
        """
        known = cls.option_names()
        problems = [unknown_name(name, known) for name in values if name not in known]
        implied: dict[str, Json] = {}
        if values.get("train_text_encoder") is True:
            implied["pre_compute_text_embeddings"] = False
        if values.get("aspect_ratio_buckets") is not None:
            implied["use_aspect_ratio_buckets"] = True
        values = {**implied, **values}
        sections: dict[str, Section] = {}
        for section, config_type in cls.sections.items():
            kinds = kinds_of(config_type)
            given = {name: kinds[name].convert(values[name]) for name in kinds if name in values}
            try:
                sections[section] = config_type(**given)
            except OptionsError as error:
                problems += error.problems
        if problems:
            raise OptionsError(problems)
        return cls(**sections)  # type: ignore[arg-type]  # each section under its own name


def unknown_name(name: str, known: Sequence[str] = OPTION_NAMES) -> str:
    """Say that no option has this name, and which of the known names comes nearest."""
    near = get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else "see train-dreambooth --help for the names"
    remedy = NOT_OFFERED.get(name, remedy)
    return f"{shown(name)} is not an option; {remedy}"


def _as_json(value: object) -> Json:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    assert value is None or isinstance(value, bool | int | float | str)
    return value

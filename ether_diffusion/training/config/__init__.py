"""Configuration of a run: its sections, what follows from several of them, and its flat form."""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from ether_diffusion.control.detectors import MODEL_DETECTORS, control_type_of
from ether_diffusion.options import Declared, Options, OptionsError, declared, shown
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import EMBEDDED
from ether_diffusion.training.config.options import (
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

__all__ = ["DEFAULT_LEARNING_RATES", "DEFAULT_STEPS", "AdapterConfig", "AdapterMethod", "BaseConfig"]
__all__ += ["ComputeConfig", "ControlConfig", "ControlRunConfig", "DataConfig", "DreamBoothConfig"]
__all__ += ["EvaluationConfig", "OptimizationConfig", "OptionsError", "OutputConfig", "PriorConfig"]
__all__ += ["ValidationConfig", "control_of", "unknown_name"]

DEFAULT_LEARNING_RATES: dict[AdapterMethod, float] = {
    # ETHER, Bini et al. 2024, arXiv:2405.20271, section 5.1.1 and appendix C.1: subject-driven generation
    "ether": 6e-3,
    "ether_plus": 6e-3,
    "lora": 6e-4,
    "oft": 6e-5,  # in the paper's own parametrisation; PEFT's may want more, its image benchmark takes 1e-4
    "full": 5e-6,
    # PEFT's benchmark method_comparison/image-gen, the published setting of each
    "hra": 1e-4,
    "delora": 1e-3,
    "boft": 1e-4,
    "ia3": 3e-3,  # of few-shot learning, Liu et al. 2022, arXiv:2205.05638
    "none": 1e-4,  # of nothing: control's encoder has a rate of its own
}
"""The learning rate of each method where none is given."""
PRODIGY_LEARNING_RATE = 1.0
"""Prodigy finds the rate itself and multiplies it by this one (Mishchenko and Defazio 2024)."""
FOLDERS = ("instance_data_dir", "class_data_dir", "mask_data_dir", "output_dir")
"""Options no two of which may be the same folder."""
NOT_OFFERED = {
    "cache_dir": "set the environment variable HF_HUB_CACHE",
    "controlnet_model_name_or_path": "no ControlNet is trained or gone on from, but an adapter and a small "
    "encoder; a run in output_dir goes on by itself",
    "crops_coords_top_left_h": "leave it out: SDXL is told how each photo was cropped",
    "crops_coords_top_left_w": "leave it out: SDXL is told how each photo was cropped",
    "token_abstraction": "use token and {token}; no new tokens are trained",
    "final_validation_prompt": "use validation_prompt",
    "lora_unet_blocks": "use target_modules with a regex",
    "use_dora": "use adapter delora, or lora",
}
"""Names that users of sibling scripts may try, and what to do instead."""


class DreamBoothConfig(Options):
    """All that a training run is told; options that cannot be used together are one OptionsError."""

    base: BaseConfig = Field(default_factory=BaseConfig)
    data: DataConfig
    prior: PriorConfig = Field(default_factory=PriorConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    optimization: OptimizationConfig = Field(default_factory=OptimizationConfig)
    compute: ComputeConfig = Field(default_factory=ComputeConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)

    needs_adapter: ClassVar[bool] = True
    method_rates: ClassVar[Mapping[AdapterMethod, float]] = DEFAULT_LEARNING_RATES
    their_defaults: ClassVar[Mapping[str, Json]] = {}
    """Those of the diffusers script of this kind of run, where they are not what the options declare."""

    def _contradictions(self) -> Iterator[str]:
        is_text_trained, values = self.adapter.train_text_encoder, self._values()
        if self.adapter.adapter == "none" and (self.needs_adapter or is_text_trained):
            rest = "train_text_encoder adapts it" if is_text_trained else "nothing is trained"
            yield f"adapter=none trains the encoder of control images alone, and {rest}; choose a method"
        if is_text_trained and self.data.pre_compute_text_embeddings:
            yield "train_text_encoder changes what pre_compute_text_embeddings keeps; switch one of them off"
        if self.prior.prior_preservation == "frozen" and self.class_prompt is None:
            yield (
                "prior_preservation=frozen needs class_prompt, as 'a photo of a dog'; give it, or token and "
                "an instance_prompt that holds it and more"
            )
        if self.evaluation.eval_steps and not self.subject_prompts and self.data.instance_prompt is None:
            yield "eval_steps needs prompts with the subject; give eval_prompt, as 'a sks dog in the snow'"
        names: dict[Path, str] = {}
        for name in FOLDERS:
            folder = values[name]
            if folder and (same := names.setdefault(folder.absolute(), name)) != name:
                yield f"{same} and {name} are the same folder, {shown(folder)}; give two folders"

    @property
    def learning_rate(self) -> float:
        """The learning rate: the one given, or Prodigy's, or the method's own."""
        is_prodigy = self.optimization.optimizer == "prodigy"
        own = PRODIGY_LEARNING_RATE if is_prodigy else self.method_rates[self.adapter.adapter]
        return self.optimization.learning_rate or own

    @property
    def quantize(self) -> Literal["nf4", "int8"] | None:
        """How the base is quantized, which it is beneath ETHER alone."""
        return self.compute.quantize if self.adapter.adapter in ("ether", "ether_plus") else None

    @property
    def text_encoder_learning_rate(self) -> float:
        """The learning rate of the text encoder's adapter: the one given, or the UNet's."""
        return self.optimization.text_encoder_lr or self.learning_rate

    @property
    def trigger(self) -> str | None:
        """The prompt that calls the subject: the instance prompt with its token, or the token."""
        prompt, token = self.data.instance_prompt, self.data.token
        return prompt or token if prompt is None or token is None else prompt.replace("{token}", token)

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

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that a run reads or writes: where one lies in another, it is no part of that one."""
        values = self._values()
        found = (values.get(name) for name in (*FOLDERS, "conditioning_data_dir"))
        return tuple(folder for folder in found if folder is not None)

    def resolved(self) -> Self:
        """Return the same run with what follows from other options written out."""
        optimization, prior = self.optimization, self.prior
        rates: dict[str, Any] = {"learning_rate": self.learning_rate}
        if self.adapter.train_text_encoder:
            rates["text_encoder_lr"] = self.text_encoder_learning_rate
        if optimization.max_train_steps is None and optimization.num_train_epochs is None:
            rates["max_train_steps"] = DEFAULT_STEPS
        if prior.prior_preservation != "none":
            prior = prior.replace(class_prompt=self.class_prompt)
        has_blocks = self.adapter.adapter in ("ether", "ether_plus", "oft", "boft")
        adapter = self.adapter.replace(num_blocks=self.adapter.blocks) if has_blocks else self.adapter
        return self.replace(adapter=adapter, optimization=optimization.replace(**rates), prior=prior)

    @classmethod
    def sections(cls) -> dict[str, type[Options]]:
        """Return the models of the sections by their names."""
        found: dict[str, Any] = {name: info.annotation for name, info in cls.model_fields.items()}
        return found

    @classmethod
    @cache
    def options(cls) -> Mapping[str, Declared]:
        """Return what is declared of each option of such a run; each name is one option's only."""
        return {name: each for model in cls.sections().values() for name, each in declared(model).items()}

    def _values(self) -> dict[str, Any]:
        return {name: value for section in vars(self).values() for name, value in vars(section).items()}

    def flat(self) -> dict[str, Json]:
        """Return every option's value by its name: paths as text, several texts as a list."""
        sections = self.model_dump(mode="json").values()
        return {name: value for section in sections for name, value in section.items()}

    @classmethod
    def from_flat(cls, values: Mapping[str, Json]) -> Self:
        """Return the configuration that a flat one describes; options that it lacks have their defaults.

        What a given option implies is switched with it, unless it is given too. All that cannot be used, and
        names that are no options, are one OptionsError.
        """
        options = cls.options()
        problems = [unknown_name(name, [*options]) for name in values if name not in options]
        given = [each for name, each in options.items() if values.get(name) not in (None, False)]
        values = {name: value for each in given for name, value in each.implies.items()} | {**values}
        sections: dict[str, Any] = {}
        for section, model in cls.sections().items():
            try:
                own = {name: values[name] for name in model.model_fields if name in values}
                sections[section] = model(**own)
            except OptionsError as error:
                problems += error.problems
        if problems:
            raise OptionsError(problems)
        return cls(**sections)

    def ignored(self, given: Collection[str] = (), *, preset: Collection[str] = ()) -> tuple[str, ...]:
        """Return a sentence for each option that somebody asked for and that has no effect.

        Asked for are those in `given`, and those with another value than their default that no preset set.
        """
        values, base = self._values(), self.base.pretrained_model_name_or_path
        found = dict[str, str]()
        if base in EMBEDDED:
            found = dict.fromkeys(("revision", "variant"), f"{base} comes with this package")
        elif os.path.isdir(base) and self.base.tokenizer_name is None:  # noqa: PTH112
            found = {"revision": f"{base} is a folder, not a repository of the hub"}
        for name, each in self.options().items():
            lacks = (_lack(name, need, values) for need in each.needs.split(", ") if need)
            if (reason := next(filter(None, lacks), None)) is not None:
                found.setdefault(name, reason)
        return tuple(
            f"{name} has no effect: {reason}"
            for name, reason in found.items()
            if name in given or (values[name] != self.options()[name].default and name not in preset)
        )

    def changed_defaults(self, given: Collection[str] = ()) -> str:
        """Return one line of the options nobody gave, with what is used and, in brackets, what diffusers has.

        It is empty where all of them were given.
        """
        options, used = self.options(), self.flat()
        used |= {"learning_rate": self.learning_rate, "resolution": self.data.resolution or "the base's"}
        used["max_train_steps"] = self.optimization.max_train_steps or DEFAULT_STEPS
        given = {*given, *(options[name].instead_of or name for name in given)}
        theirs = {name: each.theirs for name, each in options.items() if each.theirs is not None}
        items = [
            f"{name} {_plain(used[name])} ({_plain(default)})"
            for name, default in {**theirs, **self.their_defaults}.items()
            if name not in given and used[name] != default
        ]
        return f"defaults here (diffusers' in brackets): {', '.join(items)}" if items else ""


class ControlRunConfig(DreamBoothConfig):
    """All that a run with control images is told, as `DreamBoothConfig`."""

    control: ControlConfig = Field(default_factory=ControlConfig)

    needs_adapter: ClassVar[bool] = False
    # ETHER, Bini et al. 2024, arXiv:2405.20271, appendix C.2: controllable generation
    method_rates: ClassVar[Mapping[AdapterMethod, float]] = {
        **DEFAULT_LEARNING_RATES,
        "ether": 1e-3,
        "ether_plus": 1e-3,
        "oft": 1e-5,
    }
    # of train_controlnet.py
    their_defaults: ClassVar = {"learning_rate": 5e-6, "validation_steps": 100, "center_crop": True}

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        control = self.control
        if not (control.is_detected or control.conditioning_data_dir or self.data.dataset_name):
            yield (
                "there is nothing to follow; give conditioning_data_dir, a folder of control images, or "
                "dataset_name with a column of them, or a detector that draws them"
            )
        if control.detector in MODEL_DETECTORS and not self.data.cache_latents:
            yield f"detector={control.detector} is a model, too slow for each visit; leave cache_latents on"
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
        merged: dict[str, Json] = {"target_modules": "attention_and_feedforward"}
        if values.get("dataset_name") is not None and values.get("instance_prompt") is None:
            merged["caption_column"] = "text"
        merged |= values
        detector = merged.get("detector")
        if merged.get("control_type") is None and isinstance(detector, str):
            merged["control_type"] = control_type_of(detector)
        elif merged.get("control_type") is None and merged.get("palette") is not None:
            merged["control_type"] = "palette"
        found = {name: merged.get(name) or [] for name in ("validation_prompt", "validation_image")}
        lists = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
        most = max(map(len, lists.values()))
        merged |= {name: [*value] * most for name, value in lists.items() if len(value) == 1}
        return super().from_flat(merged)


def control_of(config: DreamBoothConfig) -> ControlConfig | None:
    """Return what a run is told of control; None where it has no control images."""
    return config.control if isinstance(config, ControlRunConfig) else None


def unknown_name(name: str, known: Sequence[str]) -> str:
    """Say that no option has this name, and which of the known names comes nearest."""
    near = get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else "see train-dreambooth --help for the names"
    return f"{shown(name)} is not an option; {NOT_OFFERED.get(name, remedy)}"


def _lack(name: str, need: str, values: Mapping[str, object]) -> str | None:
    """Say what an option lacks, by one need as in `Declared`; None where it is all there."""
    others, _, choices = need.removeprefix("no ").partition("=")
    found = [values[other] for other in others.split(" or ") if other in values]
    if not found or name == others:
        return None
    if need.startswith("no "):
        return f"{others} is given, which outranks it" if any(found) else None
    if not choices:
        return None if any(found) else f"it needs {others}; give that, or leave it out"
    wanted = choices.split("|")
    if (found[0] or "none") in wanted:
        return None
    if "none" in wanted:
        return f"{others}={found[0]} is given, which outranks it"
    used = "" if found[0] is None else f", and {found[0]} is used"
    return f"it is for {others}={' or '.join(wanted)}{used}"


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)

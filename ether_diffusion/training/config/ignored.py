"""Which options have no effect beside the others, so that no wish is dropped in silence."""

import os
from collections.abc import Collection, Iterator
from dataclasses import fields

from ether_diffusion.training.config.adapter import METHODS_WITH
from ether_diffusion.training.config.control import ControlConfig
from ether_diffusion.training.config.control_run import control_of
from ether_diffusion.training.config.dreambooth import DreamBoothConfig


def find_ignored(
    config: DreamBoothConfig, given: Collection[str] = (), *, preset: Collection[str] = ()
) -> tuple[str, ...]:
    """Return a sentence for each option that somebody asked for and that has no effect.

    Asked for are those in `given`, and those with another value than their default, unless a preset set it.
    """
    values: dict[str, object] = {}
    defaults: dict[str, object] = {}
    for section, config_type in config.sections.items():
        values |= vars(getattr(config, section))
        defaults |= {each.name: each.default for each in fields(config_type)}
    sentences: dict[str, str] = {}
    for name, reason in _without_effect(config):
        if name in given or (values[name] != defaults[name] and name not in preset):
            sentences.setdefault(name, f"{name} has no effect: {reason}")
    return tuple(sentences.values())


def _without_effect(config: DreamBoothConfig) -> Iterator[tuple[str, str]]:
    yield from _of_the_base(config)
    yield from _of_the_data(config)
    yield from _of_the_prior(config)
    yield from _of_the_adapter(config)
    yield from _of_the_optimization(config)
    yield from _of_the_evaluation(config)
    yield from _of_the_output(config)
    control = control_of(config)
    if control is not None:
        yield from _of_the_control(control, has_rows=config.data.dataset_name is not None)


def _of_the_base(config: DreamBoothConfig) -> Iterator[tuple[str, str]]:
    name = config.base.pretrained_model_name_or_path
    if os.path.isdir(name) and config.base.tokenizer_name is None:  # noqa: PTH112
        yield "revision", f"{name} is a folder, not a repository of the hub"
    if name == "tiny_world":
        yield "revision", "tiny_world comes with this package"
        yield "variant", "tiny_world comes with this package"


def _of_the_data(config: DreamBoothConfig) -> Iterator[tuple[str, str]]:
    data = config.data
    if data.dataset_name is None:
        for name in ("dataset_config_name", "image_column", "caption_column"):
            yield name, "it is about a dataset, and dataset_name is not given"
    if not data.cache_latents:
        yield "crops_per_photo", "with cache_latents off, every visit crops its photo anew"
    if data.center_crop:
        yield "crops_per_photo", "with center_crop there is one crop of a photo"
    if not data.mask_from_alpha and data.mask_data_dir is None:
        yield "unmasked_weight", "there are no masks; give mask_from_alpha or mask_data_dir"


def _of_the_prior(config: DreamBoothConfig) -> Iterator[tuple[str, str]]:
    images_only = ("class_data_dir", "num_class_images", "sample_batch_size", "prior_generation_precision")
    if config.prior.prior_preservation == "none":
        for name in (*images_only, "class_prompt", "prior_loss_weight"):
            yield name, "prior_preservation is none; use class_images or frozen"
    if config.prior.prior_preservation == "frozen":
        for name in images_only:
            yield name, "prior_preservation=frozen needs no class images"


def _of_the_adapter(config: DreamBoothConfig) -> Iterator[tuple[str, str]]:
    method = config.adapter.adapter
    for name, methods in METHODS_WITH.items():
        if method not in methods:
            yield name, f"adapter={method} has no such setting; it is one of {', '.join(sorted(methods))}"
    if not config.adapter.train_text_encoder:
        yield "text_encoder_lr", "the text encoder is not trained; give train_text_encoder"


def _of_the_optimization(config: DreamBoothConfig) -> Iterator[tuple[str, str]]:
    optimization = config.optimization
    if optimization.max_train_steps is not None:
        yield "num_train_epochs", "max_train_steps outranks it"
    scheduler = optimization.lr_scheduler
    if scheduler == "constant":
        yield "lr_warmup_steps", "lr_scheduler=constant has no warmup; use constant_with_warmup"
    if scheduler != "cosine_with_restarts":
        yield "lr_num_cycles", f"it is for lr_scheduler=cosine_with_restarts, and {scheduler} is used"
    if scheduler != "polynomial":
        yield "lr_power", f"it is for lr_scheduler=polynomial, and {scheduler} is used"
    if not optimization.use_ema:
        yield "ema_decay", "there is no moving average; give use_ema"


def _of_the_evaluation(config: DreamBoothConfig) -> Iterator[tuple[str, str]]:
    evaluation = config.evaluation
    if not evaluation.eval_steps:
        for name in vars(evaluation):
            yield name, "nothing is measured in between; give eval_steps"
    if not evaluation.stop_when_good:
        yield "eval_patience", "the run goes on to its last step; give stop_when_good"


def _of_the_output(config: DreamBoothConfig) -> Iterator[tuple[str, str]]:
    if not config.validation.validation_prompt:
        for name in vars(config.validation):
            yield name, "no images are drawn in between; give validation_prompt"
    if config.validation.validation_epochs is not None:
        yield "validation_steps", "validation_epochs outranks it"
    if config.output.report_to is None:
        for name in ("logging_dir", "tracker_project_name"):
            yield name, "no tracker is used; give report_to"
    if not config.output.push_to_hub:
        for name in ("hub_model_id", "hub_private_repo"):
            yield name, "nothing is uploaded; give push_to_hub"


def _of_the_control(control: ControlConfig, *, has_rows: bool) -> Iterator[tuple[str, str]]:
    column = "conditioning_image_column"
    if control.is_detected:
        yield column, f"detector={control.detector} draws the control images"
    elif control.conditioning_data_dir is not None:
        yield column, "conditioning_data_dir holds the control images"
    elif not has_rows:
        yield column, "it is about a dataset, and dataset_name is not given"
    if control.detector != "canny":
        for name in ("canny_low_threshold", "canny_high_threshold"):
            yield name, "it is for detector=canny"
    if control.control_type != "palette":
        yield "palette", "it is for control_type=palette"

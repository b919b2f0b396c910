"""All that can be found wrong with a run before a model is loaded, said at once."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from peft.utils.error import NoMatchingPeftModuleError

from ether_diffusion.bases import Base, open_base
from ether_diffusion.options import shown
from ether_diffusion.training.config import DEFAULT_STEPS, DreamBoothConfig, control_of
from ether_diffusion.training.control import validation_controls
from ether_diffusion.training.crops import Needs, Scaling
from ether_diffusion.training.dataset import TrainingData, read_class_images, read_training_data
from ether_diffusion.training.evaluating import Evaluator, OpenEvaluator
from ether_diffusion.training.loop import Progress
from ether_diffusion.training.methods import attach_new, peft_config
from ether_diffusion.training.optimizers import find_optimizer
from ether_diffusion.training.prior import count_missing
from ether_diffusion.training.prompt_tokens import doubt_token, find_cut
from ether_diffusion.training.sample_plan import SamplePlan, plan_samples
from ether_diffusion.training.trackers import tracker_problem
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class CheckedRun:
    """A run whose base, photos and settings can be used; `num_missing` class images are to be drawn.

    `evaluator` measures in between, where that was asked for.
    """

    config: DreamBoothConfig
    base: Base
    training: TrainingData
    num_missing: int
    num_processes: int
    evaluator: Evaluator | None = None

    def plan(self) -> SamplePlan:
        """Decide what every sample shows; class images must be there by now.

        Raises:
            ValueError: a size does not fit the base, or class images cannot be used.
        """
        config, base = self.config, self.base
        prior = config.prior.replace(class_prompt=config.class_prompt)
        needs, class_images = needs_of(base), None
        if prior.prior_preservation == "class_images":
            scaling = Scaling.of(config.data, needs)
            class_images = read_class_images(config.data, prior, scaling=scaling, without=folders_of(config))
        return plan_samples(
            config.data,
            prior,
            self.training,
            class_images,
            needs=needs,
            effective_batch=self.progress(1).effective_batch,
            seed=config.compute.seed,
            control=control_of(config),
        )

    def progress(self, num_samples: int) -> Progress:
        """Return how far the run goes, where an epoch has so many samples."""
        settings = self.config.optimization
        split = (settings.train_batch_size, settings.gradient_accumulation_steps, self.num_processes)
        num_steps = settings.max_train_steps
        if num_steps is None and settings.num_train_epochs is not None:
            num_steps = settings.num_train_epochs * Progress(0, *split).steps_per_epoch(num_samples)
        return Progress(num_steps or DEFAULT_STEPS, *split)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width (px) of what is drawn."""
        side = self.config.data.resolution or self.base.native_size
        return side, side


def check_run(
    config: DreamBoothConfig, *, num_processes: int, open_evaluator: OpenEvaluator | None = None
) -> CheckedRun:
    """Open the base, decode every photo, read every caption, and look for what the settings need.

    Raises:
        ValueError: something cannot be used; all problems are listed, one a line.
    """
    problems: list[str] = []

    def collect(find: Callable[[], T]) -> T | None:
        try:
            return find()
        except (ValueError, OSError) as error:
            problems.append(str(error))
            return None

    base = collect(lambda: _open(config))
    training = collect(
        lambda: read_training_data(
            config.data,
            control=control_of(config),
            scaling=None if base is None else Scaling.of(config.data, needs_of(base)),
            without=folders_of(config),
        )
    )
    num_missing = collect(lambda: _count_missing(config)) or 0
    collect(lambda: find_optimizer(config.optimization))
    if base is not None:
        collect(lambda: _try_adapter(base, config))
    problems += _environment_problems(config)
    checked = None
    if base is not None and training is not None:
        checked = CheckedRun(config, base, training, num_missing, num_processes)
        size = checked.size
        collect(lambda: validation_controls(control_of(config), size))
        if base.is_inpainting and config.validation.validation_prompt:
            problems.append(
                "an inpainting base draws no picture from a prompt alone; leave validation_prompt out"
            )
        if config.evaluation.eval_steps:
            evaluator = collect(lambda: _open_evaluator(config, base, training, open_evaluator))
            checked = replace(checked, evaluator=evaluator)
        if not num_missing:
            plan = collect(checked.plan)
            for warning in () if plan is None else plan.warnings:
                logger.warning("%s", warning)
        for warning in collect(lambda: _prompt_warnings(config, base, training)) or ():
            logger.warning("%s", warning)
    if problems:
        raise ValueError("\n".join(problems))
    assert checked is not None
    return checked


def needs_of(base: Base) -> Needs:
    """Return what a base asks of the photos."""
    return Needs(
        base.native_size,
        base.size_multiple,
        has_size_ids=base.family == "sdxl",
        is_inpainting=base.is_inpainting,
    )


def folders_of(config: DreamBoothConfig) -> tuple[Path, ...]:
    """Return all folders that a run reads or writes: where one lies in another, it is no part of that one."""
    control = control_of(config)
    return tuple(
        folder
        for folder in (
            config.output.output_dir,
            config.data.instance_data_dir,
            config.data.mask_data_dir,
            config.prior.class_data_dir,
            None if control is None else control.conditioning_data_dir,
        )
        if folder is not None
    )


def _open_evaluator(
    config: DreamBoothConfig, base: Base, training: TrainingData, open_evaluator: OpenEvaluator | None
) -> Evaluator:
    if open_evaluator is None:
        raise ValueError(
            "eval_steps needs something that measures; train with "
            "open_evaluator=ether_diffusion.training.in_training.open_evaluator, or leave it out"
        )
    if base.is_inpainting:
        raise ValueError("an inpainting base draws no picture from a prompt alone; leave eval_steps out")
    return open_evaluator(config, base, training)


def _open(config: DreamBoothConfig) -> Base:
    settings = config.base
    base = open_base(
        settings.pretrained_model_name_or_path,
        revision=settings.revision,
        variant=settings.variant,
        vae=settings.pretrained_vae_model_name_or_path,
        tokenizer=settings.tokenizer_name,
        local_files_only=settings.local_files_only,
    )
    base.load_noise_scheduler()  # refused now where the base has noise of another kind
    return base


def _try_adapter(base: Base, config: DreamBoothConfig) -> None:
    """Attach the adapter to a UNet without weights.

    Raises:
        ValueError: it does not fit.
    """
    if config.adapter.adapter == "none":
        return
    try:
        attach_new(base.empty_unet(), peft_config(config.adapter, "unet"), seed=0, part="unet")
    except NoMatchingPeftModuleError:
        raise ValueError(
            f"target_modules={shown(config.adapter.target_modules)} matches no module of the UNet; use "
            "attention, attention_and_feedforward, or names like to_q,to_v"
        ) from None
    except RuntimeError:  # BOFT looks at values; its settings are checked before
        assert config.adapter.adapter == "boft"


def _count_missing(config: DreamBoothConfig) -> int:
    prior = config.prior
    if prior.prior_preservation != "class_images":
        return 0
    assert prior.class_data_dir is not None
    return count_missing(
        prior.class_data_dir,
        prior.num_class_images,
        follow_symlinks=config.data.follow_symlinks,
        without=folders_of(config),
    )


def _environment_problems(config: DreamBoothConfig) -> Iterator[str]:
    compute = config.compute
    if compute.enable_xformers_memory_efficient_attention:
        if not torch.cuda.is_available():
            yield "xformers has kernels on CUDA only, and there is no CUDA GPU; leave it out for SDPA"
        elif find_spec("xformers") is None:
            yield "xformers is not installed; pip install 'ether-diffusion[xformers]', or leave it out"
    problem = tracker_problem(config.output.report_to)
    if problem is not None:
        yield problem
    if compute.allow_tf32 and not torch.cuda.is_available():
        logger.warning("allow_tf32 has no effect: there is no CUDA GPU")


def _prompt_warnings(config: DreamBoothConfig, base: Base, training: TrainingData) -> list[str]:
    """Say which prompts are cut, and what is doubtful about the trigger word."""
    tokenizer = base.load_tokenizers()[0]
    prompts = [each.prompt for each in training.photos]
    prompts += [prompt for prompt in (config.class_prompt, *config.validation.validation_prompt) if prompt]
    cuts = {prompt: find_cut(prompt, tokenizer) for prompt in dict.fromkeys(prompts)}
    found = [f'"{printable(prompt[:40])}…": {cut}' for prompt, cut in cuts.items() if cut is not None]
    doubt = None if config.data.token is None else doubt_token(config.data.token, tokenizer)
    return [*found, *([] if doubt is None else [doubt])]

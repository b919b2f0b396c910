"""From a configuration to a run that trains: all that is wrong is said at once, then the parts are loaded."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from peft.utils.error import NoMatchingPeftModuleError

from ether_diffusion.bases import (
    Base,
    Denoiser,
    PromptEmbeddings,
    TextEncoders,
    decoded_again,
    open_base,
    recompute_activations,
    stack_embeddings,
)
from ether_diffusion.durable_files import delete_unfinished
from ether_diffusion.options import shown
from ether_diffusion.training.accelerator import DTYPES, tracker_problem
from ether_diffusion.training.batches import BatchSource, Codec
from ether_diffusion.training.captions import doubt_token, find_cut
from ether_diffusion.training.config import DEFAULT_STEPS, DreamBoothConfig, control_of
from ether_diffusion.training.control import new_control, validation_controls
from ether_diffusion.training.crops import Needs, Scaling
from ether_diffusion.training.dataset import TrainingData, read_class_images, read_training_data
from ether_diffusion.training.evaluator import SubjectEvaluator, open_evaluator
from ether_diffusion.training.loop import Progress, Trainer
from ether_diffusion.training.methods import TrainedPart, attach_new, peft_config
from ether_diffusion.training.objective import Denoising, Encode
from ether_diffusion.training.optimizers import find_optimizer
from ether_diffusion.training.prior import count_missing, generate_class_images
from ether_diffusion.training.resources import Phases
from ether_diffusion.training.sample_plan import SamplePlan
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)

T = TypeVar("T")
Check = Callable[[], None]
"""What is called in between, and raises where a signal came."""


@dataclass(frozen=True)
class CheckedRun:
    """A run whose base, photos and settings can be used; `num_missing` class images are to be drawn.

    `evaluator` measures in between, where that was asked for.
    """

    config: DreamBoothConfig
    accelerator: Accelerator
    base: Base
    training: TrainingData
    num_missing: int
    evaluator: SubjectEvaluator | None = None

    @cached_property
    def plan(self) -> SamplePlan:
        """What every sample shows; class images must be there by now.

        Raises:
            ValueError: a size does not fit the base, or class images cannot be used.
        """
        config, base = self.config, self.base
        prior = config.prior.replace(class_prompt=config.class_prompt)
        needs, class_images = needs_of(base), None
        if prior.prior_preservation == "class_images":
            scaling = Scaling.of(config.data, needs)
            class_images = read_class_images(config.data, prior, scaling=scaling, without=folders_of(config))
        return SamplePlan(
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
        split = (
            settings.train_batch_size,
            settings.gradient_accumulation_steps,
            self.accelerator.num_processes,
        )
        num_steps = settings.max_train_steps
        if num_steps is None and settings.num_train_epochs is not None:
            num_steps = settings.num_train_epochs * Progress(0, *split).steps_per_epoch(num_samples)
        return Progress(num_steps or DEFAULT_STEPS, *split)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width (px) of what is drawn."""
        side = self.config.data.resolution or self.base.native_size
        return side, side

    @property
    def prompts(self) -> set[str]:
        """All prompts that are drawn in between, with no words at all among them."""
        validation = self.config.validation
        drawn = {*validation.validation_prompt, "", validation.validation_negative_prompt or ""}
        measured = self.evaluator and {*self.evaluator.prompts, *self.evaluator.other_prompts}
        return drawn | (measured or set())


def check_run(config: DreamBoothConfig, accelerator: Accelerator) -> CheckedRun:
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
    training = collect(lambda: _read_photos(config, base))
    num_missing = collect(lambda: _count_missing(config)) or 0
    collect(lambda: find_optimizer(config.optimization))
    if base is not None:
        collect(lambda: _try_adapter(base, config))
    problems += _environment_problems(config)
    if base is not None and training is not None:
        checked = CheckedRun(config, accelerator, base, training, num_missing)
        collect(lambda: validation_controls(control_of(config), checked.size))
        drawing = {
            "validation_prompt": config.validation.validation_prompt,
            "eval_steps": config.evaluation.eval_steps,
        }
        asked = [name for name, value in drawing.items() if value]
        if base.is_inpainting and asked:
            problems.append(
                f"an inpainting base draws no picture from a prompt alone; leave {' and '.join(asked)} out"
            )
        elif config.evaluation.eval_steps:
            evaluator = collect(lambda: open_evaluator(config, base, training))
            checked = replace(checked, evaluator=evaluator)
        plan = None if num_missing else collect(lambda: checked.plan)
        warnings = () if plan is None else plan.warnings
        for warning in (*warnings, *(collect(lambda: _prompt_warnings(config, base, training)) or ())):
            logger.warning("%s", warning)
    if problems:
        raise ValueError("\n".join(problems))
    return checked


def folders_of(config: DreamBoothConfig) -> tuple[Path, ...]:
    """Return all folders that a run reads or writes: where one lies in another, it is no part of that one."""
    control = control_of(config)
    folders = (
        config.output.output_dir,
        config.data.instance_data_dir,
        config.data.mask_data_dir,
        config.prior.class_data_dir,
        None if control is None else control.conditioning_data_dir,
    )
    return tuple(folder for folder in folders if folder is not None)


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
    base.load_noise()  # refused now where the base has noise of another kind
    return base


def _read_photos(config: DreamBoothConfig, base: Base | None) -> TrainingData:
    return read_training_data(
        config.data,
        control=control_of(config),
        scaling=None if base is None else Scaling.of(config.data, needs_of(base)),
        without=folders_of(config),
    )


def needs_of(base: Base) -> Needs:
    """Return what a base asks of the photos."""
    return Needs(
        base.native_size,
        base.size_multiple,
        has_size_ids=base.has_size_ids,
        is_inpainting=base.is_inpainting,
    )


def _count_missing(config: DreamBoothConfig) -> int:
    prior = config.prior
    if prior.prior_preservation != "class_images":
        return 0
    assert prior.class_data_dir is not None
    follow, folders = config.data.follow_symlinks, folders_of(config)
    return count_missing(
        prior.class_data_dir, prior.num_class_images, follow_symlinks=follow, without=folders
    )


def _try_adapter(base: Base, config: DreamBoothConfig) -> None:
    """Attach the adapter to a UNet without weights."""
    if config.adapter.adapter == "none":
        return
    try:
        attach_new(base.empty_denoiser(), peft_config(config.adapter, "unet", base), seed=0, part="unet")
    except NoMatchingPeftModuleError:
        raise ValueError(
            f"target_modules={shown(config.adapter.target_modules)} matches no module of the UNet; use "
            "attention, attention_and_feedforward, or names like to_q,to_v"
        ) from None
    except RuntimeError:  # BOFT looks at values; its settings are checked before
        assert config.adapter.adapter == "boft"


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


def draw_class_images(checked: CheckedRun, check: Check) -> None:
    """Draw the class images that are missing, by the base alone."""
    config, base, accelerator = checked.config, checked.base, checked.accelerator
    prior = config.prior
    if prior.class_data_dir is not None:
        delete_unfinished(prior.class_data_dir, is_shared=True)
    if not checked.num_missing:
        return
    assert prior.class_data_dir is not None
    assert config.class_prompt is not None
    precision = prior.prior_generation_precision or accelerator.mixed_precision
    logger.info("drawing %d class images into %s", checked.num_missing, prior.class_data_dir)
    pipeline = base.load_unchecked_pipeline(DTYPES[precision]).to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)

    def report(done: int, wanted: int) -> None:
        logger.info("class images: %d of %d", done, wanted)
        check()

    with decoded_again(pipeline.vae):
        generate_class_images(
            pipeline,
            prior.class_data_dir,
            class_prompt=config.class_prompt,
            num_class_images=prior.num_class_images,
            sample_batch_size=prior.sample_batch_size,
            seed=config.compute.seed,
            follow_symlinks=config.data.follow_symlinks,
            without=folders_of(config),
            on_progress=report,
        )


@dataclass(frozen=True)
class LoadedRun:
    """All that trains: the trainer, its batches, and what embeds prompts."""

    checked: CheckedRun
    plan: SamplePlan
    source: BatchSource
    trainer: Trainer
    unet: Denoiser
    encode: Encode

    @property
    def config(self) -> DreamBoothConfig:
        """What the run was told."""
        return self.checked.config

    @property
    def base(self) -> Base:
        """What the adapter is trained on."""
        return self.checked.base


def load_run(
    checked: CheckedRun,
    check: Check = lambda: None,
    phases: Phases | None = None,
    *,
    num_steps: int | None = None,
) -> LoadedRun:
    """Encode photos and prompts, then load the UNet and attach the adapters; num_steps may cut the run short.

    The parts are loaded one at a time, used, and leave memory again.

    Raises:
        ValueError: a photo's latents are not finite, or an adapter does not fit the model.
    """
    config, base, accelerator, plan = checked.config, checked.base, checked.accelerator, checked.plan
    settings, wanted, seed = config.optimization, control_of(config), config.compute.seed
    progress = checked.progress(plan.num_samples)
    progress = progress if num_steps is None else replace(progress, num_steps=num_steps)
    dtype, device = DTYPES[accelerator.mixed_precision], accelerator.device
    phases = phases or Phases(device)
    with phases.measure("encode photos"):
        source = _load_source(checked, plan, progress.num_steps * progress.effective_batch, check)
    with phases.measure("encode prompts"):
        encoders = base.load_text_encoders(dtype).to(device)
        parts = _text_parts(config, base, encoders) if config.adapter.train_text_encoder else []
        encode: Encode = encoders.encode
        if config.data.pre_compute_text_embeddings:
            encode = remember(encoders, sorted({*plan.prompts, *checked.prompts}))
            del encoders
    check()
    with phases.measure("load the UNet"):
        unet = base.load_denoiser(dtype).to(device)
        compute = config.compute
        if compute.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        wants_xformers = compute.enable_xformers_memory_efficient_attention
        side = max(checked.size) // base.vae_scale_factor
        base.set_attention(unet, "xformers" if wants_xformers else compute.attention, latent_side=side)
        if config.adapter.adapter != "none":
            parts = [_attached(config, base, "unet", unet, config.learning_rate), *parts]
        unet.train()
        if config.compute.torch_compile:
            unet.compile_repeated_blocks()  # block by block: a whole UNet compiles wrongly on CPUs
    control = None if wanted is None else new_control(wanted, base, unet, seed=seed)
    denoising = Denoising(
        unet,
        base.predict,
        encode,
        base.load_noise(),
        seed,
        snr_gamma=settings.snr_gamma,
        noise_offset=settings.noise_offset,
        text_encoders=[part.model for part in parts if part.part != "unet"],
        control=None if control is None else control.encoder,
    )
    trainer = Trainer(
        accelerator, parts, denoising, config=settings, progress=progress, seed=seed, control=control
    )
    return LoadedRun(checked, plan, source, trainer, unet, encode)


def _load_source(checked: CheckedRun, plan: SamplePlan, num_samples: int, check: Check) -> BatchSource:
    base, vae = checked.base, checked.base.load_vae().to(checked.accelerator.device)
    codec = Codec(
        lambda images: base.encode_images(vae, images), lambda latents: base.scale_latents(vae, latents)
    )
    source = BatchSource(plan, codec, num_samples=num_samples, on_progress=lambda done, of: check())
    if checked.config.data.cache_latents:
        vae.to("meta")  # its config still says how latents are scaled
    return source


@torch.no_grad()
def remember(encoders: TextEncoders, prompts: Sequence[str]) -> Encode:
    """Embed prompts once; what is returned knows these and no others."""
    table = {prompt: encoders.encode([prompt]).to(torch.device("cpu"), torch.float32) for prompt in prompts}

    def recall(wanted: Sequence[str]) -> PromptEmbeddings:
        return stack_embeddings([table[prompt] for prompt in wanted])

    return recall


def _attached(
    config: DreamBoothConfig, base: Base, part: str, model: torch.nn.Module, learning_rate: float
) -> TrainedPart:
    adapter = peft_config(config.adapter, part, base)
    added = attach_new(model, adapter, seed=config.compute.seed, part=part)
    return TrainedPart(part, model, adapter, added, learning_rate)


def _text_parts(config: DreamBoothConfig, base: Base, encoders: TextEncoders) -> list[TrainedPart]:
    parts = []
    for name, model in encoders.models.items():
        parts.append(_attached(config, base, name, model, config.text_encoder_learning_rate))
        model.train()
        if config.compute.gradient_checkpointing:
            recompute_activations(model)
    return parts
